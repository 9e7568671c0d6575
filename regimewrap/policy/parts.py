"""The three parts of a policy: the gate, the sites, the cycle. Checked when built; no torch here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from regimewrap.errors import PolicyError
from regimewrap.files import shown
from regimewrap.policy.settings import (
    Count,
    Natural,
    Positive,
    Ratio,
    Settings,
    Weight,
    Whole,
    percent_hint,
)
from regimewrap.policy.strategies import ByKind, Spread, Strategy

#: Activation families that are gated unless the policy says otherwise.
DEFAULT_KINDS = ("relu", "gelu", "silu", "hardswish", "mish", "elu", "prelu")

Name = Annotated[str, Field(min_length=1)]


def _length(value: object) -> object:
    if value is None or value == "run" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("length", "Input should be null, 'run' or a whole number ≥ 1")


LENGTH = BeforeValidator(_length)


def require_ratio(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a fraction in (0, 1].

    Args:
        name: what the message calls it.
        value: anything; numbers (not booleans) can pass.

    Raises:
        PolicyError: it is not.
    """
    try:
        ratio = float("nan") if isinstance(value, bool | str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        ratio = float("nan")
    if 0.0 < ratio <= 1.0:
        return ratio
    raise PolicyError(f"{name} must be a fraction in (0, 1]; got {shown(value)}.{percent_hint(name, value)}")


class GatePolicy(Settings):
    """How units are selected.

    >>> policy = regimewrap.RegimePolicy(gate=regimewrap.GatePolicy(scope="position", ties="exact"))
    """

    scope: Literal["sample", "position", "batch", "network"] = Field(
        "sample",
        description="Units compete within a sample, a position (a token or pixel, over channels), the whole batch, or "
        "the whole network, at one threshold from the step before. Only position and network are safe in a causal "
        "model.",
    )
    score: Literal["magnitude", "value"] = Field("magnitude", description="What makes a unit large.")
    relative_to: Literal["all", "active"] = Field("all", description="The units of which a share is kept.")
    ties: Literal["keep", "exact"] = Field("keep", description="Keep units that tie with the last one, or cut to k.")
    gradient: Literal["masked", "straight_through"] = Field(
        "masked", description="Gradients flow through the kept units only, or through all."
    )
    eval_keep_ratio: Ratio | Literal["current"] = Field(1.0, description="The keep ratio in eval mode.")
    channel_dim: Literal["auto"] | Whole = Field("auto", description="The dimension that position scope selects over.")

    @model_validator(mode="after")
    def _has_one_threshold(self) -> Self:
        if self.scope == "network":
            for name, value, only in (("score", self.score, "magnitude"), ("ties", self.ties, "keep")):
                if value != only:
                    raise ValueError(f"{name} must be {only!r} with scope='network'; got {value!r}.")
        return self


class SitePolicy(Settings):
    """Which activations are gated. A pattern is a dotted name with ``*``, ``?`` and ``[...]``.

    >>> policy = regimewrap.RegimePolicy(sites=regimewrap.SitePolicy(exclude=("head.*",), min_units=64))
    """

    include: tuple[Name, ...] = Field(("*",), description="Patterns of the names to gate.")
    exclude: tuple[Name, ...] = Field((), description="Patterns of the names to leave alone; wins over include.")
    kinds: tuple[Name, ...] = Field(DEFAULT_KINDS, description="The activation families to gate.")
    min_units: Count = Field(1, description="Leave activations alone that have fewer units a sample.")
    multipliers: dict[Name, Positive] = Field(
        default_factory=dict, description="Factors of the keep ratio at the sites that a pattern matches."
    )


class CyclePolicy(Settings):
    """How the keep ratio moves.

    Every ``every`` optimizer updates the strategy looks at the monitored signal, an exponential average with weight
    ``smoothing`` on the past, and at how far it is behind the best it was at any decision. ``tolerance_kind`` says in
    what unit that fall, and so the strategy's tolerance, is measured:

    - ``absolute``: in the signal's own unit. 0.12 of accuracy is 12 points.
    - ``relative``: as a share of the size of the best value, ``|best|``.
    - ``progress``: as a share of the progress made, ``|first − best|``, where ``first`` is the signal at the first
      decision. 0.12 means that 12 % of what was gained has been lost. It is the same for any scale and offset of the
      signal, so one number serves cross-entropy, regression and language models. As long as there is no progress,
      any fall is infinite.

    A strategy that moves at each update, such as ``spread``, looks at none of this.

    In train mode a part of each batch, ``full_share`` of its rows, runs at the full budget whatever the ratio is; the
    other rows run at the ratio. Which rows these are follows from their place in the first dimension and the number of
    the update: see ``TopKGate.set_budget``. Where samples are flattened into it (tokens, frames), an even batch has the
    same samples dense everywhere; of an odd one, the sample in the middle may be dense in part. Batches of one take
    turns, update by update. That is the one case in which short trainings lost accuracy at full budget (up to 12 points
    in 2,500 updates, 2 in 6,000): take larger batches there, or train longer. 0 is the method as published.

    ``guarded`` keeps a rule that watches a signal from sinking to its floor and staying there. A value reached under
    the gate, while the net still learns, is a best that the signal never falls behind. So in a guarded cycle the signal
    is only compared with the best at a like budget, which is one octave of the keep ratio: (1/2, 1], (1/4, 1/2], ...
    The loss of the whole batch will do for that: its dense rows add nearly the same to both. At the full budget a fall
    counts for nothing. And a cycle that has
    reached its floor, or has had a twelfth of the run (if it is scaled to a run), ends in a reset whatever the signal
    says. Strategies without a signal are not changed by it.

    ``scaled_to`` says which length of a run the numbers belong to. ``None``: they are updates and decisions as written.
    ``"run"``: they belong to the method's run of 195,500 updates and are rescaled when
    ``RegimeCycler(model, total_steps=N)`` is built. A number: they have been rescaled to a run of so many updates.

    >>> regimewrap.CyclePolicy(strategy={"kind": "constant", "keep_ratio": 0.2}).full_share
    0.5
    """

    strategy: Annotated[Strategy, ByKind()] = Field(default_factory=Spread, description="The rule for the next ratio.")
    full_share: Weight = Field(0.5, description="The share of each batch at the full budget in train mode.")
    scaled_to: Annotated[Literal["run"] | int | None, LENGTH] = Field(
        None, description="The length of the run that the numbers belong to."
    )
    warmup: Natural = Field(0, description="Optimizer updates at the full budget before the first cycle.")
    guarded: bool = Field(True, description="End a cycle at its floor, and compare signals of like budgets only.")
    monitor: Name = Field("loss", description="The signal: loss, or the name of a metric passed to step.")
    mode: Literal["min", "max"] = Field("min", description="Whether smaller or larger values are better.")
    every: Count = Field(128, description="Optimizer updates between two decisions.")
    smoothing: Weight = Field(0.9, description="Weight on the past, per update.")
    tolerance_kind: Literal["absolute", "relative", "progress"] = Field(
        "progress", description="The unit of the strategy's tolerance."
    )
    on_nonfinite: Literal["skip", "raise"] = Field("skip", description="What to do with NaN and infinities.")
