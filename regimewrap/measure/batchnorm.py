"""Which budget BatchNorm's running statistics belong to: one they were recalibrated for, or a mix from training."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from regimewrap.gate.gate import TopKGate, gate_of
from regimewrap.torch_private import BatchNorm

# The budget of the last recalibration, and how many batches the layers had seen by then.
_RECALIBRATED: weakref.WeakKeyDictionary[TopKGate, tuple[float, int]] = weakref.WeakKeyDictionary()


def layers_with_statistics(model: nn.Module) -> list[BatchNorm]:
    """Return a model's BatchNorm layers that track running statistics."""
    return [each for each in model.modules() if isinstance(each, BatchNorm) and each.running_mean is not None]


def remember(model: nn.Module, keep_ratio: float) -> None:
    """Take note that a wrapped model's statistics now belong to one budget."""
    _RECALIBRATED[gate_of(model)] = keep_ratio, _batches(layers_with_statistics(model))


def of_another_budget(model: nn.Module, keep_ratios: Iterable[float]) -> str | None:
    """Return what to say if the statistics do not belong to each of these budgets; ``None`` if all is well.

    Args:
        model: a wrapped model.
        keep_ratios: at which it is evaluated.
    """
    layers = layers_with_statistics(model)
    if not layers:
        return None
    gate, seen = gate_of(model), _batches(layers)
    recalibrated, then = _RECALIBRATED.get(gate, (None, -1))
    mixed = gate.budget.settled.update > 0 and gate.policy.cycle.strategy.kind != "dense"
    home = recalibrated if then == seen else None if mixed else 1.0
    strange = [ratio for ratio in keep_ratios if ratio != home]
    if not strange:
        return None
    taken = "over a mix of budgets in training" if home is None else f"at keep ratio {home:g}"
    return (
        f"{type(model).__name__} has BatchNorm, whose running statistics were taken {taken}, and is evaluated at "
        f"{', '.join(f'{ratio:g}' for ratio in strange)}. Re-estimate them for the budget first, with "
        f"regimewrap.recalibrate_batchnorm(model, loader, {strange[0]:g})."
    )


def _batches(layers: Iterable[BatchNorm]) -> int:
    return sum(int(each.num_batches_tracked) for each in layers if each.num_batches_tracked is not None)
