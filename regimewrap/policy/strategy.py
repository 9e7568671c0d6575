"""What every rule for the next keep ratio has in common.

A strategy is its own settings: a frozen model whose rule, ``next_move``, is a pure method. What the user writes, what
is checked and what runs are one definition. Averages and counters live in the cycler, which shows them to the rule as
a ``Situation``. No torch, no state, no randomness here. The rules are in ``open_loop`` and ``closed_loop``; which of
them there are, in ``strategies``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple, Self, get_args

from regimewrap.policy.settings import Settings

Event = Literal["compress", "hold", "relax", "reset"]
EVENTS: tuple[Event, ...] = get_args(Event)


class Move(NamedTuple):
    """What a strategy decides.

    ``keep_ratio`` is the next one, in (0, 1]. ``event`` says what kind of move it is: ``compress`` lowers the ratio,
    ``hold`` leaves it, ``relax`` gives some of the budget back, ``reset`` all of it. A strategy that moves at each
    update says ``None``: its moves are not recorded.
    """

    keep_ratio: float
    event: Event | None


class Situation(NamedTuple):
    """All that a rule may look at.

    Attributes:
        keep_ratio: the one in force, in (0, 1].
        signal: the monitored value, smoothed and averaged over ranks; ``None`` for a strategy that needs none.
        best: the best ``signal`` that this one is compared with, itself included: of all decisions at a like budget
            if the cycle is guarded, else of all decisions; ``None`` without a signal.
        fall: how far ``signal`` is behind ``best``, at least 0 and possibly infinite, in the unit that
            ``CyclePolicy.tolerance_kind`` names.
        decision: decisions made before this one, those of the warm-up not counted. For a strategy that moves at each
            update these are updates, this one included.
        since_raise: decisions since the last reset or relax, 1 at the next one; ``None`` before the first.
        held: holds in a row just before this decision.
        guarded: whether a cycle ends at its floor, whatever the signal says; see ``CyclePolicy.guarded``.
        overdue: whether a guarded cycle has had its share of the run.
    """

    keep_ratio: float
    signal: float | None
    best: float | None
    fall: float
    decision: int
    since_raise: int | None
    held: int
    guarded: bool = False
    overdue: bool = False


class Strategy(Settings):
    """Base of all strategies: settings plus the pure rule ``next_move``.

    A subclass is either abstract or ``@final``. ``needs_signal`` says whether the rule looks at the monitored value;
    where it is false, ``RegimeCycler.step`` needs no argument and ranks need not talk to each other. ``each_update``
    says that the ratio follows from the number of updates alone and moves at each of them: ``CyclePolicy.every`` is
    not looked at, and nothing is recorded.
    """

    needs_signal: ClassVar[bool] = True
    each_update: ClassVar[bool] = False

    kind: str

    @property
    def initial_keep_ratio(self) -> float:
        """The ratio in force before the first decision."""
        return 1.0

    @abstractmethod
    def next_move(self, now: Situation) -> Move:
        """Return the next keep ratio and what kind of move that is.

        Args:
            now: the situation at this decision.
        """

    def rescaled(self, decisions: int) -> Self:  # noqa: ARG002 - a rule without cycles has nothing to rescale
        """Return this strategy with one cycle taking about ``decisions`` decisions; without cycles, itself."""
        return self
