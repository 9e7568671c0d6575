"""What fixed thresholds cost beside the selection, as figures."""

from __future__ import annotations

import math
import os
from dataclasses import astuple, dataclass, fields
from typing import final

from regimewrap.files import Table, Tabled
from regimewrap.measure.sweep import save_figures


@final
@dataclass(frozen=True)
class Comparison:
    """One budget, with the gate's selection and with thresholds; densities are shares of units that are not zero."""

    keep_ratio: float
    density_selected: float
    density_fixed: float
    selected: float
    fixed: float

    @property
    def difference(self) -> float:
        """What thresholds add to the metric; below zero where they lose."""
        return self.fixed - self.selected


@final
@dataclass(frozen=True)
class CalibrationReport(Tabled):
    """Thresholds compared with selection, a row for each budget. Prints as a table."""

    rows: tuple[Comparison, ...]

    def _table(self) -> Table:
        head = ("keep ratio", "density selected", "density fixed", "value selected", "value fixed", "difference")
        rows = [
            (f"{row.keep_ratio:g}", *(f"{value:.4f}" for value in astuple(row)[1:]), f"{row.difference:+.4f}")
            for row in self.rows
        ]
        return Table([head, *rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.json`` (a list of rows) or ``.csv``, whole or not at all.

        Raises:
            DataError: the suffix is another one, or the file cannot be written.
        """
        names = [*(field.name for field in fields(Comparison)), "difference"]
        table = [(*astuple(row), row.difference) for row in self.rows]
        finite = [[value if math.isfinite(value) else None for value in row] for row in table]
        values = [dict(zip(names, row, strict=True)) for row in finite]
        save_figures(path, "a report", values, [names, *table])
