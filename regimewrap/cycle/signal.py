"""The monitored signal: what may come in, how values wait without waiting for a device, and how a fall is measured."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regimewrap.cycle.state import ACCURACIES, LARGEST, State
from regimewrap.errors import SignalError
from regimewrap.files import shown
from regimewrap.policy.settings import percent_hint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regimewrap.policy.policy import CyclePolicy


def checked(name: str, loss: object, metrics: dict[str, Any]) -> Tensor | float:
    """Return the value that a policy monitors, kept apart from what the loop does with it; no device is waited for.

    Args:
        name: what the policy monitors.
        loss: as passed to ``RegimeCycler.step``, like ``metrics``.
        metrics: by name.

    Raises:
        SignalError: it is missing, or is not one real number.
    """
    value = loss if name == "loss" else metrics.get(name)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            shape = tuple(value.shape)
            raise SignalError(f"{name} must be one number; got a tensor of shape {shape}: call .mean() on it.")
        if value.is_complex() or value.is_meta or value.dtype == torch.bool:
            raise SignalError(f"{name} must be a real number; got a {value.dtype} tensor on {value.device}.")
        # A copy, because loops may change the loss in place; and 0-d, because values are stacked.
        return value.detach().clone().reshape(())
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if value is None:
        call = "step(loss)" if name == "loss" else f"step(loss, {name}=...)"
        came = [each for each, given in {"loss": loss, **metrics}.items() if given is not None]
        got = f"; got {' and '.join(came)}" if came else ""
        raise SignalError(f"the policy monitors {name!r}, which is missing{got}: call {call}.")
    raise SignalError(f"{name} must be a number or a tensor of one element; got {shown(value)}.")


def fetched(values: Sequence[Tensor | float]) -> list[float]:
    """Return the values as floats, with one transfer for each device and dtype among them."""
    numbers = [0.0] * len(values)
    tensors: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            tensors[value.device, value.dtype].append(place)
        else:
            numbers[place] = value
    for places in tensors.values():
        stacked = torch.stack([value for place in places if isinstance(value := values[place], Tensor)])
        for place, number in zip(places, stacked.tolist(), strict=True):
            numbers[place] = float(number)
    return numbers


def problem_with(number: float, policy: CyclePolicy, update: int) -> str | None:
    """Return why a value cannot be taken in, or ``None``; one that is just left out is no problem."""
    name = policy.monitor
    if not abs(number) <= LARGEST:  # NaN compares false
        if policy.on_nonfinite == "skip":
            return None
        return f"{name} was {number} at update {update}; expected a finite number."
    if number > 1.001 and name in ACCURACIES:  # the rest is rounding in a weighted mean
        hint = percent_hint(name, number)
        return f"{name} must be a fraction in [0, 1]; got {number:g} at update {update}.{hint}"
    return None


def with_signal(state: State, signal: float, policy: CyclePolicy) -> State:
    """Return the state with a signal taken in: the smoothed value, the first, and the best, at this budget too."""
    better = max if policy.mode == "max" else min
    bests = list(state.bests)
    if policy.guarded:
        here = octave(state.keep_ratio)
        bests += [None] * (here + 1 - len(bests))
        before = bests[here]
        bests[here] = signal if before is None else better(before, signal)
    return replace(
        state,
        smoothed=signal,
        first=signal if state.first is None else state.first,
        best=signal if state.best is None else better(state.best, signal),
        bests=bests,
    )


def best_and_fall(state: State, signal: float, policy: CyclePolicy) -> tuple[float, float]:
    """Return the best that a signal is compared with, and how far it is behind it in the unit of the tolerance.

    Progress is measured on the best of all decisions, whatever their budget; it is how much has been learned.
    """
    assert state.first is not None  # noqa: S101 - it is set with the signal
    assert state.best is not None  # noqa: S101
    alike = state.bests[octave(state.keep_ratio)] if policy.guarded else state.best
    best = state.best if alike is None else alike
    fall = abs(signal - best)
    if policy.tolerance_kind == "absolute" or fall == 0:
        return best, fall
    unit = abs(best if policy.tolerance_kind == "relative" else state.first - state.best)
    return best, fall / unit if unit > 0 else math.inf


def octave(keep_ratio: float) -> int:
    """Return which octave of budgets a ratio is in: 0 for (1/2, 1], 1 for (1/4, 1/2], and so on.

    >>> [octave(ratio) for ratio in (1.0, 0.51, 0.5, 0.05)]
    [0, 0, 1, 4]
    """
    share, exponent = math.frexp(keep_ratio)
    return (1 if share == 0.5 else 0) - exponent
