"""Makes a few cells of a folder again, and says whether they come out the same."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import stdev
from typing import TYPE_CHECKING, Any, final

from regimewrap.errors import DataError
from regimewrap.recipes.records import processor, versions
from regimewrap.recipes.study.arms import RECIPE
from regimewrap.recipes.study.cells import Cell, read_cells
from regimewrap.recipes.study.outcomes import make

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FEW_SEEDS = 0.01  # the standard deviation that is taken where fewer than two other seeds are there
_SPREADS = 3  # standard deviations over seeds within which another machine's figure is another draw of the same


@final
@dataclass(frozen=True)
class Check:
    """One cell made again: ``equal`` to the last bit, ``alike`` (within what seeds spread), or neither."""

    file: str
    equal: bool
    alike: bool
    text: str


def problems_in(folder: Path) -> list[str]:
    """Return a line for each file among a folder's cells that is not a whole cell."""
    return read_cells(folder)[1]


def verify_cells(folder: Path, count: int, seed: int = 0, data: Path | None = None) -> Iterator[Check]:
    """Make ``count`` cells again, drawn with ``seed``, and compare them with the files.

    Same code, torch and processor: figures are equal to the last bit. Elsewhere training takes another path from the
    first rounding on; then a figure must lie within three standard deviations, over seeds, of the one in the file.

    Raises:
        DataError: there are no cells, or the data cannot be used.
    """
    records, _ = read_cells(folder)
    names = sorted(name for name, record in records.items() if record["cell"]["recipe"] == RECIPE)
    if not names:
        raise DataError(f"{folder} has no cell that this version of regimewrap can make again.")
    for name in random.Random(seed).sample(names, min(count, len(names))):  # noqa: S311 - a sample, not a secret
        record = records[name]
        yield _compared(name, record, make(Cell.model_validate(record["cell"]), data), records)


def _compared(name: str, there: dict[str, Any], here: dict[str, Any], records: dict[str, dict[str, Any]]) -> Check:
    old, new = there["figures"]["accuracy"], here["accuracy"]
    if _same(old, new) and _same(there["figures"]["nll"], here["nll"]):
        return Check(name, equal=True, alike=True, text="equal to the last bit")
    spreads = {budget: _spread(there, records, budget) for budget in old}
    budget = max(old, key=lambda each: abs(new[each] - old[each]) - spreads[each])
    alike = all(abs(new[each] - old[each]) <= _SPREADS * spreads[each] for each in old)
    ours = {**versions(), "processor": processor()}
    others = [f"{what} {theirs}" for what, mine in ours.items() if (theirs := there["made"].get(what)) != mine]
    where = f"made with {', '.join(others)}" if others else "though versions and processor are the same"
    points = 100 * (new[budget] - old[budget])
    size = f"accuracy at keep ratio {budget} differs by {points:+.2f} points ({where})"
    allowed = f"{_SPREADS} standard deviations over seeds are {100 * _SPREADS * spreads[budget]:.2f}"
    return Check(name, equal=False, alike=alike, text=f"{size}; {allowed}")


def _same(old: dict[str, float], new: dict[str, float]) -> bool:
    """Say whether figures are equal to the last bit; those of a network that broke are no numbers."""
    both = [(value, new[budget]) for budget, value in old.items()]
    return all(first == second or (math.isnan(first) and math.isnan(second)) for first, second in both)


def _spread(like: dict[str, Any], records: dict[str, dict[str, Any]], budget: str) -> float:
    """Return the standard deviation over the seeds of cells that differ from ``like`` in their seed alone."""
    key = {**like["cell"], "seed": None}
    same = [each for each in records.values() if each is not like and {**each["cell"], "seed": None} == key]
    values = [value for each in same if math.isfinite(value := each["figures"]["accuracy"][budget])]
    return stdev(values) if len(values) > 1 else _FEW_SEEDS
