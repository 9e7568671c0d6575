"""The rules for the next keep ratio, each with its settings.

A strategy is its own settings: a frozen model whose rule, ``next_move``, is a pure method. What the user writes, what
is checked and what runs are one definition. Averages and counters live in the cycler, which shows them to the rule as
a ``Situation``. No torch, no state, no randomness here.

To add a rule, write a ``@final`` subclass of ``Strategy`` with a ``kind`` of its own and decorate it with
``@register``; policies, their files and their schema know it from then on.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, Union, final, get_args

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import CoreSchema, core_schema

from regimewrap.errors import PolicyError
from regimewrap.files import shown
from regimewrap.policy.settings import NOT_A_BOOL, Natural, NonNegative, Positive, Ratio, Settings

if TYPE_CHECKING:
    from pydantic.json_schema import JsonSchemaValue

Event = Literal["compress", "hold", "relax", "reset"]
EVENTS: tuple[Event, ...] = get_args(Event)
S = TypeVar("S", bound="Strategy")


class Move(NamedTuple):
    """What a strategy decides.

    ``keep_ratio`` is the next one, in (0, 1]. ``event`` says what kind of move it is: ``compress`` lowers the ratio,
    ``hold`` leaves it, ``relax`` gives some of the budget back, ``reset`` all of it.
    """

    keep_ratio: float
    event: Event


@dataclass(frozen=True)
class Situation:
    """All that a rule may look at.

    Attributes:
        keep_ratio: the one in force, in (0, 1].
        signal: the monitored value, smoothed and averaged over ranks; ``None`` for a strategy that needs none.
        best: the best ``signal`` of all decisions so far, this one included; ``None`` without a signal.
        fall: how far ``signal`` is behind ``best``, at least 0 and possibly infinite, in the unit that
            ``CyclePolicy.tolerance_kind`` names.
        decision: decisions made before this one.
        since_raise: decisions since the last reset or relax, 1 at the next one; ``None`` before the first.
        held: holds in a row just before this decision.
    """

    keep_ratio: float
    signal: float | None
    best: float | None
    fall: float
    decision: int
    since_raise: int | None
    held: int


class Strategy(Settings):
    """Base of all strategies: settings plus the pure rule ``next_move``.

    A subclass is either abstract or ``@final``. ``needs_signal`` says whether the rule looks at the monitored value;
    where it is false, ``RegimeCycler.step`` needs no argument and ranks need not talk to each other.
    """

    needs_signal: ClassVar[bool] = True

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


def _compressed(now: Situation, decay: float, floor: float) -> Move:
    lower = max(floor, now.keep_ratio * decay)
    return Move(lower, "compress") if lower < now.keep_ratio else Move(now.keep_ratio, "hold")


def _sits_out(now: Situation, cooldown: int) -> bool:
    return now.since_raise is not None and now.since_raise <= cooldown


def _decay_for(decisions: int) -> float:
    """Return the decay that takes a ratio of 1 to 0.1, a compression of the method's, in so many decisions."""
    return math.pow(0.1, 1 / decisions)


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
        """Sit out the cooldown; else reset if behind, else compress."""
        if _sits_out(now, self.cooldown):
            return Move(now.keep_ratio, "hold")
        if now.fall > self.tolerance:
            return Move(1.0, "reset")
        return _compressed(now, self.decay, self.floor)

    def rescaled(self, decisions: int) -> Self:
        """Fit the cooldown (at most an eighth) and a compression from 1 to 0.1 into ``decisions``."""
        cooldown = min(self.cooldown, decisions // 8)
        return self.replace(cooldown=cooldown, decay=_decay_for(decisions - cooldown))


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
        """Sit out the cooldown; else relax if behind, else compress."""
        if _sits_out(now, self.cooldown):
            return Move(now.keep_ratio, "hold")
        if now.fall <= self.tolerance:
            return _compressed(now, self.decay, self.floor)
        behind = (now.fall - self.tolerance) / self.tolerance
        # A slope of 0 times an infinite fall is not a number.
        urgency = min(self.slope_cap, 1 + self.slope * behind) if self.slope else 1.0
        return Move(min(1.0, now.keep_ratio + min(self.step_cap, self.step * urgency)), "relax")

    def rescaled(self, decisions: int) -> Self:
        """As ``EmaReset``; what is given back grows by the factor by which the shrinking (its logarithm) grows."""
        cooldown = min(self.cooldown, decisions // 8)
        decay = _decay_for(decisions - cooldown)
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
        """Compress or, at the floor, reset while the signal holds; else hold until patience ends, then reset."""
        if now.fall <= self.tolerance:
            return Move(1.0, "reset") if now.keep_ratio <= self.floor else _compressed(now, self.decay, self.floor)
        return Move(now.keep_ratio, "hold") if now.held < self.patience else Move(1.0, "reset")

    def rescaled(self, decisions: int) -> Self:
        """Fit a compression from 1 to 0.1 and, at most a quarter of it, the patience into ``decisions``."""
        patience = min(self.patience, decisions // 4)
        return self.replace(patience=patience, decay=_decay_for(decisions - patience))


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

    def next_move(self, now: Situation) -> Move:  # noqa: ARG002 - it looks at nothing
        """Hold."""
        return Move(self.keep_ratio, "hold")


@final
class Dense(Strategy):
    """The full budget throughout: training as if there were no gate."""

    needs_signal: ClassVar[bool] = False

    kind: Literal["dense"] = "dense"

    def next_move(self, now: Situation) -> Move:  # noqa: ARG002 - it looks at nothing
        """Hold."""
        return Move(1.0, "hold")


_KINDS: dict[str, type[Strategy]] = {
    cls.model_fields["kind"].default: cls for cls in (EmaReset, EmaRelax, PlateauReset, Sawtooth, Constant, Dense)
}


def kinds() -> tuple[str, ...]:
    """Return the names of all strategies, built in and registered."""
    return tuple(_KINDS)


def register(cls: type[S]) -> type[S]:
    """Make a strategy known by its ``kind``, so that policies and their files can name it; usable as a decorator.

    Args:
        cls: a ``@final`` subclass of ``Strategy`` with ``kind: Literal["name"] = "name"``, settings that have a JSON
            schema, and ``next_move``. Registering a class again, or a new definition of it (same module and name, as
            in a notebook), replaces it.

    Returns:
        ``cls``.

    Raises:
        PolicyError: it is not such a class, or another class has its kind.
    """
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise PolicyError(f"register expects a subclass of Strategy; got {shown(cls)}.")
    if inspect.isabstract(cls) or not getattr(cls, "__final__", False):
        raise PolicyError(f"{cls.__name__} must define next_move and be marked @final (from typing) to be registered.")
    kind = cls.model_fields["kind"].default
    try:
        named = cls.model_json_schema()["properties"]["kind"].get("const")
    except PydanticUserError as error:
        reason = str(error).splitlines()[0]
        raise PolicyError(f"{cls.__name__} has a setting that cannot be written to a file: {reason}") from None
    if not isinstance(kind, str) or named != kind:
        raise PolicyError(f'{cls.__name__} needs a name of its own, such as  kind: Literal["mine"] = "mine"')
    known = _KINDS.get(kind, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PolicyError(f"{cls.__name__} has kind {kind!r}, which {known.__name__} has already; choose another.")
    _KINDS[kind] = cls
    _union.cache_clear()
    return cls


@cache
def _union() -> TypeAdapter[Strategy]:
    every: Any = Union[tuple(_KINDS.values())]  # noqa: UP007 - built from what is registered
    return TypeAdapter(Annotated[every, Field(discriminator="kind")])


class ByKind:
    """Annotation of a ``Strategy`` field: validated, and described, as the union of all kinds known at that moment."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: _union().validate_python(value))

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(_union().core_schema)
