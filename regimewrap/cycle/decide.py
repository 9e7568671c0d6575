"""One decision: the values since the last one become a signal, the strategy is asked, and the state moves on.

No gate is known here, and nothing is remembered: a state comes in and the next one goes out.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING

from regimewrap.cycle import ranks, signal
from regimewrap.cycle.state import LARGEST, Decision, State
from regimewrap.errors import PolicyError, SignalError
from regimewrap.files import shown
from regimewrap.policy.presets import CYCLES
from regimewrap.policy.strategies import EVENTS, Move, Situation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from regimewrap.policy.policy import CyclePolicy


class RefusedError(SignalError):
    """Some values, of this rank or another, cannot be taken in; ``places`` are those of this rank."""

    def __init__(self, message: str, places: set[int]) -> None:
        super().__init__(message)
        self.places = places


def decided(
    policy: CyclePolicy,
    state: State,
    values: Sequence[float] | None,
    updates: int,
    place: Mapping[str, object],
    compare: Callable[[], object],
) -> tuple[State, Decision]:
    """Return the state after a decision, and its record.

    Args:
        policy: how to cycle.
        state: at the last decision.
        values: of the updates since then, this one included; ``None`` for a strategy that needs no signal.
        updates: made before this one.
        place: where in the cycle we are, as it must be on all ranks.
        compare: raises with the difference if the ranks are not in one place.

    Raises:
        RefusedError: a value cannot be taken in.
        PolicyError: the strategy returned something else than a move.
        SyncError: the ranks differ, or one does not come.
    """
    number, before, now, said = updates // policy.every, state, updates + 1, None
    if values is not None:
        state, said = _observed(policy, state, values, now, place, compare)
    warm = now < policy.warmup
    in_warmup = max(0, policy.warmup - 1) // policy.every
    move = Move(1.0, "hold") if warm else next_move(policy, state, said, number - in_warmup, now)
    assert move.event is not None  # noqa: S101 - checked in next_move
    rose = move.event in ("relax", "reset")
    state = replace(
        state,
        keep_ratio=move.keep_ratio,
        phase="recover" if rose else "compress" if move.event == "compress" else state.phase,
        cycle=state.cycle + (move.keep_ratio > before.keep_ratio),
        last_raise=number if rose else state.last_raise,
        held=state.held + 1 if move.event == "hold" and not warm else 0,
        began=now if warm or move.event == "reset" else state.began,
    )
    return state, Decision(now, state.keep_ratio, said, state.best, state.phase, move.event, state.cycle)


def _observed(
    policy: CyclePolicy,
    state: State,
    values: Sequence[float],
    update: int,
    place: Mapping[str, object],
    compare: Callable[[], object],
) -> tuple[State, float | None]:
    """Return the state with the values smoothed in, and the signal over all ranks."""
    name, smoothed, skipped = policy.monitor, state.smoothed, state.skipped
    seen, problem, places = False, None, set()
    for number, new in enumerate(values):
        trouble = signal.problem_with(new, policy, update - len(values) + 1 + number)
        if trouble is not None:
            places.add(number)
            problem = problem or trouble
        if not abs(new) <= LARGEST:  # NaN compares false
            skipped += 1
            continue
        smoothed = new if smoothed is None else policy.smoothing * smoothed + (1 - policy.smoothing) * new
        seen = True
    mine = smoothed if seen else None
    said, refused, alike = ranks.mean(mine, problem is not None, repr((place, policy)), update)
    if not alike:
        compare()
    if refused:
        raise RefusedError(problem or f"another rank refused its {name} at update {update} or before.", places)
    state = replace(state, skipped=skipped)
    return (state, None) if said is None else (signal.with_signal(state, said, policy), said)


def next_move(policy: CyclePolicy, state: State, said: float | None, decision: int, update: int) -> Move:
    """Ask the strategy; on many ranks, return what it answered on rank 0.

    Args:
        policy: how to cycle.
        state: with the signal taken in.
        said: the signal; ``None`` without one.
        decision: decisions made before this one.
        update: this one.

    Raises:
        PolicyError: the strategy returned something else than a move.
        SyncError: a rank ended meanwhile.
    """
    strategy, length = policy.strategy, policy.scaled_to
    if said is None and strategy.needs_signal:  # nothing to go by
        return Move(state.keep_ratio, "hold")
    best, fall = (state.best, 0.0) if said is None else signal.best_and_fall(state, said, policy)
    if policy.guarded and state.keep_ratio == 1.0:
        fall = 0.0  # there is nothing to give back, and the gate is not what it comes from
    move = strategy.next_move(
        Situation(
            keep_ratio=state.keep_ratio,
            signal=said,
            best=best,
            fall=fall,
            decision=decision,
            since_raise=None if state.last_raise is None else (update - 1) // policy.every - state.last_raise,
            held=state.held,
            guarded=policy.guarded,
            overdue=isinstance(length, int) and CYCLES * (update - state.began) >= length,
        )
    )
    _require_ratio(strategy.kind, move)
    if move.event not in EVENTS:
        raise PolicyError(f"strategy {strategy.kind!r} must name one of {EVENTS}; got {shown(move.event)}.")
    if not strategy.needs_signal:
        return Move(float(move.keep_ratio), move.event)
    keep_ratio, event = ranks.from_rank_0((move.keep_ratio, EVENTS.index(move.event)), update)
    return Move(keep_ratio, EVENTS[int(event)])


def ratio_after(policy: CyclePolicy, keep_ratio: float, updates: int) -> float:
    """Ask a strategy that moves at each update for its ratio.

    Args:
        policy: how to cycle.
        keep_ratio: in force.
        updates: made so far, the warm-up's included.

    Raises:
        PolicyError: the strategy returned something else than a move.
    """
    if updates < policy.warmup:
        return 1.0
    move = policy.strategy.next_move(Situation(keep_ratio, None, None, 0.0, updates - policy.warmup, None, 0))
    _require_ratio(policy.strategy.kind, move)
    return move.keep_ratio


def _require_ratio(kind: str, move: object) -> None:
    number = isinstance(move, Move) and (type(move.keep_ratio) is float or isinstance(move.keep_ratio, Real))
    if not (number and 0 < move.keep_ratio <= 1):  # type: ignore[attr-defined]
        raise PolicyError(f"strategy {kind!r} must return a Move to a ratio in (0, 1]; got {shown(move)}.")
