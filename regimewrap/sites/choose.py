"""Which activations a policy gates, and why: patterns, kinds, and what an activation is for."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

from regimewrap.errors import PolicyError
from regimewrap.policy import SitePolicy
from regimewrap.sites.finder import Activation

# Class names of modules whose inner activations only compute a weight for something else, in lower case.
_GATING_BLOCKS = ("squeezeexc", "semodule", "selayer", "seblock", "channelattn", "spatialattn", "ecamodule", "cbam")


def choose(policy: SitePolicy, activation: Activation, model: nn.Module) -> tuple[bool, str]:
    """Say whether a policy gates an activation, and why, in words.

    Args:
        policy: which activations the user wants.
        activation: one that was found.
        model: where it was found; read only.
    """
    if activation.kind not in policy.kinds:
        return False, f"{activation.kind} is not among sites.kinds"
    excluded = _first_match(policy.exclude, activation.name)
    if excluded is not None:
        return False, f"excluded by {excluded!r}"
    included = _first_match(policy.include, activation.name)
    if included is None:
        return False, "not in sites.include"
    if included != "*":
        return True, f"included by {included!r}"
    block = _gating_block(activation, model)
    if block is not None:
        return False, f"{block} computes a gate, not features"
    return True, f"a hidden {activation.kind}"


def multiplier(policy: SitePolicy, name: str) -> float:
    """Return the keep ratio's multiplier at a site; the last pattern that matches wins."""
    matches = [value for pattern, value in policy.multipliers.items() if fnmatch.fnmatchcase(name, pattern)]
    return matches[-1] if matches else 1.0


def check_patterns(policy: SitePolicy, names: Sequence[str]) -> None:
    """Refuse patterns that match no activation at all.

    Raises:
        PolicyError: with the pattern and the nearest names.
    """
    for field, patterns in (
        ("include", policy.include),
        ("exclude", policy.exclude),
        ("multipliers", policy.multipliers),
    ):
        for pattern in patterns:
            if pattern != "*" and not fnmatch.filter(names, pattern):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
                raise PolicyError(
                    f"sites.{field}: {pattern!r} matches no activation of this model; nearest are {', '.join(near)}."
                )


def _first_match(patterns: Sequence[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _gating_block(activation: Activation, model: nn.Module) -> str | None:
    parts = activation.module.split(".") if activation.module else []
    for length in range(len(parts) + 1):
        name = type(model.get_submodule(".".join(parts[:length]))).__name__
        if name.replace("_", "").lower().startswith(_GATING_BLOCKS):
            return name
    return None
