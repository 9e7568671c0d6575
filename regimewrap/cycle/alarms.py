"""Warns of a gate that never cuts, of a floor that is never left, and of a cycler that drives nothing.

The gate counts its own calls when asked to; this file decides when to ask. It knows no rule and no signal.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from regimewrap import torch_private
from regimewrap.errors import WrapError
from regimewrap.policy.strategies import Dense

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from regimewrap.cycle.cycler import RegimeCycler
    from regimewrap.gate.gate import TopKGate
    from regimewrap.policy.policy import CyclePolicy

#: Updates after which a gate that has not cut anything is reported, where no length of the run is known.
PATIENCE = 1000
# A ratio that begins at 1 needs a few updates to come down, also in a run that only tries things out.
_FIRST_LOOK = 20
NEVER = 1 << 62
#: Updates in a row that train the model past its gate before ``step`` refuses.
DOUBTS = 8


class Alarms:
    """Looks into the gate at a few updates, increasingly rare ones once it is seen to cut.

    Attributes:
        looking: whether the gate counts now.
        quiet_until: the update before which ``after`` has nothing to do.
        bound: the share of the gate's calls that cut something when last looked at; ``None`` before.
    """

    def __init__(self) -> None:
        self.bound: float | None = None
        self.looking = False
        self.quiet_until = 0
        self._next = 1  # the update after which to look again
        self._lowest = 2.0  # the smallest ratio that was looked at
        self._below = False  # whether the ratio has ever been below 1
        self._passed = False  # whether a forward pass has ever reached the gate
        self._has_cut = False
        self._reached = 0  # calls of the gate when last looked at
        self._missed, self._weights, self._blocks = 0, 0, 0
        self._told: set[str] = set()

    def before(self, gate: TopKGate, updates: int) -> None:
        """Take in what the gate counted since ``after``, where that was looking.

        Raises:
            WrapError: the model trains, and its forward passes do not reach the gate.
        """
        self.looking = False
        sample, before = gate.take_sample(), self._blocks
        if sample.calls:
            self._reached = sample.calls
            self._passed, self._missed, self.bound = True, 0, sample.bound
            self._has_cut = self._has_cut or sample.bound > 0
            self._next = updates + min(max(updates, 1), PATIENCE)
            return
        weights = _versions(gate)
        trained, self._weights = weights != self._weights, weights
        blocks, self._blocks = gate.budget.blocks_so_far, gate.budget.blocks_so_far
        # A CUDA graph replays what passed once, and is not seen. Nor are blocks of at_keep_ratio, or a loop that only
        # counts.
        replayed = self._passed and any(each.device.type != "cpu" for each in _parameters(gate))
        if not trained or blocks != before or replayed:
            self._missed = 0
            self._next = updates + min(max(updates // 8, 8), PATIENCE)
            return
        self._missed += 1
        self.quiet_until = 0
        if self._missed > DOUBTS:
            self._missed = 0
            raise WrapError(
                f"this RegimeCycler drives nothing: in {DOUBTS} updates in a row the weights of its model, or of a "
                "copy, changed, and no forward pass in train mode reached its gate. Another tool has dropped the gate "
                "(as torch.fx's prepare_qat_fx does), or the model trains in eval mode, or through a copy. Wrap the "
                "model that trains, after such tools, and make a new RegimeCycler of it; one of a copy.deepcopy drives "
                "that: RegimeCycler(copy)."
            )

    def after(
        self, gate: TopKGate, updates: int, keep_ratio: float, policy: CyclePolicy, total_steps: int | None
    ) -> list[str | None]:
        """Ask the gate to count in the next forward passes, if it is time to look; return what to say.

        Nothing happens before update ``quiet_until``.
        """
        length = policy.scaled_to if isinstance(policy.scaled_to, int) else NEVER
        # A model with this setting may train in eval mode, where no call is counted.
        blind = not gate.sites or gate.policy.gate.eval_keep_ratio == "current"
        self._below = self._below or keep_ratio < 1
        lower = not self._has_cut and keep_ratio < 0.8 * self._lowest
        due = updates >= self._next or lower or self._missed
        if due and not blind and keep_ratio < 1 and _cuts_a_batch_of_one(updates, policy.full_share):
            if not self._missed:
                self._weights = _versions(gate)
            self._blocks = gate.budget.blocks_so_far
            self.looking, self._lowest = True, min(self._lowest, keep_ratio)
            gate.sample_next()
        # Until something was cut, each lower ratio is worth a look.
        self.quiet_until = min(length + 1, NEVER if blind else self._next if self._has_cut else 0)
        if updates > length:
            self.quiet_until = NEVER if blind else self._next
        never = self._never_bound(gate, updates, policy, total_steps)
        return [self._too_long(updates, length), never, self._rebuilt(gate)]

    def _never_bound(self, gate: TopKGate, updates: int, policy: CyclePolicy, total_steps: int | None) -> str | None:
        """Return what to say, once, if no gate has cut anything in a tenth of the run."""
        deadline = policy.warmup + (PATIENCE if total_steps is None else max(_FIRST_LOOK, total_steps // 10))
        if updates != deadline or self._has_cut or isinstance(policy.strategy, Dense) or not gate.sites:
            return None
        if self._below and not self._passed:  # a loop that only counts
            return None
        lowest = f"is {float(gate.keep_ratio):.3g}" if self._below else "was never below 1"
        return (
            f"no gate has cut anything in {updates} updates: the keep ratio {lowest}, and a gate binds only below the "
            "share of units that are active, about one half after a ReLU. If the policy's numbers belong to a longer "
            'run, scale them: RegimeCycler(model, "sawtooth", total_steps=N). If it resets at once each time, the '
            "signal is noisy: raise cycle.smoothing or the tolerance. The preset mixed needs none and binds at once."
        )

    def _rebuilt(self, gate: TopKGate) -> str | None:
        """Return what to say, once, if a model was made of the wrapped one's parts that lacks some of its gates."""
        gone = gate._root is not None and gate.root is None
        if not gone or not 0 < self._reached < len(gate.sites) or "rebuilt" in self._told:
            return None
        self._told.add("rebuilt")
        return (
            f"the wrapped model is gone, and what trains passes {self._reached} of its {len(gate.sites)} gates. "
            "Another tool has made a model of its parts and dropped the other gates, as torch.fx's prepare_qat_fx does "
            "where it fuses a ReLU; regimewrap.verify(model, x) names them. Wrap what such tools return instead."
        )

    def stuck(self, floor: float | None, keep_ratio: float, held: int, way_down: int) -> str | None:
        """Return what to say, once, when a cycle has been at its floor for longer than it took to get there.

        Args:
            floor: the smallest ratio of the rule; ``None`` if it has none.
            keep_ratio: in force.
            held: updates for which it has been.
            way_down: updates from the begin of the cycle to there.
        """
        if floor is None or keep_ratio > floor or held <= max(way_down, 1) or "floor" in self._told:
            return None
        self._told.add("floor")
        return (
            f"the keep ratio has been at its floor, {keep_ratio:g}, for {held} updates, longer than the {way_down} "
            "that it took to get there: the signal never falls behind its best, and nothing resets. Set "
            "cycle.guarded=True, or take a preset that needs no signal (mixed, sawtooth)."
        )

    def _too_long(self, updates: int, scaled_to: int) -> str | None:
        """Return what to say, once, when a run goes on beyond the length that its cycle is scaled to."""
        if updates != scaled_to + 1:
            return None
        return (
            f"the run goes on after the {scaled_to} updates that its cycle is scaled to. total_steps counts the "
            "optimizer updates of the whole run: epochs × updates an epoch, not epochs."
        )


