"""What the gates do, as numbers: density, whether the gate binds, units that never fire. Watches; changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regimewrap import torch_private
from regimewrap.files import Table, Tabled
from regimewrap.gate.gate import Site, gate_of


@dataclass(frozen=True)
class SiteRecord:
    """One site over the watched forward passes.

    Attributes:
        calls: how often it ran.
        units: units that went through, over all calls.
        density: share of them that were non-zero after the gate, 0..1.
        density_before: share that were non-zero before it.
        bound: share of the calls in which the gate zeroed at least one non-zero unit.
    """

    calls: int
    units: int
    density: float
    density_before: float
    bound: float


class Watch(Tabled):
    """Counts of the watched forward passes; they stay on their device until they are read. Prints as a table."""

    def __init__(self) -> None:
        self._counts: dict[str, list[Tensor]] = defaultdict(list)
        self._units: dict[str, int] = defaultdict(int)

    @torch.no_grad()
    def __call__(self, site: Site, before: Tensor, after: Tensor) -> None:
        """Take one site's activation before and after the gate."""
        if torch_private.in_backward():
            return  # inside a backward pass: a recomputation of what was counted before
        non_zero_before = torch.count_nonzero(before)
        non_zero_after = torch.count_nonzero(after) if after is not before else non_zero_before
        self._counts[site.name].append(torch.stack((non_zero_before, non_zero_after)))
        self._units[site.name] += before.numel()

    @property
    def by_site(self) -> dict[str, SiteRecord]:
        """A record for each site that ran; reading it waits for the device once a site."""
        records = {}
        for name, counts in self._counts.items():
            pairs = torch.stack(counts).tolist()
            units = max(self._units[name], 1)
            records[name] = SiteRecord(
                calls=len(pairs),
                units=self._units[name],
                density=sum(after for _, after in pairs) / units,
                density_before=sum(before for before, _ in pairs) / units,
                bound=sum(after < before for before, after in pairs) / len(pairs),
            )
        return records

    @property
    def density(self) -> float:
        """Share of units, over all sites, that were non-zero after the gate; 0.0 if nothing ran."""
        records = self.by_site.values()
        return sum(each.density * each.units for each in records) / max(sum(each.units for each in records), 1)

    @property
    def bound(self) -> float:
        """Share of the sites that ran at which the gate zeroed at least one non-zero unit; 0.0 if nothing ran."""
        records = self.by_site.values()
        return sum(each.bound > 0 for each in records) / max(len(records), 1)

    def __repr__(self) -> str:
        return f"Watch(sites={len(self._counts)}, density={self.density:.3g}, bound={self.bound:.3g})"

    def _table(self) -> Table:
        rows = [
            (name, each.calls, f"{each.density_before:.3f}", f"{each.density:.3f}", f"{each.bound:.2f}")
            for name, each in self.by_site.items()
        ]
        head = f"density {self.density:.3g} over {len(rows)} sites"
        return Table([("site", "calls", "density before", "density after", "bound"), *rows], head)


@contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """Record what the gates of a wrapped model do in the forward passes inside the block.

    Args:
        model: a wrapped model, in eager mode.

    Yields:
        A ``Watch``; read it during or after the block.

    Raises:
        NotWrappedError: the model is not wrapped.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 2)))
    >>> regimewrap.gate_of(model).set_keep_ratio(0.25)
    >>> with regimewrap.watch(model) as seen:
    ...     y = model(torch.randn(3, 4))
    >>> seen.density, seen.by_site["1"].bound
    (0.25, 1.0)
    """
    gate = gate_of(model)
    seen = Watch()
    gate.observers.append(seen)
    try:
        yield seen
    finally:
        gate.observers.remove(seen)
