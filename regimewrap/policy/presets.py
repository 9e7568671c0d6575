"""The ready cycles by their names, and the rule that fits one to the length of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from regimewrap.errors import PolicyError
from regimewrap.files import nearest, shown
from regimewrap.policy.parts import CyclePolicy
from regimewrap.policy.settings import whole_number
from regimewrap.policy.strategies import Dense, EmaRelax, EmaReset, Sawtooth, Spread

if TYPE_CHECKING:
    from collections.abc import Callable

#: The names of the presets, for editors and type checkers.
PresetName = Literal["mixed", "sawtooth", "loss-reset", "accuracy-reset", "accuracy-relax", "dense"]
#: The same at run time; the first is the default.
PRESETS: tuple[PresetName, ...] = get_args(PresetName)

#: Optimizer updates of the method's own run: 500 epochs of 391 batches.
METHOD_STEPS = 195_500
#: About so many cycles fit a run; a guarded cycle gets no larger share of it.
CYCLES = 12

_ACCURACY: dict[str, Any] = {"monitor": "accuracy", "mode": "max", "tolerance_kind": "absolute"}
_WARMED: dict[str, Any] = {"scaled_to": "run", "warmup": METHOD_STEPS // 20}
# The published controllers end no cycle and begin at once.
_PUBLISHED: dict[str, Any] = {"scaled_to": "run", "full_share": 0, "guarded": False}

# Built when asked for, which keeps `import regimewrap` quick.
_PRESETS: dict[str, Callable[[], CyclePolicy]] = {
    "mixed": lambda: CyclePolicy(strategy=Spread()),
    "sawtooth": lambda: CyclePolicy(strategy=Sawtooth(floor=0.05), scaled_to="run"),
    "loss-reset": lambda: CyclePolicy(strategy=EmaReset(floor=0.05), **_WARMED),
    "accuracy-reset": lambda: CyclePolicy(strategy=EmaReset(floor=0.05), smoothing=0.5, **_WARMED, **_ACCURACY),
    "accuracy-relax": lambda: CyclePolicy(strategy=EmaRelax(floor=0.05), every=50, **_WARMED, **_ACCURACY),
    "dense": lambda: CyclePolicy(strategy=Dense()),
}
_AS_PUBLISHED: dict[str, Callable[[], CyclePolicy]] = {
    "accuracy-reset": lambda: CyclePolicy(strategy=EmaReset(), smoothing=0.5, **_PUBLISHED, **_ACCURACY),
    "accuracy-relax": lambda: CyclePolicy(strategy=EmaRelax(), every=50, **_PUBLISHED, **_ACCURACY),
}


def preset(name: object, full_share: float | None = None) -> CyclePolicy:
    """Return the cycle of a preset, not yet scaled; see ``RegimePolicy.preset``.

    Raises:
        PolicyError: no preset has that name, or ``full_share`` is outside [0, 1).
    """
    if not isinstance(name, str) or name not in _PRESETS:
        raise PolicyError(f"preset must be one of {', '.join(PRESETS)}; got {shown(name)}.{nearest(name, PRESETS)}")
    if full_share is None:
        return _PRESETS[name]()
    cycle = _PRESETS[name]().replace(full_share=full_share)
    return _AS_PUBLISHED[name]() if cycle.full_share == 0 and name in _AS_PUBLISHED else cycle


def for_run(cycle: CyclePolicy, total_steps: int | None) -> CyclePolicy:
    """Return a cycle with the numbers that a run of so many updates uses.

    Args:
        cycle: any; one that has been scaled already must have been scaled to this length.
        total_steps: optimizer updates of the whole run; ``None`` if that is not known.

    Raises:
        PolicyError: the cycle needs a length and there is none, it is scaled to another, or ``total_steps`` is not a
            whole number of at least 1.
    """
    steps = None if total_steps is None else whole_number("total_steps", total_steps)
    if cycle.scaled_to == "run":
        if steps is None:
            raise PolicyError(
                f"a policy with the strategy {cycle.strategy.kind!r} and scaled_to='run' needs the length of the run: "
                "pass total_steps=N, the optimizer updates of the whole run (epochs × updates an epoch), or take its "
                "numbers as they are with cycle.scaled_to=None. The preset mixed needs no length."
            )
        return _scaled(cycle, steps)
    if cycle.scaled_to is not None and steps is not None and cycle.scaled_to != steps:
        raise PolicyError(
            f"the policy is scaled to a run of {cycle.scaled_to} updates; got total_steps={steps}. Leave total_steps "
            f"out, or begin from the preset: RegimeCycler(model, preset, total_steps={steps})."
        )
    return cycle


def _scaled(cycle: CyclePolicy, total_steps: int) -> CyclePolicy:
    """Apply the rule that ``RegimePolicy.preset`` states, in whole numbers so that no length is too long."""
    every = max(8, (cycle.every * total_steps + METHOD_STEPS // 2) // METHOD_STEPS)
    every = max(1, min(every, total_steps // (CYCLES * 8)))
    decisions = max(1, total_steps // (CYCLES * every))
    warmup = cycle.warmup * total_steps // METHOD_STEPS
    strategy = cycle.strategy.rescaled(decisions)
    return cycle.replace(every=every, strategy=strategy, warmup=warmup, scaled_to=total_steps)