def other_driver(cycler: RegimeCycler, gate: TopKGate) -> RegimeCycler | None:
    """Return the cycler that drives a gate, if it is another one and still there."""
    driver: RegimeCycler | None = gate.driver() if gate.driver is not None else None
    if driver is None or driver is cycler or all(gate is not driven for driven in driver._gates):
        return None
    return driver


def still_driven(cycler: RegimeCycler, gates: list[TopKGate]) -> list[TopKGate]:
    """Return those of a cycler's gates that are still in a model; take over those whose cycler is gone.

    Raises:
        WrapError: the model was unwrapped, or a newer cycler drives it.
    """
    for gate in gates:
        if gate.driver is not None and gate.driver() is cycler:
            continue
        other = other_driver(cycler, gate)
        if other is not None:
            raise WrapError(
                f"this RegimeCycler does not drive its model: {other!r} does. Step that one; make one cycler a model. "
                "A copy of both is made by copy.deepcopy((model, cycler)), in this order."
            )
        gate.driver = weakref.ref(cycler)
    if gates[0].released:
        raise WrapError(
            "this RegimeCycler drives nothing: its model was unwrapped. If it is wrapped again, make a new "
            "RegimeCycler(model); a saved state goes on in that with load_state_dict."
        )
    return gates if len(gates) == 1 else [gate for gate in gates if not gate.released]


def _cuts_a_batch_of_one(updates: int, full_share: float) -> bool:
    """Say whether the only row of a batch is not dense in the next forward pass; see ``TopKGate.set_budget``."""
    return int((updates + 1) * full_share) == int(updates * full_share)


def _versions(gate: TopKGate) -> int:
    return sum(torch_private.version_of(each) for each in _parameters(gate))


def _parameters(gate: TopKGate) -> Iterator[Tensor]:
    """Yield what trains if the model does, or a copy of it that no cycler drives."""
    for each in (gate, *gate.copies):
        root = each.root
        if root is not None and (each is gate or each.driver is None):
            yield from root.parameters()
