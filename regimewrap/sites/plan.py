"""The plan: what a policy makes of a model's activations, as a value that can be printed before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from regimewrap.files import Table, Tabled
from regimewrap.gate.gate import Site
from regimewrap.sites.finder import Activation

Mechanism = Literal["hook", "graph", "source"]


@dataclass(frozen=True)
class Row:
    """One activation and what becomes of it.

    Attributes:
        activation: what was found.
        mechanism: how it is reached; ``None`` if no mechanism reaches it, or it is left alone.
        selected: whether the policy wants it gated.
        why: the reason for either, in words.
        site: its place under the gate, if it will be gated.
    """

    activation: Activation
    mechanism: Mechanism | None
    selected: bool
    why: str
    site: Site | None = None

    @property
    def name(self) -> str:
        """The dotted name."""
        return self.activation.name

    @property
    def gated(self) -> bool:
        """Whether it will be gated: wanted and reached."""
        return self.site is not None


@dataclass(frozen=True, repr=False)
class Plan(Tabled):
    """Every activation of a model, a row each; iterable, printable, and without effect.

    Attributes:
        model: name of the model's class.
        rows: in the order of ``named_modules``.
        recipes: the new methods, ready for ``rewrite``, by dotted name of the module that gets them.
    """

    model: str
    rows: tuple[Row, ...]
    recipes: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def gated(self) -> tuple[Row, ...]:
        """The rows that will be gated."""
        return tuple(row for row in self.rows if row.gated)

    @property
    def unreachable(self) -> tuple[Row, ...]:
        """The rows that the policy selects and no mechanism can gate soundly."""
        return tuple(row for row in self.rows if row.selected and not row.gated)

    def __repr__(self) -> str:
        return str(self)

    def _table(self) -> Table:
        head = f"{self.model}: {len(self.gated)} of {len(self.rows)} activations gated"
        table = [("site", "activation", "mechanism", "gated", "why")]
        table += [
            (row.name, row.activation.label, row.mechanism or "-", "yes" if row.gated else "no", row.why)
            for row in self.rows
        ]
        return Table(table, head, left=range(5))
