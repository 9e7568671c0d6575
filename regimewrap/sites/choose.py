"""Which activations a policy gates, and why: patterns, kinds, and what an activation is for."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

from regimewrap.errors import PolicyError
from regimewrap.files import nearest
from regimewrap.gate.gate import Site
from regimewrap.policy.policy import RegimePolicy, SitePolicy
from regimewrap.sites import catalog
from regimewrap.sites.catalog import KINDS
from regimewrap.sites.finder import Activation
from regimewrap.sites.flow.layout import AmbiguousError, channel_dim_of
from regimewrap.sites.flow.purpose import Purpose


def choose(policy: SitePolicy, activation: Activation, purpose: Purpose) -> tuple[bool, str]:
    """Say whether a policy gates an activation, and why, in words.

    Args:
        policy: which activations the user wants.
        activation: one that was found.
        purpose: what the model's activations are for.
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
    reason = purpose.left_alone(activation)
    if reason is not None:
        return False, reason
    return True, f"a hidden {activation.kind}{purpose.note(activation)}"


def site_for(policy: RegimePolicy, activation: Activation, purpose: Purpose) -> Site | None:
    """Return an activation's place under the gate: its multiplier and, for position scope, its channel dimension.

    ``None`` if nothing tells that dimension and the last one would be a bad guess: in a plain function, and in a method
    whose layers have their channels in different places.
    """
    dim: int | None = None
    if policy.gate.scope == "position":
        asked = policy.gate.channel_dim
        try:
            dim = channel_dim_of(purpose.flow, activation, purpose.calls(activation)) if asked == "auto" else asked
        except AmbiguousError:
            return None
        if dim is None and activation.through:
            return None
    scales = policy.sites.multipliers.items()
    scale = next((value for pattern, value in scales if fnmatch.fnmatchcase(activation.name, pattern)), 1.0)
    return Site(activation.name, activation.kind, scale, dim)


def could_run(pattern: str, model: nn.Module) -> Activation | None:
    """Return what ``verify`` would call ``pattern``: an activation that runs, though no code of a module shows it."""
    path, _, name = pattern.rpartition(".")
    kind = catalog.TENSOR_METHODS.get(name) or catalog.kind_of_name(name)
    if kind is None or path not in dict(model.named_modules()):
        return None
    owner = path or type(model).__name__
    return Activation(pattern, name, kind, path, problem=f"the code of {owner} does not show where it is called")


def check(policy: SitePolicy, names: Sequence[str], model: nn.Module | None = None) -> None:
    """Refuse a policy that cannot mean what it says for a model.

    Args:
        policy: which activations the user wants.
        names: the names of all activations of the model.
        model: what ``verify`` may have named in it is accepted, too.

    Raises:
        PolicyError: a kind is unknown, a pattern matches no activation, everything that one includes is excluded, or
            two multipliers contradict each other at a site.
    """
    for kind in policy.kinds:
        if kind not in KINDS:
            raise PolicyError(f"sites.kinds: {kind!r} is none of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    for field, patterns in (
        ("include", policy.include),
        ("exclude", policy.exclude),
        ("multipliers", policy.multipliers),
    ):
        for pattern in patterns:
            if pattern != "*" and not fnmatch.filter(names, pattern):
                if model is not None and could_run(pattern, model) is not None:
                    continue
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
                raise PolicyError(
                    f"sites.{field}: {pattern!r} matches no activation of this model; nearest are {', '.join(near)}."
                )
    for pattern in policy.include:
        matched = fnmatch.filter(names, pattern)
        if matched and all(_first_match(policy.exclude, name) for name in matched):
            raise PolicyError(
                f"sites.include: all that {pattern!r} matches is in sites.exclude too; remove one of them."
            )
    for name in names:
        scales = {pattern: value for pattern, value in policy.multipliers.items() if fnmatch.fnmatchcase(name, pattern)}
        if len(set(scales.values())) > 1:
            raise PolicyError(f"sites.multipliers: {name} matches {scales}; leave one of these patterns, or one value.")


def _first_match(patterns: Sequence[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)
