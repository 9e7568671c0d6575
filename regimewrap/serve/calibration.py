"""Fixed thresholds in place of the selection, for inference: find them, put them on a model, report what they cost.

Only evaluates: no training, and nothing here decides what a gate keeps. A threshold is fitted to what the gate's own
selection keeps of the same inputs.
"""

from __future__ import annotations

import bisect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self, SupportsFloat, final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from regimewrap.errors import DataError, PolicyError, StateError
from regimewrap.files import Table, Tabled, write_whole
from regimewrap.gate.gate import Site, TopKGate, at_keep_ratio, gate_of
from regimewrap.measure.sweep import metric, modes_restored, run_batch
from regimewrap.measure.telemetry import watch
from regimewrap.policy.policy import require_ratio
from regimewrap.serve.comparison import CalibrationReport, Comparison
from regimewrap.serve.histogram import Recorder
from regimewrap.sites.probe import untouched

#: The budgets that are calibrated unless others are asked for: even steps on a logarithmic axis, more or less.
KEEP_RATIOS = (1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SiteCurve(_Record):
    """One site's thresholds, one for each calibrated keep ratio; empty if the site never ran."""

    name: str
    multiplier: float
    channel_dim: int | None
    thresholds: tuple[float, ...]


@final
class Calibration(Tabled, _Record):
    """Each site's curve of thresholds over the keep ratio. Prints as a table; ``calibrate`` makes it.

    Attributes:
        model: class name of the model that it was made on.
        scope: these four are the gate's settings that the thresholds depend on; see ``GatePolicy``.
        keep_ratios: the calibrated budgets, from the smallest to the largest.
        sites: the curve of each gated site, in the order of the plan.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 2)))
    >>> regimewrap.calibrate(model, [torch.randn(64, 4)], keep_ratios=(0.2, 0.1)).keep_ratios
    (0.1, 0.2)
    """

    schema_version: Literal[1] = 1
    model: str
    scope: str
    score: Literal["magnitude", "value"]
    relative_to: str
    ties: str
    keep_ratios: Annotated[tuple[float, ...], Field(min_length=1)]
    sites: tuple[SiteCurve, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        ratios = self.keep_ratios
        if list(ratios) != sorted(set(ratios)) or not 0.0 < ratios[0] <= ratios[-1] <= 1.0:
            raise ValueError("keep_ratios must rise, within (0, 1]")
        for site in self.sites:
            if len(site.thresholds) not in (0, len(ratios)):
                raise ValueError(f"{site.name} has {len(site.thresholds)} thresholds for {len(ratios)} keep ratios")
        return self

    def thresholds(self, keep_ratio: float) -> dict[str, float]:
        """Return the threshold of each site that is cut at a budget; between calibrated ones they are interpolated.

        Args:
            keep_ratio: a fraction in (0, 1]; at 1 nothing is cut.

        Raises:
            PolicyError: the ratio is outside (0, 1], or outside what was calibrated.
        """
        ratio = require_ratio("keep_ratio", keep_ratio)
        if ratio == 1.0:
            return {}
        if not self.keep_ratios[0] <= ratio <= self.keep_ratios[-1]:
            raise PolicyError(
                f"calibrated are keep ratios from {self.keep_ratios[0]:g} to {self.keep_ratios[-1]:g}; got {ratio:g}. "
                f"Ask for one of these, or pass keep_ratios=({ratio:g}, ...) to calibrate."
            )
        cuts = {site.name: _between(self.keep_ratios, site.thresholds, ratio) for site in self.sites if site.thresholds}
        # A magnitude is never below zero, so these sites have nothing to do.
        return {name: cut for name, cut in cuts.items() if self.score == "value" or cut > 0.0}

    def apply(self, model: nn.Module, keep_ratio: float) -> Applied:
        """Let a wrapped model cut at fixed thresholds, in train and eval mode, until that is taken back.

        The model then runs standard operations only: ``torch.export``, ONNX and ``torch.compile`` take it as it is.
        ``at_keep_ratio`` and ``sweep`` select as ever; ``unwrap`` removes the thresholds too; copies keep them.

        Args:
            model: the wrapped model that was calibrated, or one with the same sites and policy.
            keep_ratio: a fraction in (0, 1]; at 1 nothing is cut.

        Returns:
            A handle: ``remove()`` takes the thresholds back, and so does the end of a ``with`` block around it.

        Raises:
            NotWrappedError: the model is not wrapped.
            PolicyError: the ratio is outside what was calibrated.
            StateError: the model has other sites, or gates by other rules.
        """
        gate = gate_of(model)
        self._check(gate, type(model).__name__)
        handle = Applied(gate)
        gate.set_thresholds(self.thresholds(keep_ratio))
        return handle

    def report(
        self,
        model: nn.Module,
        evaluate: Callable[[nn.Module], SupportsFloat],
        keep_ratios: Iterable[float] = (1.0, 0.5, 0.2, 0.1),
    ) -> CalibrationReport:
        """Compare thresholds with selection: the density reached, and a metric, at several budgets.

        Args:
            model: the wrapped model; it is evaluated in eval mode, without gradients and not compiled, and afterwards
                it is as it was.
            evaluate: takes the model, returns a number such as the accuracy on data that did not calibrate.
            keep_ratios: fractions in (0, 1], evaluated in this order.

        Raises:
            NotWrappedError: the model is not wrapped.
            PolicyError: there is no ratio, or one is outside what was calibrated.
            StateError: the model has other sites, or gates by other rules.
            WrapError: ``evaluate`` returned something other than a number.
        """
        self._check(gate_of(model), type(model).__name__)
        ratios = [require_ratio("keep_ratios", ratio) for ratio in keep_ratios]
        if not ratios:
            raise PolicyError("keep_ratios must hold at least one fraction in (0, 1]; got none.")
        for ratio in ratios:
            self.thresholds(ratio)
        rows = []
        with modes_restored(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            for ratio in ratios:
                with at_keep_ratio(model, ratio), watch(model) as selected:
                    value_selected = metric(evaluate(model))
                with self.apply(model, ratio), watch(model) as fixed:
                    value_fixed = metric(evaluate(model))
                rows.append(Comparison(ratio, selected.density, fixed.density, value_selected, value_fixed))
        return CalibrationReport(tuple(rows))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write plain JSON, whole or not at all.

        Raises:
            DataError: the file cannot be written.
        """
        write_whole(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the calibration that ``save`` wrote.

        Raises:
            DataError: the file cannot be read.
            StateError: it holds something else, or is damaged.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise StateError(f"{path} is not a calibration: {where + ': ' if where else ''}{first['msg']}.") from None

    def __repr__(self) -> str:
        low, high = self.keep_ratios[0], self.keep_ratios[-1]
        return f"Calibration({self.model!r}, keep ratios {low:g} to {high:g}, sites={len(self.sites)})"

    def _table(self) -> Table:
        low, high = self.keep_ratios[0], self.keep_ratios[-1]
        shown = [ratio for ratio in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01) if low <= ratio <= high] or [low]
        rows = [("site", *(f"{ratio:g}" for ratio in shown))]
        for site in self.sites:
            values = [f"{_between(self.keep_ratios, site.thresholds, ratio):.4g}" for ratio in shown if site.thresholds]
            rows.append((site.name, *(values or ["never ran"])))
        return Table(rows, f"{self.model}: thresholds by keep ratio")

    def _check(self, gate: TopKGate, name: str) -> None:
        """Refuse a model whose gate this calibration does not describe."""
        rule = gate.policy.gate
        there = _described(rule.scope, rule.score, rule.relative_to, rule.ties, gate.sites)
        here = _described(self.scope, self.score, self.relative_to, self.ties, self.sites)
        both = [key for key in {**here, **there} if here.get(key) != there.get(key)]
        if both:
            lines = [f"{key}: {here.get(key, 'no such site')} / {there.get(key, 'no such site')}" for key in both[:4]]
            more = f"; and {len(both) - 4} more" if len(both) > 4 else ""
            raise StateError(
                f"this calibration of {self.model} is for another model or policy than this {name} (calibrated / "
                f"here): {'; '.join(lines)}{more}. Calibrate this one."
            )


class Applied:
    """Thresholds on a model, until ``remove`` or the end of a ``with`` block."""

    def __init__(self, gate: TopKGate) -> None:
        self._gate, self._before = gate, gate.thresholds

    def remove(self) -> None:
        """Let the gate do what it did before."""
        self._gate.thresholds = self._before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def calibrate(model: nn.Module, loader: Iterable[Any], keep_ratios: Iterable[float] = KEEP_RATIOS) -> Calibration:
    """Find, for each site and budget, the fixed threshold that keeps as many units as the gate's selection does.

    Each batch runs once for each budget, forwards only. On the way every site is cut at the threshold found so far, so
    that the sites behind it are fitted to what they will be given when thresholds are in force.

    Args:
        model: a wrapped model. It runs in eval mode and without gradients; afterwards its modes, buffers, keep ratio
            and torch's random number generators are as they were, also on an error.
        loader: batches as for ``recalibrate_batchnorm``, iterated once. A few hundred samples are enough. On several
            ranks calibrate on one and load the result on the others.
        keep_ratios: the budgets, fractions in (0, 1]; between them thresholds are interpolated over the logarithm of
            the ratio. Name the one that will be served to have it exact.

    Returns:
        The curves. Memory does not grow with the number of batches.

    Raises:
        NotWrappedError: the model is not wrapped.
        PolicyError: there is no ratio, or one is outside (0, 1].
        DataError: the loader gave no batch or one of another kind, no gated site ran, or an activation was not finite.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 2)))
    >>> curves = regimewrap.calibrate(model, [torch.randn(64, 4)], keep_ratios=(0.2, 0.1))
    >>> sorted(curves.thresholds(0.1))
    ['1']
    """
    gate = gate_of(model)
    rule = gate.policy.gate
    ratios = sorted({require_ratio("keep_ratios", ratio) for ratio in keep_ratios})
    if not ratios:
        raise PolicyError("keep_ratios must hold at least one fraction in (0, 1]; got none.")
    recorders = {ratio: Recorder(rule.score) for ratio in ratios}
    batches = 0
    with untouched(model), modes_restored(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        for batch in loader:
            for ratio, recorder in recorders.items():
                recorder.batch = batches
                with at_keep_ratio(model, ratio), _recording(gate, recorder):
                    run_batch(model, batch, _device(model))
            batches += 1
    if batches == 0:
        raise DataError("the loader gave no batch; calibrate needs at least one.")
    return Calibration(
        model=type(model).__name__,
        scope=rule.scope,
        score=rule.score,
        relative_to=rule.relative_to,
        ties=rule.ties,
        keep_ratios=tuple(ratios),
        sites=tuple(_curve(site, recorders) for site in _that_ran(gate.sites, recorders.values(), batches)),
    )


@contextmanager
def _recording(gate: TopKGate, recorder: Recorder) -> Iterator[None]:
    gate._recorder = recorder
    try:
        yield
    finally:
        gate._recorder = None


def _device(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _that_ran(sites: Sequence[Site], recorders: Iterable[Recorder], batches: int) -> Sequence[Site]:
    """Warn of sites that never ran, or refuse if that is all."""
    ran = {name for recorder in recorders for name in recorder.seen}
    idle = [site.name for site in sites if site.name not in ran]
    if len(idle) == len(sites):
        raise DataError(f"no gated site ran in {batches} batches, so there is nothing to calibrate.")
    if idle:
        more = f" and {len(idle) - 8} more" if len(idle) > 8 else ""
        warnings.warn(
            f"{len(idle)} of {len(sites)} sites never ran and have no threshold, so they stay as they are: "
            f"{', '.join(idle[:8])}{more}.",
            stacklevel=3,
        )
    return sites


def _curve(site: Site, recorders: dict[float, Recorder]) -> SiteCurve:
    seen = {ratio: each.threshold(site.name) for ratio, each in recorders.items() if site.name in each.seen}
    # An expert of a mixture may have been called at some budgets only.
    points, values = tuple(seen), tuple(seen.values())
    thresholds = tuple(_between(points, values, ratio) for ratio in recorders) if seen else ()
    return SiteCurve(name=site.name, multiplier=site.multiplier, channel_dim=site.channel_dim, thresholds=thresholds)


def _between(ratios: Sequence[float], values: Sequence[float], ratio: float) -> float:
    """Interpolate over the logarithm of the ratio; beyond the ends, return the last value."""
    right = bisect.bisect_left(ratios, ratio)
    if right == len(ratios) or right == 0:
        return values[min(right, len(ratios) - 1)]
    low, high = ratios[right - 1], ratios[right]
    share = math.log(ratio / low) / math.log(high / low)
    return values[right - 1] + share * (values[right] - values[right - 1]) if share < 1.0 else values[right]


def _described(
    scope: str, score: str, relative_to: str, ties: str, sites: Iterable[Site | SiteCurve]
) -> dict[str, str]:
    """Say in words what thresholds depend on."""
    places = {site.name: f"multiplier {site.multiplier:g}, channel dimension {site.channel_dim}" for site in sites}
    return {
        "gate.scope": scope,
        "gate.score": score,
        "gate.relative_to": relative_to,
        "gate.ties": ties,
        **{f"site {name}": place for name, place in places.items()},
    }
