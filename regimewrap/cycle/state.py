"""What a cycler remembers, as values: decisions, running state, and the form in which both are saved.

No arithmetic and no gates here: ``cycler`` makes these values, this room checks those that come back from a file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from regimewrap.errors import StateError
from regimewrap.files import differences, shown
from regimewrap.policy.strategies import Event
from regimewrap.topk.threshold import BINS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from regimewrap.policy.policy import CyclePolicy

Phase = Literal["dense", "compress", "recover"]

# Larger signals count as not finite, so that no sum or difference of them overflows.
LARGEST = 1e300
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

_Ratio = Annotated[float, Field(gt=0, le=1)]
_Signal = Annotated[float, Field(ge=-2 * LARGEST, le=2 * LARGEST)]  # an average may be rounded up
_Tally = Annotated[int, Field(ge=0)]


class Regime(NamedTuple):
    """What is in force after a step.

    Attributes:
        keep_ratio: for the next forward pass, in (0, 1].
        phase: ``dense`` at the start, ``compress`` once the ratio was lowered (or starts below 1), ``recover`` once
            budget was given back; holding changes nothing.
        cycle: how often the ratio really was raised.
        event: what was decided in this step; ``None`` when no decision was due.
    """

    keep_ratio: float
    phase: Phase
    cycle: int
    event: Event | None


@dataclass(frozen=True)
class Decision:
    """One decision, as kept in ``RegimeCycler.history``.

    Attributes:
        step: optimizer updates made so far, this decision's included.
        keep_ratio: after the decision.
        signal: smoothed, mean over ranks; ``None`` if no finite value came since the last decision, or none is needed.
        best: the best ``signal`` so far.
        phase: after the decision.
        event: what was decided.
        cycle: how often the ratio really was raised.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    step: _Tally
    keep_ratio: _Ratio
    signal: _Signal | None
    best: _Signal | None
    phase: Phase
    event: Event
    cycle: _Tally


@dataclass(frozen=True)
class State:
    """What has to be remembered from one decision to the next."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    keep_ratio: _Ratio
    phase: Phase
    cycle: _Tally = 0
    last_raise: _Tally | None = None  # the number of the decision that last reset or relaxed
    held: _Tally = 0
    skipped: _Tally = 0
    smoothed: _Signal | None = None
    first: _Signal | None = None
    best: _Signal | None = None

    @classmethod
    def at_start(cls, policy: CyclePolicy) -> Self:
        """Return the state before the first decision."""
        keep_ratio = policy.strategy.initial_keep_ratio
        return cls(keep_ratio, "dense" if keep_ratio == 1 else "compress")


@dataclass(frozen=True)
class Share:
    """What one rank alone remembers: values that wait for the next decision, and how many were left out."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    pending: list[float | None]
    skipped: _Tally


@dataclass(frozen=True)
class Histogram:
    """The scores of the last step that scope "network" takes its threshold from; empty before there is one."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    bins: list[Annotated[int, Field(ge=0, lt=BINS)]]  # those that are not empty, in order
    counts: list[Annotated[int, Field(gt=0, lt=1 << 63)]]

    @classmethod
    def of(cls, histogram: Tensor | None) -> Self:
        """Take one over; reading it waits for its device."""
        if histogram is None:
            return cls([], [])
        histogram = histogram.cpu()
        bins = histogram.nonzero().flatten()
        return cls(bins.tolist(), histogram[bins].tolist())

    def tensor(self) -> Tensor | None:
        """Return it as ``threshold_at`` takes it."""
        if not self.bins:
            return None
        return torch.zeros(BINS, dtype=torch.int64).index_put((torch.tensor(self.bins),), torch.tensor(self.counts))


@dataclass(frozen=True)
class Saved:
    """A saved cycler, as it is checked when it comes back.

    ``pending`` and ``state.skipped`` are those of the rank that saved; ``ranks`` has everyone's, if all saved together.
    ``network`` is there if the gates have scope "network".
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    version: Literal[1]
    policy: dict[str, Any]
    updates: _Tally
    pending: list[float | None]
    state: State
    history: list[Decision]
    ranks: list[Share] | None = None
    network: Histogram | None = None

    def share(self, rank: int, ranks: int) -> Share:
        """Return what a rank goes on with.

        When as many ranks saved together, that is its own. When others did, it is the mean of what they had, so that
        the next signal is nearly what it would have been. When one saved alone, all go on with what that one had.
        """
        if self.ranks is None:
            return Share(self.pending, self.state.skipped)
        if len(self.ranks) == ranks:
            return self.ranks[rank]
        at_each_update = zip(*(share.pending for share in self.ranks), strict=True)
        pending = [_mean([value for value in values if value is not None]) for values in at_each_update]
        return Share(pending, self.state.skipped)


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


