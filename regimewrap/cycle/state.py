"""What a cycler remembers, as values: decisions, running state, and the form in which both are saved.

No arithmetic and no gates here: ``cycler`` makes these values, this room checks those that come back from a file.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from regimewrap.errors import StateError
from regimewrap.files import differences, shown
from regimewrap.policy.migrate import HISTORY, migrated_state
from regimewrap.policy.strategies import Event
from regimewrap.topk.threshold import BINS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from regimewrap.policy.policy import CyclePolicy, RegimePolicy

Phase = Literal["dense", "compress", "recover", "spread"]

# Larger signals count as not finite, so that no sum or difference of them overflows.
LARGEST = 1e300
#: Metrics of these names are fractions.
ACCURACIES = ("accuracy", "acc")
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

_Ratio = Annotated[float, Field(gt=0, le=1)]
_Signal = Annotated[float, Field(ge=-2 * LARGEST, le=2 * LARGEST)]  # an average may be rounded up
_Tally = Annotated[int, Field(ge=0)]


class Regime(NamedTuple):
    """What is in force after a step.

    Attributes:
        keep_ratio: for the next forward pass, in (0, 1].
        phase: ``dense`` at the start, ``compress`` once the ratio was lowered (or starts below 1), ``recover`` once
            budget was given back; holding changes nothing. ``spread`` throughout for a strategy that moves at each
            update.
        cycle: how often the ratio really was raised.
        event: what was decided in this step; ``None`` when no decision was due, or the strategy makes none.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)))
    >>> regime = regimewrap.RegimeCycler(model).step()
    >>> regime.phase, 0 < regime.keep_ratio < 1
    ('spread', True)
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
    best: _Signal | None = None  # of all decisions
    bests: list[_Signal | None] = field(default_factory=list)  # of those at each octave of the ratio, if guarded
    began: _Tally = 0  # the update at which the cycle began

    @classmethod
    def at_start(cls, policy: CyclePolicy) -> Self:
        """Return the state before the first decision."""
        keep_ratio = 1.0 if policy.warmup else policy.strategy.initial_keep_ratio
        if policy.strategy.each_update:
            return cls(keep_ratio, "spread")
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

    ``policy`` is a whole ``RegimePolicy`` and ``sites`` are the names of what is gated, so that one comparison tells
    whether it belongs here; ``policy["cycle"]["scaled_to"]`` is the length of the run. ``history`` has the last
    decisions, beside the exact state: nothing follows from them.
    ``pending`` and ``state.skipped`` are those of the rank that saved; ``ranks`` has everyone's, if all saved together.
    ``network`` is there if the gates have scope "network".
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    version: Literal[2]
    policy: dict[str, Any]
    sites: list[str]
    updates: Annotated[int, Field(ge=0, lt=1 << 53)]  # the rule for dense rows is exact below
    pending: list[float | None]
    state: State
    history: list[Decision]
    ranks: list[Share] | None = None
    network: Histogram | None = None

    def share(self, rank: int, ranks: int) -> Share:
        """Return the share with which a rank goes on.

        When as many ranks saved together, that is its own. When others did, it is the mean of what they had, so that
        the next signal is nearly what it would have been. When one saved alone, all go on with what that one had.
        """
        if self.ranks is None:
            return Share(self.pending, self.state.skipped)
        if len(self.ranks) == ranks:
            return self.ranks[rank]
        at_each_update = zip_longest(*(share.pending for share in self.ranks))
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


