"""What a user may set, as one frozen value: the gate, the sites, the cycle.

A policy is checked when it is built, goes to JSON and YAML and back unchanged, and says on one line what is wrong with
a mistaken one. No torch, no models and no running state here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from regimewrap.errors import DataError, PolicyError
from regimewrap.files import nearest, shown, write_whole
from regimewrap.policy.settings import (
    Count,
    Positive,
    Ratio,
    Settings,
    Weight,
    Whole,
    percent_hint,
    whole_number,
)
from regimewrap.policy.strategies import ByKind, Dense, EmaRelax, EmaReset, Sawtooth, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable

#: Activation families that are gated unless the policy says otherwise.
DEFAULT_KINDS = ("relu", "gelu", "silu", "hardswish", "mish", "elu", "prelu")

#: Optimizer updates of the method's own run: 500 epochs of 391 batches.
METHOD_STEPS = 195_500

Name = Annotated[str, Field(min_length=1)]


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
    """How units are selected."""

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
    """Which activations are gated. A pattern is a dotted name with ``*``, ``?`` and ``[...]``."""

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

    The defaults are the preset ``loss-reset``. The interval, decay and cooldown are the method's; the smoothing and
    the tolerance are ours: 0.12 of accuracy, the method's, is about 0.12 of the progress from chance to 100 %.
    """

    strategy: Annotated[Strategy, ByKind()] = Field(
        default_factory=EmaReset, description="The rule for the next ratio."
    )
    monitor: Name = Field("loss", description="The signal: loss, or the name of a metric passed to step.")
    mode: Literal["min", "max"] = Field("min", description="Whether smaller or larger values are better.")
    every: Count = Field(128, description="Optimizer updates between two decisions.")
    smoothing: Weight = Field(0.9, description="Weight on the past, per update.")
    tolerance_kind: Literal["absolute", "relative", "progress"] = Field(
        "progress", description="The unit of the strategy's tolerance."
    )
    on_nonfinite: Literal["skip", "raise"] = Field("skip", description="What to do with NaN and infinities.")


class RegimePolicy(Settings):
    """All settings of a run: which activations, how they are gated, how the budget moves.

    ``RegimePolicy()`` is ``RegimePolicy.preset("loss-reset")``. Frozen, comparable and hashable; ``replace`` makes a
    changed copy.
    """

    schema_version: Literal[1] = Field(1, description="The version of this format.")
    gate: GatePolicy = Field(default_factory=GatePolicy)
    sites: SitePolicy = Field(default_factory=SitePolicy)
    cycle: CyclePolicy = Field(default_factory=CyclePolicy)

    @field_validator("schema_version", mode="before")
    @classmethod
    def _known_version(cls, version: object) -> object:
        if version != 1 or isinstance(version, bool):
            raise ValueError(f"expected 1, the only version that this regimewrap reads; got {shown(version)}.")
        return version

    @model_validator(mode="after")
    def _has_no_multipliers_of_one_threshold(self) -> Self:
        if self.gate.scope == "network" and self.sites.multipliers:
            raise ValueError(
                f"sites.multipliers must be empty with gate.scope='network', where one threshold holds at all sites; "
                f"got {shown(self.sites.multipliers)}."
            )
        return self

    @classmethod
    def preset(cls, name: str, total_steps: int | None = None) -> Self:
        """Return a ready policy.

        ``loss-reset`` (the default policy) watches the training loss. ``accuracy-reset`` and ``accuracy-relax`` have
        the two sets of numbers that the method's author published, for training accuracy passed as
        ``step(accuracy=...)``. ``sawtooth`` needs no signal. ``dense`` never gates.

        With ``total_steps`` the same policy is rescaled so that about a dozen cycles fit, as in the method's run of
        195,500 updates, where a compression from 1 to 0.1 takes a twelfth:

        - a cycle gets ``total_steps / 12`` updates;
        - ``every`` is the preset's × ``total_steps`` / 195,500, at least 8, but at most an eighth of a cycle, and at
          least 1;
        - the strategy is rescaled to the decisions of one cycle: it compresses from 1 to 0.1 in those that it does not
          sit out (a cooldown takes an eighth of them at most); ``accuracy-relax`` gives back more, in proportion.

        A strategy that watches a signal may still reset sooner or later than that.

        Args:
            name: one of ``PRESETS``.
            total_steps: optimizer updates of the whole run; ``None`` keeps the preset's numbers.

        Raises:
            PolicyError: no preset has that name, or ``total_steps`` is not a whole number of at least 1.
        """
        build = _PRESETS.get(name) if isinstance(name, str) else None
        if build is None:
            raise PolicyError(f"preset must be one of {', '.join(PRESETS)}; got {shown(name)}.{nearest(name, PRESETS)}")
        cycle = build()
        if total_steps is not None:
            cycle = _rescaled(cycle, whole_number("total_steps", total_steps))
        return cls(cycle=cycle)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of a policy file, with every strategy known now."""
        return cls.model_json_schema()

    def to_json(self) -> str:
        """Return the policy as JSON text."""
        return self.model_dump_json(indent=2) + "\n"

    def to_yaml(self) -> str:
        """Return the policy as YAML text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the policy that JSON text holds; what it leaves out has its default.

        Raises:
            PolicyError: the text is not JSON, or not a valid policy.
        """
        return cls._from_text(text, _parse_json)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Return the policy that YAML text holds; what it leaves out has its default.

        Raises:
            PolicyError: the text is not plain YAML, or not a valid policy.
        """
        return cls._from_text(text, _parse_yaml)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Return the policy in a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            PolicyError: the file cannot be read, or holds no valid policy; each line of the message names the file.
        """
        path = Path(path)
        parse = _parse_json if _is_json(path) else _parse_yaml
        try:
            return cls._from_text(path.read_text(encoding="utf-8-sig"), parse)
        except UnicodeDecodeError:
            raise PolicyError(f"{path}: expected UTF-8 text; save the file as UTF-8.") from None
        except OSError as error:
            raise PolicyError(f"{path}: cannot read a policy file here: {error.strerror or error}.") from None
        except PolicyError as error:
            raise PolicyError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a ``.yaml``, ``.yml`` or ``.json`` file, whole or not at all.

        Raises:
            PolicyError: the suffix is another, or the file cannot be written; a file that was there is as it was.
        """
        path = Path(path)
        text = self.to_json() if _is_json(path) else self.to_yaml()
        try:
            write_whole(path, text)
        except DataError as error:
            raise PolicyError(str(error)) from None

    @classmethod
    def _from_text(cls, text: str, parse: Callable[[str], object]) -> Self:
        if not isinstance(text, str):
            raise PolicyError(f"expected a policy as text; got {shown(text)}. For a file, use from_file.")
        try:
            data = parse(text)
        except RecursionError:
            raise PolicyError("a policy is nested three levels deep at most; this is far deeper.") from None
        if data is None:
            raise PolicyError("the policy is empty; for one with all defaults write {}")
        if not isinstance(data, dict):
            fields = ", ".join(cls.model_fields)
            raise PolicyError(f"a policy is a mapping of settings ({fields}); got {shown(data)}.")
        return cls.model_validate(data)


