"""Moves the keep ratio: smooths the signal, asks the strategy, sets the gates, remembers.

All running state of a cycle is here, and in one small dict when it is saved. The rules themselves are in
``strategies``; which units a ratio keeps is in ``topk``. Nothing here touches a model beyond its gate's budget.
"""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regimewrap.cycle import ranks, signal
from regimewrap.cycle.alarms import Alarms, other_driver, still_driven
from regimewrap.cycle.decide import RefusedError, decided, ratio_after
from regimewrap.cycle.state import Decision, Histogram, Regime, Saved, Share, State, plain, restored
from regimewrap.cycle.threshold import end_step
from regimewrap.cycle.view import View
from regimewrap.errors import PolicyError, StateError
from regimewrap.gate.gate import TopKGate, gate_of
from regimewrap.gate.network import NetworkThreshold
from regimewrap.policy.migrate import HISTORY
from regimewrap.policy.policy import CyclePolicy, PolicyLike, RegimePolicy
from regimewrap.policy.presets import for_run
from regimewrap.policy.settings import whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger("regimewrap")


class RegimeCycler(View):
    """Drives the keep ratio of a wrapped model: call ``step`` once per optimizer update, after it.

    Between two decisions a step only stores its value: no device is waited for and no rank is asked. At a decision
    the stored values are fetched in one transfer, smoothed in Python floats and averaged over ranks (one all-reduce);
    rank 0's decision is broadcast, so that all ranks hold the same ratio, bit for bit. Strategies that need no signal
    do none of this. A best value is one of a decision: in between, no rank knows the mean.

    A newer cycler of the same model takes over; the older one then refuses to step. Each reset is one line of the
    logger ``regimewrap``.

    ``copy.deepcopy((model, cycler))``, in this order, gives a copied model with a cycler of its own; the same goes for
    pickle. For another model use ``state_dict``.

    >>> import torch
    >>> from regimewrap import RegimeCycler, wrap
    >>> model = wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()))
    >>> cycler = RegimeCycler(model)
    >>> round(cycler.step().keep_ratio, 3)
    0.157
    """

    def __init__(
        self,
        model_or_gate: nn.Module | TopKGate,
        policy: CyclePolicy | PolicyLike | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Take over a wrapped model's keep ratio and set it to where the strategy starts.

        Args:
            model_or_gate: a wrapped model, anything around one, or its gate.
            policy: how to cycle: a policy, a preset's name, or the path of a policy file; by default the policy that
                the model was wrapped with.
            total_steps: optimizer updates of the whole run. Policies with ``scaled_to="run"`` are scaled to it, as
                ``RegimePolicy.preset`` says; the preset ``mixed`` needs none.

        Raises:
            NotWrappedError: there is no wrapped model.
            PolicyError: ``policy`` is not a policy, it needs ``total_steps`` and there is none, it is scaled to another
                length, or ``total_steps`` is not a whole number of at least 1.
        """
        gate = _gate(model_or_gate)
        policy = gate.policy if policy is None else policy
        cycle = policy if isinstance(policy, CyclePolicy) else RegimePolicy.of(policy).cycle
        self.policy: CyclePolicy = for_run(cycle, total_steps)
        length = self.policy.scaled_to if total_steps is None else whole_number("total_steps", total_steps)
        self.total_steps = length if isinstance(length, int) else None
        self._gates = [gate]
        self._met = False  # whether the ranks have come together at the end of a step
        self._alarms = Alarms()
        self._notices: list[str | None] = []  # said at the end of a step, when nothing is left undone
        self._history: deque[Decision] = deque(maxlen=HISTORY)
        self._take(State.at_start(self.policy), updates=0, pending=[])
        gate.driver = weakref.ref(self)

    def bind(self, model: nn.Module | TopKGate) -> None:
        """Drive one more wrapped model, such as an averaged copy, from now on; ``NotWrappedError`` if it is bare."""
        gate = _gate(model)
        if all(gate is not known for known in self._gates):
            if gate.network is not None and self._networks:
                gate.network.take(self._networks[0].histogram)
            self._gates.append(gate)
        gate.driver = weakref.ref(self)
        self._put_into_force(self.keep_ratio)

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
                update is not counted; values that were refused at a decision are forgotten.
            SyncError: found when a decision is due: the ranks differ in policy or in where they are, or one of them
                does not come before the process group's timeout; the message names it.
            WrapError: the cycler drives nothing: its model was unwrapped, trains without its gate, or has a newer
                cycler.
        """
        self._gates = still_driven(self, self._gates)
        if self._alarms.looking:
            self._alarms.before(self._gates[0], self._updates)
        strategy = self.policy.strategy
        value = signal.checked(self.policy.monitor, loss, metrics) if strategy.needs_signal else None
        if strategy.each_update:
            regime = self._move_on(self._updates + 1)
        elif (self._updates + 1) % self.policy.every == 0:
            regime = self._decide(value)
        else:
            if value is not None:
                self._pending.append(value)
            self._updates += 1
            regime = self._between
            self._put_into_force(regime.keep_ratio)
        if self._networks:
            end_step(self._networks, self._updates, meet=not self._met)
            self._met = True
        if self._updates >= self._alarms.quiet_until:
            self._notices += self._alarms.after(
                self._gates[0], self._updates, regime.keep_ratio, self.policy, self.total_steps
            )
        if self._notices:
            notices, self._notices = self._notices, []
            for notice in filter(None, notices):
                warnings.warn(notice, RuntimeWarning, stacklevel=2)
        return regime

    def fast_forward(self, updates: int) -> Regime:
        """Count all updates up to a number at once, without forward passes, for a run that resumes by its count alone.

        Args:
            updates: optimizer updates made so far in all.

        Raises:
            PolicyError: the strategy watches a signal, which only the saved state has; or fewer than have been counted.
        """
        if self.policy.strategy.needs_signal:
            kind = self.policy.strategy.kind
            raise PolicyError(f"the strategy {kind!r} watches a signal: go on from state_dict(), not from a count.")
        if updates < self._updates:
            raise PolicyError(f"updates must be at least the {self._updates} that have been counted; got {updates}.")
        if self.policy.strategy.each_update and updates > self._updates:
            return self._move_on(updates)
        while self._updates < updates:
            if (self._updates + 1) % self.policy.every == 0:
                self._decide(None)
            else:
                self._updates += 1
        self._put_into_force(self.keep_ratio)
        return self._between

    def check_sync(self) -> None:
        """Check that all ranks have the same policy, the same sites, and are at the same point of the cycle.

        All ranks must call this. Ranks agree without it; it finds out before the first decision what would fail there,
        such as a checkpoint that was loaded on some ranks only. Without several ranks it does nothing.

        Raises:
            SyncError: the message says which ranks have what, or which one does not answer.
        """
        here = self._whole_policy.model_dump(mode="json")
        mine = {**self._place(), "cycle": here["cycle"], "gate": here["gate"], "sites": self._sites}
        ranks.require_same(mine, "check_sync", self._updates)

    def state_dict(self, *, all_ranks: bool = False) -> dict[str, Any]:
        """Return all running state as plain JSON types, also between two decisions.

        Args:
            all_ranks: include what each of the other ranks alone remembers; all ranks must call this. Between two
                decisions each rank has values of its own that wait for the next one. With them, one file that rank 0
                writes resumes every rank exactly; else each rank's own state does.

        Raises:
            SyncError: ``all_ranks``, and one of them does not answer.
        """
        pending = [value if math.isfinite(value) else None for value in signal.fetched(self._pending)]
        shares = None
        if all_ranks and ranks.world_size() > 1:
            shares = ranks.gathered(Share(pending, self.skipped), "state_dict", self._updates)
        policy = self._whole_policy.model_dump(mode="json")
        histogram = Histogram.of(self._networks[0].histogram) if self._networks else None
        history = list(self._history)
        state = replace(self._state, keep_ratio=self.keep_ratio)
        return plain(Saved(2, policy, self._sites, self._updates, pending, state, history, shares, histogram))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, exactly as if the run had never stopped, and set the gates.

        Args:
            state: from ``state_dict``, or the same after a way through JSON. If all ranks saved it together, each
                takes its own part; if they were more or fewer then, each takes the mean.

        Raises:
            StateError: it belongs to another policy, model, version or length of the run, or is damaged; the message
                shows both sides. The cycler is as it was.
        """
        saved = restored(state, self._whole_policy, self._sites, network=bool(self._networks))
        if self.total_steps is not None and saved.updates > self.total_steps:
            raise StateError(
                f"the state has made {saved.updates} updates, more than total_steps={self.total_steps}; total_steps "
                "counts those of the whole run, the ones before the resume included."
            )
        share = saved.share(ranks.rank(), ranks.world_size())
        pending = [math.nan if value is None else value for value in share.pending]
        state_here = replace(saved.state, skipped=share.skipped)
        self._history = deque(saved.history, maxlen=HISTORY)
        self._take(state_here, updates=saved.updates, pending=pending)
        if saved.network is not None:
            for each in self._networks:
                each.take(saved.network.tensor())

    @property
    def _networks(self) -> list[NetworkThreshold]:
        return [gate.network for gate in self._gates if gate.network is not None]

    @property
    def _whole_policy(self) -> RegimePolicy:
        return self._gates[0].policy.replace(cycle=self.policy)

    @property
    def _sites(self) -> list[str]:
        return [site.name for site in self._gates[0].sites]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for gate in self._gates:
            if other_driver(self, gate) is None:  # a gate of the copy's own
                gate.driver = weakref.ref(self)

    def _take(self, state: State, *, updates: int, pending: Sequence[Tensor | float]) -> None:
        self._state, self._updates, self._pending = state, updates, list(pending)
        self._between = Regime(state.keep_ratio, state.phase, state.cycle, None)
        self._put_into_force(state.keep_ratio)

    def _put_into_force(self, keep_ratio: float) -> None:
        for gate in self._gates:
            gate.set_budget(keep_ratio, full_share=self.policy.full_share, update=self._updates)

    def _move_on(self, updates: int) -> Regime:
        """Move to the ratio that a strategy which moves at each update has after so many."""
        keep_ratio = ratio_after(self.policy, self._between.keep_ratio, updates)
        self._updates, self._between = updates, Regime(keep_ratio, "spread", 0, None)
        self._put_into_force(keep_ratio)
        return self._between

    def _decide(self, value: Tensor | float | None) -> Regime:
        before = self._state
        values = None if value is None else signal.fetched([*self._pending, value])
        try:
            state, record = decided(self.policy, before, values, self._updates, self._place(), self.check_sync)
        except RefusedError as error:
            # Kept, they would be refused again at every further step.
            self._pending = [each for place, each in enumerate(self._pending) if place not in error.places]
            raise
        self._history.append(record)
        self._take(state, updates=self._updates + 1, pending=[])
        if state.skipped and before.skipped == 0:
            self._notices.append(
                f"{state.skipped} of the last {self.policy.every} values of {self.policy.monitor} were not finite and "
                "are left out; RegimeCycler.skipped goes on counting, this warning is not repeated."
            )
        if self.policy.strategy.needs_signal:
            held = state.held * self.policy.every
            floor = getattr(self.policy.strategy, "floor", None)
            self._notices.append(self._alarms.stuck(floor, state.keep_ratio, held, self._updates - held - state.began))
        if state.cycle > before.cycle:
            bound = "" if self._alarms.bound is None else f"; {self._alarms.bound:.0%} of the gates were bound"
            _log.info(
                "cycle %d: %s at update %d, keep ratio %.4g to %.4g%s",
                *(state.cycle, record.event, self._updates, before.keep_ratio, state.keep_ratio, bound),
            )
        return self._between._replace(event=record.event)

    def _place(self) -> dict[str, object]:
        """Return the place in the cycle, which must be the same on all ranks."""
        state = self._state
        return {
            "update": self._updates,
            "keep ratio": float(self._gates[0].keep_ratio),
            "phase": state.phase,
            "cycle": state.cycle,
            "held": state.held,
            "last raise": state.last_raise,
        }


def _gate(model_or_gate: nn.Module | TopKGate) -> TopKGate:
    return model_or_gate if isinstance(model_or_gate, TopKGate) else gate_of(model_or_gate)
