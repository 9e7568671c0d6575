"""Moves the keep ratio: smooths the signal, asks the strategy, sets the gates, remembers.

All running state of a cycle is here, and in one small dict when it is saved. The rules themselves are in
``strategies``; which units a ratio keeps is in ``topk``. Nothing here touches a model beyond its gate's ratio.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regimewrap.cycle import ranks
from regimewrap.cycle.state import LARGEST, Decision, Histogram, Regime, Saved, Share, State, plain, restored
from regimewrap.cycle.threshold import end_step
from regimewrap.errors import PolicyError, SignalError
from regimewrap.files import shown
from regimewrap.gate.gate import TopKGate, gate_of
from regimewrap.gate.network import NetworkThreshold
from regimewrap.policy.policy import CyclePolicy, RegimePolicy
from regimewrap.policy.settings import percent_hint
from regimewrap.policy.strategies import EVENTS, Move, Situation

if TYPE_CHECKING:
    from collections.abc import Sequence


class RegimeCycler:
    """Drives the keep ratio of a wrapped model: call ``step`` once per optimizer update, after it.

    Between two decisions a step only stores its value: no device is waited for and no rank is asked. At a decision
    the stored values are fetched in one transfer, smoothed in Python floats and averaged over ranks (one all-reduce);
    rank 0's decision is broadcast, so that all ranks hold the same ratio, bit for bit. Strategies that need no signal
    do none of this. The best value, from which a fall is measured, is the best of all decisions: in between, no rank
    knows the mean.

    ``copy.deepcopy((model, cycler))``, in this order, gives a copied model with a cycler of its own; the same goes for
    pickle. A cycler copied by itself goes on driving whatever its gates belong to; for another model use
    ``state_dict``.
    """

    def __init__(self, model_or_gate: nn.Module | TopKGate, policy: RegimePolicy | CyclePolicy | None = None) -> None:
        """Take over a wrapped model's keep ratio and set it to where the strategy starts.

        Args:
            model_or_gate: a wrapped model, anything around one, or its gate.
            policy: how to cycle; by default the policy that the model was wrapped with.

        Raises:
            NotWrappedError: there is no wrapped model.
            PolicyError: ``policy`` is not a policy.
        """
        gate = _gate(model_or_gate)
        policy = gate.policy if policy is None else policy
        if not isinstance(policy, RegimePolicy | CyclePolicy):
            raise PolicyError(
                f"policy must be a RegimePolicy or a CyclePolicy; got {shown(policy)}. "
                "For a preset or a file, pass RegimePolicy.preset(name) or RegimePolicy.from_file(path)."
            )
        self.policy: CyclePolicy = policy.cycle if isinstance(policy, RegimePolicy) else policy
        self._gates = [gate]
        self._met = False  # whether the ranks have come together at the end of a step
        self._take(State.at_start(self.policy), updates=0, pending=[], history=[])

    @property
    def keep_ratio(self) -> float:
        """The keep ratio for the next forward pass, in (0, 1]."""
        return self._state.keep_ratio

    @property
    def history(self) -> list[Decision]:
        """Every decision so far, oldest first, in a new list."""
        return list(self._history)

    @property
    def updates(self) -> int:
        """Optimizer updates so far."""
        return self._updates

    @property
    def skipped(self) -> int:
        """Values of this rank left out because they were not finite (or beyond ±1e300), as of the last decision."""
        return self._state.skipped

    def bind(self, model: nn.Module | TopKGate) -> None:
        """Drive one more wrapped model, such as an averaged copy for evaluation, from now on.

        Raises:
            NotWrappedError: the model is not wrapped.
        """
        gate = _gate(model)
        gate.set_keep_ratio(self.keep_ratio)
        if all(gate is not known for known in self._gates):
            if gate.network is not None and self._networks:
                gate.network.take(self._networks[0].histogram)
            self._gates.append(gate)

    def step(self, loss: Tensor | float | None = None, **metrics: Tensor | float) -> Regime:
        """Count one optimizer update and, when a decision is due, decide.

        Args:
            loss: this update's training loss: a number, or a tensor of one element on any device.
            **metrics: other values of this update, in the same form, such as ``accuracy`` as a fraction. Only the one
                that the policy monitors is looked at.

        Returns:
            What is in force from the next forward pass on.

        Raises:
            SignalError: the monitored value is missing, or is not one real number; or, found when a decision is due,
                an accuracy is above 1, or a value is not finite and the policy says ``on_nonfinite="raise"``. The
                cycler is as it was.
            SyncError: found when a decision is due: the ranks differ in policy or in where they are, or one of them
                does not come before the process group's timeout; the message names it.
        """
        value = self._checked(loss, metrics) if self.policy.strategy.needs_signal else None
        if (self._updates + 1) % self.policy.every == 0:
            regime = self._decide(value)
        else:
            if value is not None:
                self._pending.append(value)
            self._updates += 1
            regime = self._between
        if self._networks:
            end_step(self._networks, self._updates, meet=not self._met)
            self._met = True
        return regime

    def check_sync(self) -> None:
        """Check that all ranks have the same policy, the same sites, and are at the same point of the cycle.

        All ranks must call this. Ranks agree without it; it finds out before the first decision what would fail there,
        such as a checkpoint that was loaded on some ranks only. Without several ranks it does nothing.

        Raises:
            SyncError: the message says which ranks have what, or which one does not answer.
        """
        ranks.require_same(
            {
                **self._place(),
                **_flat("cycle", self.policy.model_dump(mode="json")),
                **_flat("gate", self._gates[0].policy.gate.model_dump(mode="json")),
                "sites": [site.name for site in self._gates[0].sites],
            },
            "check_sync",
            self._updates,
        )

    def state_dict(self, *, all_ranks: bool = False) -> dict[str, Any]:
        """Return all running state as plain JSON types, also between two decisions.

        Args:
            all_ranks: include what each of the other ranks alone remembers; all ranks must call this. Between two
                decisions each rank has values of its own that wait for the next one. With them, one file that rank 0
                writes resumes every rank exactly; else each rank's own state does.

        Raises:
            SyncError: ``all_ranks``, and one of them does not answer.
        """
        pending = [value if math.isfinite(value) else None for value in _fetched(self._pending)]
        shares = None
        if all_ranks and ranks.world_size() > 1:
            shares = ranks.gathered(Share(pending, self.skipped), "state_dict", self._updates)
        policy = self.policy.model_dump(mode="json")
        histogram = Histogram.of(self._networks[0].histogram) if self._networks else None
        return plain(Saved(1, policy, self._updates, pending, self._state, self._history, shares, histogram))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, exactly as if the run had never stopped, and set the gates.

        Args:
            state: from ``state_dict``, or the same after a way through JSON. If all ranks saved it together, each
                takes its own part; if they were more or fewer then, each takes the mean.

        Raises:
            StateError: it belongs to another policy or version, or is damaged. The cycler is as it was.
        """
        saved = restored(state, self.policy, network=bool(self._networks))
        share = saved.share(ranks.rank(), ranks.world_size())
        pending = [math.nan if value is None else value for value in share.pending]
        state_here = replace(saved.state, skipped=share.skipped)
        self._take(state_here, updates=saved.updates, pending=pending, history=saved.history)
        if saved.network is not None:
            for each in self._networks:
                each.take(saved.network.tensor())

    @property
    def _networks(self) -> list[NetworkThreshold]:
        return [gate.network for gate in self._gates if gate.network is not None]

    def _take(self, state: State, *, updates: int, pending: Sequence[Tensor | float], history: list[Decision]) -> None:
        for gate in self._gates:
            gate.set_keep_ratio(state.keep_ratio)
        self._state, self._updates, self._pending, self._history = state, updates, list(pending), history
        self._between = Regime(state.keep_ratio, state.phase, state.cycle, None)

    def _checked(self, loss: object, metrics: dict[str, Any]) -> Tensor | float:
        name = self.policy.monitor
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
            raise SignalError(f"the policy monitors {name!r}, which is missing: call {call}.")
        raise SignalError(f"{name} must be a number or a tensor of one element; got {shown(value)}.")

    def _decide(self, value: Tensor | float | None) -> Regime:
        number, updates = len(self._history), self._updates + 1
        state, signal = (self._state, None) if value is None else self._observe(value)
        move = self._move(state, signal, number)
        rose = move.event in ("relax", "reset")
        state = replace(
            state,
            keep_ratio=move.keep_ratio,
            phase="recover" if rose else "compress" if move.event == "compress" else state.phase,
            cycle=state.cycle + (move.keep_ratio > state.keep_ratio),
            last_raise=number if rose else state.last_raise,
            held=state.held + 1 if move.event == "hold" else 0,
        )
        record = Decision(updates, state.keep_ratio, signal, state.best, state.phase, move.event, state.cycle)
        first_skips = state.skipped if self._state.skipped == 0 else 0
        self._take(state, updates=updates, pending=[], history=self._history)
        self._history.append(record)
        if first_skips:
            warnings.warn(
                f"{first_skips} of the last {self.policy.every} values of {self.policy.monitor} were not finite and "
                "are left out; RegimeCycler.skipped goes on counting, this warning is not repeated.",
                RuntimeWarning,
                stacklevel=3,
            )
        return self._between._replace(event=move.event)

    def _observe(self, value: Tensor | float) -> tuple[State, float | None]:
        """Return the state with the pending values and the last one smoothed in, and the signal over all ranks."""
        name, smoothing = self.policy.monitor, self.policy.smoothing
        smoothed, skipped, seen, problem = self._state.smoothed, self._state.skipped, False, None
        for number, new in enumerate(_fetched([*self._pending, value]), self._updates + 1 - len(self._pending)):
            if not abs(new) <= LARGEST:  # NaN compares false
                skipped += 1
                if self.policy.on_nonfinite == "raise":
                    problem = problem or f"{name} was {new} at update {number}; expected a finite number."
                continue
            if new > 1.001 and name in ("accuracy", "acc"):  # the rest is rounding in a weighted mean
                hint = percent_hint(name, new)
                problem = problem or f"{name} must be a fraction in [0, 1]; got {new:g} at update {number}.{hint}"
            smoothed = new if smoothed is None else smoothing * smoothed + (1 - smoothing) * new
            seen = True
        mine, update = (smoothed if seen else None), self._updates + 1
        signal, refused, alike = ranks.mean(mine, problem is not None, repr((self._place(), self.policy)), update)
        if not alike:
            self.check_sync()
        if refused:
            raise SignalError(problem or f"another rank refused its {name} at update {update} or before.")
        if signal is None:
            return replace(self._state, skipped=skipped), None
        better = max if self.policy.mode == "max" else min
        best = signal if self._state.best is None else better(self._state.best, signal)
        first = signal if self._state.first is None else self._state.first
        return replace(self._state, smoothed=signal, skipped=skipped, first=first, best=best), signal

    def _move(self, state: State, signal: float | None, number: int) -> Move:
        strategy = self.policy.strategy
        if signal is None and strategy.needs_signal:  # nothing to go by
            return Move(state.keep_ratio, "hold")
        move = strategy.next_move(
            Situation(
                keep_ratio=state.keep_ratio,
                signal=signal,
                best=state.best,
                fall=0.0 if signal is None else self._fall(state, signal),
                decision=number,
                since_raise=None if state.last_raise is None else number - state.last_raise,
                held=state.held,
            )
        )
        if not (isinstance(move, Move) and isinstance(move.keep_ratio, Real) and 0 < move.keep_ratio <= 1):
            raise PolicyError(f"strategy {strategy.kind!r} must return a Move to a ratio in (0, 1]; got {shown(move)}.")
        if move.event not in EVENTS:
            raise PolicyError(f"strategy {strategy.kind!r} must name one of {EVENTS}; got {shown(move.event)}.")
        if not strategy.needs_signal:
            return Move(float(move.keep_ratio), move.event)
        keep_ratio, event = ranks.from_rank_0((move.keep_ratio, EVENTS.index(move.event)), self._updates + 1)
        return Move(keep_ratio, EVENTS[int(event)])

    def _place(self) -> dict[str, object]:
        """Return where in the cycle we are, as far as it must be the same on all ranks."""
        state = self._state
        return {
            "update": self._updates,
            "keep ratio": float(self._gates[0].keep_ratio),
            "phase": state.phase,
            "cycle": state.cycle,
            "held": state.held,
            "last raise": state.last_raise,
        }

    def _fall(self, state: State, signal: float) -> float:
        """Return how far the signal is behind its best, in the unit of the tolerance."""
        assert state.best is not None  # noqa: S101 - it is set with the signal
        assert state.first is not None  # noqa: S101
        fall = abs(signal - state.best)
        if self.policy.tolerance_kind == "absolute" or fall == 0:
            return fall
        unit = abs(state.best if self.policy.tolerance_kind == "relative" else state.first - state.best)
        return fall / unit if unit > 0 else math.inf


def _gate(model_or_gate: nn.Module | TopKGate) -> TopKGate:
    return model_or_gate if isinstance(model_or_gate, TopKGate) else gate_of(model_or_gate)


def _fetched(values: Sequence[Tensor | float]) -> list[float]:
    """Return the values as floats, with one transfer for each device and dtype among them."""
    fetched = [0.0] * len(values)
    tensors: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            tensors[value.device, value.dtype].append(place)
        else:
            fetched[place] = value
    for places in tensors.values():
        stacked = torch.stack([value for place in places if isinstance(value := values[place], Tensor)])
        for place, number in zip(places, stacked.tolist(), strict=True):
            fetched[place] = float(number)
    return fetched


def _flat(name: str, value: object) -> dict[str, object]:
    """Return nested settings as one level, by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {path: each for key, inner in value.items() for path, each in _flat(f"{name}.{key}", inner).items()}