def _is_json(path: Path) -> bool:
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise PolicyError(f"{path}: a policy file's name ends in .yaml, .yml or .json; got {path.suffix!r}.")
    return path.suffix.lower() == ".json"


def _parse_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PolicyError(f"this is not JSON: {error}.") from None


def _parse_yaml(text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        mend = " A policy is plain data: remove the tag." if "tag" in str(error.problem) else ""
        raise PolicyError(f"this YAML cannot be used: {_yaml_reason(error)}.{mend}") from None
    except yaml.YAMLError as error:
        raise PolicyError(f"this is not YAML: {_yaml_reason(error)}.") from None
    except ValueError as error:  # an impossible date, an endless number
        raise PolicyError(f"this YAML has a value that cannot be read: {error}.") from None


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(str(error.problem).split())}"
    return " ".join(str(error).split())


_ACCURACY: dict[str, Any] = {"monitor": "accuracy", "mode": "max", "tolerance_kind": "absolute"}

# Built when asked for, which keeps `import regimewrap` quick.
_PRESETS: dict[str, Callable[[], CyclePolicy]] = {
    "loss-reset": CyclePolicy,
    "accuracy-reset": lambda: CyclePolicy(strategy=EmaReset(), every=128, smoothing=0.5, **_ACCURACY),
    "accuracy-relax": lambda: CyclePolicy(strategy=EmaRelax(), every=50, smoothing=0.9, **_ACCURACY),
    "sawtooth": lambda: CyclePolicy(strategy=Sawtooth()),
    "dense": lambda: CyclePolicy(strategy=Dense()),
}

#: The names that ``RegimePolicy.preset`` takes.
PRESETS: tuple[str, ...] = tuple(_PRESETS)


def _rescaled(cycle: CyclePolicy, total_steps: int) -> CyclePolicy:
    """Apply the rule that ``RegimePolicy.preset`` states, in whole numbers so that no length is too long."""
    every = max(8, (cycle.every * total_steps + METHOD_STEPS // 2) // METHOD_STEPS)
    every = max(1, min(every, total_steps // (12 * 8)))
    decisions = max(1, total_steps // (12 * every))
    return cycle.replace(every=every, strategy=cycle.strategy.rescaled(decisions))
