"""Rules that watch the monitored signal: compress while it holds, give budget back when it falls behind."""

from __future__ import annotations

import math
from typing import Literal, Self, final

from pydantic import Field

from regimewrap.policy.settings import Natural, NonNegative, Positive, Ratio
from regimewrap.policy.strategy import Move, Situation, Strategy

#: The smallest floor that a rescaled compression reaches within one cycle, and where it ends if the floor is lower.
_DEEPEST, _METHODS_END = 0.05, 0.1


def _compressed(now: Situation, decay: float, floor: float) -> Move:
    lower = max(floor, now.keep_ratio * decay)
    return Move(lower, "compress") if lower < now.keep_ratio else Move(now.keep_ratio, "hold")


def _due(now: Situation, floor: float, cooldown: int) -> Move | None:
    """Return what is done whatever the signal says: a reset where the cycle is over, a hold during the cooldown."""
    if now.guarded and (now.overdue or now.keep_ratio <= floor):
        return Move(1.0, "reset")
    if now.since_raise is not None and now.since_raise <= cooldown:
        return Move(now.keep_ratio, "hold")
    return None


def _decay_for(decisions: int, floor: float) -> float:
    """Return the decay that takes a ratio of 1 to the floor, or to 0.1 if the floor is lower still, in so many."""
    end = floor if floor >= _DEEPEST else _METHODS_END
    # Rounded, so that every machine writes the same policy; and down, so that the floor is reached.
    return math.floor(math.pow(end, 1 / decisions) * 1e12) / 1e12


@final
class EmaReset(Strategy):
    """Shrink the keep ratio each decision; go back to dense when the signal falls behind its best.

    The published settings of the method (arXiv 2603.03131), whose tolerance is in units of accuracy. The floor is ours:
    the method has none, and its gate always keeps one unit.
    """

    kind: Literal["ema-reset"] = "ema-reset"
    decay: Ratio = Field(0.982, description="Multiplier of the keep ratio at each decision.")
    tolerance: NonNegative = Field(0.12, description="Fall behind the best value that sends us back to dense.")
    cooldown: Natural = Field(3, description="Decisions to sit out after a reset.")
    floor: Ratio = Field(0.001, description="The keep ratio never goes below this.")

    def next_move(self, now: Situation) -> Move:
        """Reset if the cycle is over; sit out the cooldown; else reset if behind, else compress."""
        behind = Move(1.0, "reset") if now.fall > self.tolerance else None
        return _due(now, self.floor, self.cooldown) or behind or _compressed(now, self.decay, self.floor)

    def rescaled(self, decisions: int) -> Self:
        """Fit the cooldown (at most an eighth) and a compression from 1 to the floor into ``decisions``."""
        cooldown = min(self.cooldown, decisions // 8)
        return self.replace(cooldown=cooldown, decay=_decay_for(decisions - cooldown, self.floor))


@final
class EmaRelax(Strategy):
    """Shrink the keep ratio each decision; give a little back when the signal falls behind its best.

    The other settings that the method's author published: the ratio grows by ``step`` times an urgency, which is 1 at
    the tolerance, grows by ``slope`` for each further tolerance that the signal is behind, and is at most
    ``slope_cap``; and never by more than ``step_cap``. With the author's numbers ``step`` equals ``step_cap``, so the
    urgency has no effect. The cooldown is the one of the author's other settings.
    """

    kind: Literal["ema-relax"] = "ema-relax"
    decay: Ratio = Field(0.98, description="Multiplier of the keep ratio at each decision.")
    tolerance: Positive = Field(0.01, description="Fall behind the best value that gives budget back.")
    step: Ratio = Field(0.03, description="What is added to the keep ratio at urgency 1.")
    step_cap: Ratio = Field(0.03, description="The most that is added to the keep ratio at once.")
    slope: NonNegative = Field(1.5, description="Urgency gained for each further tolerance behind.")
    slope_cap: Positive = Field(5.0, description="The largest urgency.")
    cooldown: Natural = Field(3, description="Decisions to sit out after giving back.")
    floor: Ratio = Field(0.2, description="The keep ratio never goes below this.")

    def next_move(self, now: Situation) -> Move:
        """Reset if the cycle is over; sit out the cooldown; else relax if behind, else compress."""
        due = _due(now, self.floor, self.cooldown)
        if due is not None or now.fall <= self.tolerance:
            return due or _compressed(now, self.decay, self.floor)
        behind = (now.fall - self.tolerance) / self.tolerance
        # A slope of 0 times an infinite fall is not a number.
        urgency = min(self.slope_cap, 1 + self.slope * behind) if self.slope else 1.0
        return Move(min(1.0, now.keep_ratio + min(self.step_cap, self.step * urgency)), "relax")

    def rescaled(self, decisions: int) -> Self:
        """As ``EmaReset``; what is given back grows by the factor by which the shrinking (its logarithm) grows."""
        cooldown = min(self.cooldown, decisions // 8)
        decay = _decay_for(decisions - cooldown, self.floor)
        factor = math.log(decay) / math.log(self.decay) if self.decay < 1 else 1.0
        step, cap = (max(math.ulp(0.0), min(1.0, value * factor)) for value in (self.step, self.step_cap))
        return self.replace(cooldown=cooldown, decay=decay, step=step, step_cap=cap)


@final
class PlateauReset(Strategy):
    """Compress while the signal holds; wait while it is behind; reset when it does not come back, or at the floor.

    Not the method's. The numbers are ours.
    """

    kind: Literal["plateau-reset"] = "plateau-reset"
    decay: Ratio = Field(0.95, description="Multiplier of the keep ratio at each decision at which the signal holds.")
    tolerance: NonNegative = Field(0.05, description="Fall behind the best value that stops the compression.")
    patience: Natural = Field(5, description="Decisions to wait for the signal to come back.")
    floor: Ratio = Field(0.05, description="Where a compression ends; the keep ratio never goes below this.")

    def next_move(self, now: Situation) -> Move:
        """Compress or, at the floor, reset while the signal holds; else hold until patience ends, then reset.

        A guarded cycle that has had its share of the run resets at once.
        """
        if now.guarded and now.overdue:
            return Move(1.0, "reset")
        if now.fall <= self.tolerance:
            return Move(1.0, "reset") if now.keep_ratio <= self.floor else _compressed(now, self.decay, self.floor)
        return Move(now.keep_ratio, "hold") if now.held < self.patience else Move(1.0, "reset")

    def rescaled(self, decisions: int) -> Self:
        """Fit a compression from 1 to the floor and, at most a quarter of it, the patience into ``decisions``."""
        patience = min(self.patience, decisions // 4)
        return self.replace(patience=patience, decay=_decay_for(decisions - patience, self.floor))