def restored(state: object, policy: RegimePolicy, sites: list[str], *, network: bool) -> Saved:
    """Return a saved state that is whole and belongs here, or raise a ``StateError``.

    This is the one place where a saved policy, its version and the sites are compared with those that are in use.

    Args:
        state: anything.
        policy: of the cycler that is to go on, and of its gate.
        sites: names of what its gate gates.
        network: whether its gates have scope "network".
    """
    if not isinstance(state, dict) or "version" not in state or not isinstance(state.get("policy"), dict):
        raise StateError(f"expected a state from RegimeCycler.state_dict; got {shown(state)}.")
    here = policy.model_dump(mode="json")
    old = state["version"] == 1 and state["version"] is not True
    if old:
        try:
            state = migrated_state(state, here, sites)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"the state is damaged: it says version 1; {type(error).__name__}: {error}.") from None
    if state["version"] != 2:
        raise StateError(f"the state has version {shown(state['version'])}; this regimewrap reads versions 1 and 2.")
    _require_same_run(state, here)
    if state.get("sites") != sites:
        raise StateError(
            f"the state belongs to another model: it gates {_listed(state.get('sites'))}; this one gates "
            f"{_listed(sites)}. Use the model the state was saved with, or start without the state."
        )
    if state["policy"] != here:
        mend = " Version 1 had full_share 0, no guard and no warm-up: set these in the cycle." if old else ""
        raise StateError(
            f"the state belongs to another policy: {'; '.join(differences(state['policy'], here))}. "
            f"Use the policy the state was saved under, or start without the state.{mend}"
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
        raise StateError("the state is damaged: its histogram is missing, or there is one without scope network.")
    for complaint in _contradictions(saved, policy.cycle):
        raise StateError(f"the state is damaged: {complaint}.")
    if old:
        warnings.warn(
            "the state has version 1 and goes on as it would have then: no rows at the full budget, no guard.",
            UserWarning,
            stacklevel=3,
        )
    return saved


def _require_same_run(state: dict[str, Any], here: dict[str, Any]) -> None:
    cycle = state["policy"].get("cycle")
    saved = cycle.get("scaled_to") if isinstance(cycle, dict) else None
    asked = here["cycle"]["scaled_to"]
    if isinstance(saved, int) and isinstance(asked, int) and saved != asked:
        raise StateError(
            f"the state belongs to a run of {saved} updates; this cycler is made for {asked}. A cycle is scaled to its "
            f"run: go on with total_steps={saved}, or start without the state."
        )


def _listed(sites: object) -> str:
    if not isinstance(sites, list):
        return shown(sites)
    names = ", ".join(map(str, sites[:4]))
    return f"{len(sites)} activations ({names}{', ...' if len(sites) > 4 else ''})"


def _contradictions(saved: Saved, policy: CyclePolicy) -> Iterator[str]:
    decisions, waiting = (0, 0) if policy.strategy.each_update else divmod(saved.updates, policy.every)
    waiting = waiting if policy.strategy.needs_signal else 0
    # A value that was refused is gone: the update it belonged to was not counted either.
    fewer = policy.on_nonfinite == "raise" or policy.monitor in ACCURACIES
    kept = min(decisions, HISTORY)
    if len(saved.history) != kept:
        yield f"{saved.updates} updates make {decisions} decisions, its history has {len(saved.history)} of {kept}"
    for pending in [saved.pending, *(share.pending for share in saved.ranks or ())]:
        if len(pending) > waiting or (len(pending) < waiting and not fewer):
            yield f"{waiting} values wait for the next decision after {saved.updates} updates, it has {len(pending)}"
    if any(record.step != number * policy.every for number, record in enumerate(saved.history, 1 + decisions - kept)):
        yield f"its history is not one decision every {policy.every} updates"
    if saved.network is not None:
        bins = saved.network.bins
        if len(bins) != len(saved.network.counts) or bins != sorted(set(bins)):
            yield "its histogram has not one count for each bin, in order"
    if saved.ranks == []:
        yield "it was saved by no rank at all"
    state, last = saved.state, saved.history[-1] if saved.history else State.at_start(policy)
    names = ("phase", "cycle", "best") if policy.strategy.each_update else ("keep_ratio", "phase", "cycle", "best")
    ratio = getattr(policy.strategy, "ratio", None) if policy.strategy.each_update else None
    if ratio is not None and state.keep_ratio != ratio(saved.updates):
        yield f"its keep ratio is not the one after {saved.updates} updates, {ratio(saved.updates):.6g}"
    if any(getattr(state, name) != getattr(last, name) for name in names):
        yield "its running state is not where its history ends"
    if (state.last_raise or 0) > max(0, decisions - 1) or state.held > decisions or state.skipped > saved.updates:
        yield "it counts more than has happened"
    if state.began > saved.updates:
        yield "its cycle begins later than it is"
    if len({state.smoothed is None, state.first is None, state.best is None}) > 1:
        yield "of smoothed, first and best some are missing"