@cache
def _adapter() -> TypeAdapter[Saved]:
    # On first use: building it takes a good part of `import regimewrap`.
    return TypeAdapter(Saved)


def plain(saved: Saved) -> dict[str, Any]:
    """Return a saved cycler as plain JSON types."""
    return _adapter().dump_python(saved, mode="json")  # type: ignore[no-any-return]


def restored(state: object, policy: CyclePolicy, *, network: bool) -> Saved:
    """Return a saved state that is whole and belongs to ``policy``, or raise a ``StateError``.

    Args:
        state: anything.
        policy: of the cycler that is to go on.
        network: whether its gates have scope "network".
    """
    if not isinstance(state, dict) or "version" not in state or not isinstance(state.get("policy"), dict):
        raise StateError(f"expected a state from RegimeCycler.state_dict; got {shown(state)}.")
    if state["version"] != 1:
        raise StateError(f"the state has version {shown(state['version'])}; this regimewrap reads version 1.")
    here = policy.model_dump(mode="json")
    if state["policy"] != here:
        raise StateError(
            f"the state belongs to another policy: {'; '.join(differences(state['policy'], here, 'cycle'))}. "
            "Build the cycler with the policy the state was saved under, or start without the state."
        )
    try:
        # Through JSON, where strictness means that nothing is taken for another type.
        saved = _adapter().validate_json(json.dumps(state, allow_nan=False), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise StateError(f"the state is damaged: {where}: {problem['msg']}.") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(f"the state is damaged: expected plain JSON types; {error}.") from None
    if (saved.network is not None) != network:
        difference = "another gate.scope, this model has network" if network else "gate.scope network, this model not"
        raise StateError(
            f"the state was saved under {difference}: wrap the model with the policy the state was saved under, or "
            "start without the state."
        )
    for complaint in _contradictions(saved, policy):
        raise StateError(f"the state is damaged: {complaint}.")
    return saved


def _contradictions(saved: Saved, policy: CyclePolicy) -> Iterator[str]:
    decisions, waiting = divmod(saved.updates, policy.every)
    waiting = waiting if policy.strategy.needs_signal else 0
    if len(saved.history) != decisions:
        yield f"{saved.updates} updates make {decisions} decisions, its history has {len(saved.history)}"
    for pending in [saved.pending, *(share.pending for share in saved.ranks or ())]:
        if len(pending) != waiting:
            yield f"{waiting} values wait for the next decision after {saved.updates} updates, it has {len(pending)}"
    if any(record.step != number * policy.every for number, record in enumerate(saved.history, 1)):
        yield f"its history is not one decision every {policy.every} updates"
    if saved.network is not None:
        bins = saved.network.bins
        if len(bins) != len(saved.network.counts) or bins != sorted(set(bins)):
            yield "its histogram has not one count for each bin, in order"
    if saved.ranks == []:
        yield "it was saved by no rank at all"
    state, last = saved.state, saved.history[-1] if saved.history else State.at_start(policy)
    if any(getattr(state, name) != getattr(last, name) for name in ("keep_ratio", "phase", "cycle", "best")):
        yield "its running state is not where its history ends"
    if (state.last_raise or 0) > max(0, decisions - 1) or state.held > decisions or state.skipped > saved.updates:
        yield "it counts more than has happened"
    if len({state.smoothed is None, state.first is None, state.best is None}) > 1:
        yield "of smoothed, first and best some are missing"
