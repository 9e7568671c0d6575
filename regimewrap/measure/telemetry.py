"""What the gates do, as numbers over time: density, threshold, units that never fire. Watches; changes nothing."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regimewrap import torch_private
from regimewrap.files import Table, Tabled
from regimewrap.gate.gate import Site, TopKGate, gate_of
from regimewrap.policy.settings import whole_number


@dataclass(frozen=True)
class SiteRecord:
    """One site over the watched forward passes.

    Attributes:
        calls: how often it ran.
        units: units that went through, over all calls.
        density: share of them that were non-zero after the gate, 0..1.
        density_before: share that were non-zero before it.
        bound: share of the calls in which the gate zeroed at least one non-zero unit.
        threshold: the smallest magnitude that was kept in any call; infinite if nothing was.
        channels: what dead and always-on are counted of: the last dimension, the second of images (four dimensions or
            more), or what the policy's position scope selects over.
        dead: channels that were zero in all calls, for every sample and position.
        always_on: channels that were never zero.
    """

    calls: int
    units: int
    density: float
    density_before: float
    bound: float
    threshold: float
    channels: int
    dead: int
    always_on: int


@dataclass(frozen=True)
class SiteSample:
    """One call of a site; ``forward`` is the number of the forward pass, from 0, and the rest as in ``SiteRecord``."""

    forward: int
    units: int
    density: float
    density_before: float
    threshold: float
    channels: int
    dead: int
    always_on: int


class Watch(Tabled):
    """What the watched forward passes showed; it stays on its device until it is read. Prints as a table."""

    def __init__(self) -> None:
        self.forward = 0
        self._pending: list[tuple[str, int, int, int, Tensor, Tensor]] = []
        self._samples: dict[str, list[SiteSample]] = defaultdict(list)
        # By site and width, as one activation may serve layers of several: channels that ever fired, and always did.
        self._fired: dict[str, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)

    @torch.no_grad()
    def __call__(self, site: Site, before: Tensor, after: Tensor) -> None:
        """Take one site's activation before and after the gate."""
        if torch_private.in_backward():
            return  # inside a backward pass: a recomputation of what was counted before
        after, kept = after.detach(), _by_channel(site, after != 0)
        fired, rows = kept.sum(0), kept.shape[0]
        some, always = fired > 0, fired == rows
        non_zero = fired.sum()
        non_zero_before = torch.count_nonzero(before) if after is not before else non_zero
        counts = torch.stack((non_zero_before, non_zero, (~some).sum(), always.sum()))
        least = torch.where(after != 0, after.abs(), math.inf).amin() if after.numel() else torch.tensor(math.inf)
        self._pending.append((site.name, self.forward, before.numel(), len(some), counts, least))
        ever, throughout = self._fired[site.name].get(len(some), (some, always))
        self._fired[site.name][len(some)] = ever | some, throughout & always

    def fetch(self) -> None:
        """Take what waits on devices to the host."""
        for name, forward, units, channels, counts, least in self._pending:
            before, after, dead, always_on = counts.tolist()
            size = max(units, 1)
            sample = SiteSample(forward, units, after / size, before / size, float(least), channels, dead, always_on)
            self._samples[name].append(sample)
        self._pending.clear()

    @property
    def over_time(self) -> dict[str, list[SiteSample]]:
        """Each call that was watched, by site, in order; reading it waits for the device."""
        self.fetch()
        return {name: list(samples) for name, samples in self._samples.items()}

    @property
    def by_site(self) -> dict[str, SiteRecord]:
        """A record for each site that ran; reading it waits for the device."""
        return {name: self._record(name, samples) for name, samples in self.over_time.items()}

    def _record(self, name: str, samples: list[SiteSample]) -> SiteRecord:
        units = sum(each.units for each in samples)
        fired = self._fired[name].values()
        return SiteRecord(
            calls=len(samples),
            units=units,
            density=sum(each.density * each.units for each in samples) / max(units, 1),
            density_before=sum(each.density_before * each.units for each in samples) / max(units, 1),
            bound=sum(each.density < each.density_before for each in samples) / len(samples),
            threshold=min(each.threshold for each in samples),
            channels=sum(self._fired[name]),
            dead=sum(int((~ever).sum()) for ever, _ in fired),
            always_on=sum(int(throughout.sum()) for _, throughout in fired),
        )

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
        return f"Watch(sites={len(self.by_site)}, density={self.density:.3g}, bound={self.bound:.3g})"

    def _table(self) -> Table:
        rows: list[tuple[object, ...]] = [
            ("site", "calls", "density before", "after", "bound", "threshold", "channels", "dead", "always on")
        ]
        for name, each in self.by_site.items():
            shares = f"{each.density_before:.3f}", f"{each.density:.3f}", f"{each.bound:.2f}", f"{each.threshold:.3g}"
            rows.append((name, each.calls, *shares, each.channels, each.dead, each.always_on))
        return Table(rows, f"density {self.density:.3g} over {len(rows) - 1} sites")


def _by_channel(site: Site, kept: Tensor) -> Tensor:
    """Return shape (samples and positions, channels)."""
    if kept.dim() < 2:
        return kept.reshape(1, -1)
    dim = site.channel_dim if site.channel_dim is not None else 1 if kept.dim() > 3 else -1
    return kept.movedim(dim, -1).flatten(0, -2)


@contextmanager
def watch(model: nn.Module, *, every: int | None = None) -> Iterator[Watch]:
    """Record what the gates of a wrapped model do in the forward passes inside the block.

    Args:
        model: a wrapped model, in eager mode.
        every: look only at each so-many-th forward pass of the whole model in train mode, the first one included: for
            a block around a whole training. At 100 that costs less than 1 % of a step; the passes between cost
            nothing. ``None``: look at every pass, in any mode.

    Yields:
        A ``Watch``; read it during or after the block.

    Raises:
        NotWrappedError: the model is not wrapped.
        PolicyError: ``every`` is not a whole number of at least 1.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 2)))
    >>> regimewrap.gate_of(model).set_keep_ratio(0.25)
    >>> with regimewrap.watch(model, every=2) as seen:
    ...     for _ in range(5):
    ...         y = model(torch.randn(3, 4))
    >>> [(sample.forward, sample.density) for sample in seen.over_time["1"]]
    [(0, 0.25), (2, 0.25), (4, 0.25)]
    """
    gate, seen = gate_of(model), Watch()
    if every is None:
        looking = _looking(gate, seen)
    else:
        looking = _sampling(gate, seen, whole_number("every", every), gate.root or model)
    with looking:
        yield seen


@contextmanager
def _looking(gate: TopKGate, seen: Watch) -> Iterator[None]:
    gate.observers.append(seen)
    try:
        yield
    finally:
        gate.observers.remove(seen)


@contextmanager
def _sampling(gate: TopKGate, seen: Watch, every: int, root: nn.Module) -> Iterator[None]:
    """Look at some passes of ``root``; a gate that nothing looks at does no more than select."""
    block, passes = ExitStack(), itertools.count()

    def before(module: nn.Module, _: Any) -> None:
        if module.training:
            seen.forward = next(passes)
            if seen.forward % every == 0:
                seen.fetch()  # of the look before, which the device has long done
                block.enter_context(_looking(gate, seen))

    def after(*_: Any) -> None:
        block.close()

    hooks = [root.register_forward_pre_hook(before), root.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        block.close()
        for hook in hooks:
            hook.remove()
