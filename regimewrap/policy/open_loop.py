"""Rules that watch nothing: the ratio follows from the number of updates or of decisions alone."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, Self, final

from pydantic import Field

from regimewrap.policy.settings import NOT_A_BOOL, Ratio, Weight
from regimewrap.policy.strategy import Move, Situation, Strategy

# The golden ratio's conjugate as a share of 2^64, odd: its multiples visit the circle as evenly as any do.
_GOLDEN = 0x9E3779B97F4A7C15
_BITS = 24  # of a position on the circle that are looked at


@final
class Spread(Strategy):
    """Another keep ratio at each update, log-uniform between the floor and 1, or the full budget.

    Updates go in pairs: with ``rest=0.5`` two at a moving ratio, two at the full budget, and so on. Of those that move,
    the u-th is at ``floor ** (u · φ mod 1)`` with the golden ratio's conjugate φ = 0.618…: a low-discrepancy sequence,
    so that a few in a row already visit small and large budgets alike; every second one does too, which matters where
    updates take turns with the full budget. It begins at ratio 1. The ratio follows from the number of updates alone:
    no signal, no length of a run. The same on every machine, bit for bit: square roots and products alone.

    >>> rule = Spread(floor=0.05)
    >>> [round(rule.ratio(update), 3) for update in range(10)]
    [1.0, 0.157, 1.0, 1.0, 0.493, 0.077, 1.0, 1.0, 0.243, 0.763]

    Source: the additive recurrence of the golden ratio is Weyl's sequence; that it is the most even one is due to
    H. Niederreiter, Random Number Generation and Quasi-Monte Carlo Methods, 1992, chapter 3.
    """

    needs_signal: ClassVar[bool] = False
    each_update: ClassVar[bool] = True

    kind: Literal["spread"] = "spread"
    floor: Ratio = Field(0.05, description="The smallest keep ratio.")
    rest: Weight = Field(0.5, description="The share of the updates at the full budget, in pairs.")

    def next_move(self, now: Situation) -> Move:
        """Return the ratio that belongs to the next update."""
        return Move(self.ratio(now.decision), None)

    def ratio(self, update: int) -> float:
        """Return the keep ratio, in [floor, 1], after so many updates."""
        pair = update // 2
        rested = math.floor(pair * self.rest)
        if math.floor((pair + 1) * self.rest) > rested:
            return 1.0
        update -= 2 * rested
        place = (update * _GOLDEN & 0xFFFFFFFFFFFFFFFF) >> (64 - _BITS)
        roots, ratio = _roots(self.floor), 1.0
        while place:
            lowest = place & -place
            ratio *= roots[_BITS + 1 - lowest.bit_length()]
            place ^= lowest
        return max(self.floor, ratio)


@lru_cache(maxsize=64)
def _roots(floor: float) -> tuple[float, ...]:
    """Return the floor, its square root, the root of that, and so on: what each bit of a place contributes."""
    # pow() may differ in its last bit from one machine to the next; sqrt() is exactly rounded everywhere.
    roots = [floor]
    for _ in range(_BITS):
        roots.append(math.sqrt(roots[-1]))
    return tuple(roots)


@final
class Sawtooth(Strategy):
    """From dense to the floor and back at once, over and over, whatever the signal does.

    A pure function of the number of decisions: of each ``decisions`` in a row the first is at ratio 1, the last at the
    floor. ``linear`` loses the same number of units each time, ``geometric`` the same share, ``cosine`` few at both
    ends.
    """

    needs_signal: ClassVar[bool] = False

    kind: Literal["sawtooth"] = "sawtooth"
    shape: Literal["linear", "geometric", "cosine"] = Field("geometric", description="The way down.")
    decisions: Annotated[int, Field(ge=2), NOT_A_BOOL] = Field(128, description="Decisions in one cycle.")
    floor: Ratio = Field(0.1, description="The keep ratio at the end of a cycle.")

    def next_move(self, now: Situation) -> Move:
        """Return the ratio that belongs to the next decision count."""
        position = (now.decision + 1) % self.decisions
        return Move(1.0, "reset") if position == 0 else Move(self._ratio(position / (self.decisions - 1)), "compress")

    def _ratio(self, way: float) -> float:
        """Return the keep ratio at a share ``way``, in 0..1, of the way down."""
        if self.shape == "geometric":
            return max(self.floor, math.pow(self.floor, way))
        left = 1 - way if self.shape == "linear" else (1 + math.cos(math.pi * way)) / 2
        return self.floor + (1 - self.floor) * left

    def rescaled(self, decisions: int) -> Self:
        """Return this sawtooth with ``decisions`` decisions in a cycle, at least 2."""
        return self.replace(decisions=max(2, decisions))


@final
class Constant(Strategy):
    """One keep ratio throughout: a fixed budget, the control arm of most experiments."""

    needs_signal: ClassVar[bool] = False

    kind: Literal["constant"] = "constant"
    keep_ratio: Ratio = Field(description="The keep ratio, from the first update on.")

    @property
    def initial_keep_ratio(self) -> float:
        """The one ratio."""
        return self.keep_ratio

    def next_move(self, now: Situation) -> Move:
        """Hold; after a warm-up at the full budget, go there."""
        return Move(self.keep_ratio, "compress" if self.keep_ratio < now.keep_ratio else "hold")


@final
class Dense(Strategy):
    """The full budget throughout: training as if there were no gate."""

    needs_signal: ClassVar[bool] = False

    kind: Literal["dense"] = "dense"

    def next_move(self, now: Situation) -> Move:  # noqa: ARG002 - it looks at nothing
        """Hold."""
        return Move(1.0, "hold")
