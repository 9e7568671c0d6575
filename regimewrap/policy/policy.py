"""What a user may set, as one frozen value: the gate, the sites, the cycle.

A policy is checked when it is built, goes to JSON and YAML and back unchanged, and says on one line what is wrong with
a mistaken one. No torch, no models and no running state here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import yaml
from pydantic import Field, field_validator, model_validator

from regimewrap.errors import DataError, PolicyError
from regimewrap.files import shown, write_whole
from regimewrap.policy import presets, reading
from regimewrap.policy.migrate import migrated_policy
from regimewrap.policy.parts import DEFAULT_KINDS, CyclePolicy, GatePolicy, SitePolicy, require_ratio
from regimewrap.policy.presets import METHOD_STEPS, PRESETS, PresetName
from regimewrap.policy.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DEFAULT_KINDS",
    "METHOD_STEPS",
    "PRESETS",
    "CyclePolicy",
    "GatePolicy",
    "PolicyLike",
    "PresetName",
    "RegimePolicy",
    "SitePolicy",
    "require_ratio",
]


class RegimePolicy(Settings):
    """All settings of a run: which activations, how they are gated, how the budget moves.

    ``RegimePolicy()`` is ``RegimePolicy.preset("mixed")``. Frozen, comparable and hashable; ``replace`` makes a
    changed copy.

    >>> policy = regimewrap.RegimePolicy.preset("sawtooth", total_steps=4800)
    >>> policy.replace(gate={"scope": "position"}).gate.scope
    'position'
    """

    schema_version: Literal[2] = Field(2, description="The version of this format.")
    gate: GatePolicy = Field(default_factory=GatePolicy)
    sites: SitePolicy = Field(default_factory=SitePolicy)
    cycle: CyclePolicy = Field(default_factory=CyclePolicy)

    @model_validator(mode="before")
    @classmethod
    def _of_this_version(cls, data: object) -> object:
        if not isinstance(data, Mapping) or data.get("schema_version") != 1 or data.get("schema_version") is True:
            return data
        migrated = migrated_policy(data)
        warnings.warn(
            "this policy has schema_version 1 and is read as it was meant then: no rows at the full budget, closed "
            "loops without a guard, ema-reset where it names no strategy. To keep that, save it again with to_file; "
            'for today\'s default, begin from RegimePolicy.preset("mixed").',
            UserWarning,
            stacklevel=2,
        )
        return migrated

    @field_validator("schema_version", mode="before")
    @classmethod
    def _known_version(cls, version: object) -> object:
        if version != 2 or isinstance(version, bool):
            raise ValueError(f"expected 2, or 1, which is migrated; got {shown(version)}.")
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
    def preset(cls, name: PresetName | str, total_steps: int | None = None, *, full_share: float | None = None) -> Self:
        """Return a ready policy.

        - ``mixed``, the default: half of each batch at the full budget, the other half at a ratio that visits [0.05, 1]
          log-uniformly, another one at each update. After two such updates come two at the full budget, and so on. It
          needs no signal and no length of a run.
        - ``sawtooth``: the other half goes from 1 to 0.05 and back at once, a dozen times. Needs the length.
        - ``loss-reset``: compresses to 0.05 and resets, early if the training loss falls behind its best at a like
          budget. Needs the length and ``step(loss)``.
        - ``accuracy-reset``, ``accuracy-relax``: the two sets of numbers that the method's author published, for
          training accuracy passed as ``step(accuracy=...)``, with the floor, the warm-up and the guard of
          ``loss-reset``. ``full_share=0`` takes them as published, without any of these. Need the length.
        - ``dense``: never gates.

        Presets that need the length of the run have ``cycle.scaled_to="run"``: their numbers belong to the method's run
        of 195,500 updates. They are rescaled here with ``total_steps``, or by ``RegimeCycler(model, total_steps=N)``,
        so that about a dozen cycles fit:

        - a cycle gets ``total_steps / 12`` updates, the warm-up of a closed loop ``total_steps / 20`` before the first;
        - ``every`` is the preset's × ``total_steps`` / 195,500, at least 8, but at most an eighth of a cycle, and at
          least 1;
        - the strategy is rescaled to the decisions of one cycle: it compresses from 1 to its floor (to 0.1, as the
          method's numbers do, if that is below 0.05) in those that it does not sit out (a cooldown takes an eighth of
          them at most); ``accuracy-relax`` gives back more, in proportion.

        A strategy that watches a signal may still reset sooner than that.

        Args:
            name: one of ``PRESETS``.
            total_steps: optimizer updates of the whole run; ``None`` leaves the scaling to the cycler.
            full_share: the share of each batch at the full budget, in [0, 1); ``None``: the preset's, 0.5.

        Raises:
            PolicyError: no preset has that name, ``total_steps`` is not a whole number of at least 1, or ``full_share``
                is outside [0, 1).

        >>> RegimePolicy.preset("sawtooth", total_steps=4800).cycle.every
        8
        """
        cycle = presets.preset(name, full_share)
        return cls(cycle=cycle if total_steps is None else presets.for_run(cycle, total_steps))

    @classmethod
    def of(cls, policy: PolicyLike | None, total_steps: int | None = None) -> RegimePolicy:
        """Return what a user may pass for a policy as a policy.

        Args:
            policy: a policy as it is, a preset's name, or the path of a policy file (a ``Path``, or text with a
                suffix or a folder). ``None``: the default policy.
            total_steps: optimizer updates of the whole run, to which a preset is scaled.

        Raises:
            PolicyError: it is none of these, there is no such preset, or the file holds no valid policy.

        >>> RegimePolicy.of("sawtooth") == RegimePolicy.preset("sawtooth")
        True
        """
        if policy is None:
            return cls()
        if isinstance(policy, RegimePolicy):
            return policy
        if isinstance(policy, str) and policy not in PRESETS and (Path(policy).suffix or os.sep in policy):
            policy = Path(policy)
        if isinstance(policy, os.PathLike):
            return cls.from_file(policy)
        if isinstance(policy, str):
            return cls.preset(policy, total_steps)
        raise PolicyError(
            f"policy must be a RegimePolicy, a preset's name ({', '.join(PRESETS)}) or the path of a policy file; "
            f"got {shown(policy)}."
        )

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
        return cls._from_text(text, reading.parse_json)

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """Return the policy that YAML text holds; what it leaves out has its default.

        Raises:
            PolicyError: the text is not plain YAML, or not a valid policy.
        """
        return cls._from_text(text, reading.parse_yaml)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Return the policy in a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            PolicyError: the file cannot be read, or holds no valid policy; each line of the message names the file.
        """
        path = Path(path)
        parse = reading.parse_json if reading.is_json(path) else reading.parse_yaml
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
        text = self.to_json() if reading.is_json(path) else self.to_yaml()
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


#: What a user may pass for a policy: one, a preset's name, or the path of a policy file.
PolicyLike: TypeAlias = RegimePolicy | PresetName | str | os.PathLike[str]
