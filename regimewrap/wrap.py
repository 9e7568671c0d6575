"""Find, plan, apply; and the way back. Everything a user calls on a model is here, in that order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from regimewrap.errors import AlreadyWrappedError, NoSitesError, NotWrappedError, UnreachableSiteError, WrapError
from regimewrap.gate import Site, TopKGate, find_gate
from regimewrap.policy import RegimePolicy
from regimewrap.rewrite import apply as rewriting
from regimewrap.rewrite.prepare import prepare
from regimewrap.sites.choose import check_patterns, choose, multiplier
from regimewrap.sites.finder import find
from regimewrap.sites.plan import Plan, Row

M = TypeVar("M", bound=nn.Module)


def plan(model: nn.Module, policy: RegimePolicy | None = None) -> Plan:
    """Say what ``wrap`` would do to a model, and why, without doing it.

    Args:
        model: any ``torch.nn.Module`` that is not wrapped.
        policy: what to gate; the default policy if ``None``.

    Returns:
        A row for each activation; print it.

    Raises:
        WrapError: the model is not one, is wrapped already, or is scripted as a whole.
        PolicyError: a pattern of the policy matches no activation.
    """
    root = _root(model)
    policy = _policy(policy)
    if find_gate(root) is not None:
        raise AlreadyWrappedError(f"{type(root).__name__} is wrapped already; call regimewrap.unwrap(model) first.")
    found = find(root)
    check_patterns(policy.sites, [activation.name for activation in found])
    choices = [choose(policy.sites, activation, root) for activation in found]
    prepared = prepare(root, [each for each, (wanted, _) in zip(found, choices, strict=True) if wanted], found)
    rows = []
    for activation, (wanted, why) in zip(found, choices, strict=True):
        mechanism = prepared.mechanisms.get(activation.name)
        site = None
        if mechanism is not None:
            dim = policy.gate.channel_dim
            scale = multiplier(policy.sites, activation.name)
            site = Site(activation.name, activation.kind, scale, None if dim == "auto" else dim)
        rows.append(Row(activation, mechanism, wanted, prepared.problems.get(activation.name, why), site))
    return Plan(type(root).__name__, tuple(rows), prepared.rebindings)


def wrap(model: M, policy: RegimePolicy | None = None, *, strict: bool = True) -> M:
    """Put one shared top-k gate behind the chosen activations of a model, in place.

    Args:
        model: any ``torch.nn.Module``; DDP's or ``torch.compile``'s wrapper around one works too.
        policy: what to gate and how; the default policy if ``None``.
        strict: raise if the policy selects an activation that cannot be gated soundly; otherwise warn.

    Returns:
        The same object. What changes on it: activation modules get a forward hook; a module whose methods call an
        activation function gets a subclass of its class with the same name, in which these methods are rewritten; the
        model itself gets one private attribute. Parameters, buffers, ``state_dict`` keys, modes, the random number
        generator and the users' hooks are not touched; at keep ratio 1 outputs and gradients are bit for bit those of
        the bare model. ``copy.deepcopy`` gives a copy with a gate of its own. Wrap before ``fully_shard``.

    Raises:
        NoSitesError: the policy selects nothing; the message lists the activations that were seen.
        AlreadyWrappedError: the model is wrapped.
        UnreachableSiteError: ``strict``, and a selected activation cannot be reached.
        PolicyError: a pattern of the policy matches no activation.
        WrapError: not a model, or scripted. After any failure the model is as it was.
    """
    root = _root(model)
    policy = _policy(policy)
    planned = plan(root, policy)
    if planned.unreachable:
        lines = "; ".join(f"{row.name} ({row.why})" for row in planned.unreachable)
        message = (
            f"{planned.model}: the policy selects activations that cannot be gated: {lines}. "
            "Exclude them in sites.exclude, or pass strict=False to gate the others only."
        )
        if strict:
            raise UnreachableSiteError(message)
        warnings.warn(message, stacklevel=2)
    if not planned.gated:
        seen = ", ".join(f"{row.name} ({row.activation.kind}: {row.why})" for row in planned.rows[:12]) or "none at all"
        more = f" and {len(planned) - 12} more" if len(planned) > 12 else ""
        raise NoSitesError(
            f"{planned.model} has no activation that the policy selects. Activations seen: {seen}{more}. "
            "Widen sites.kinds or sites.include."
        )
    rewriting.apply(root, planned, TopKGate(policy))
    _forget_compiled(model)
    return model


def unwrap(model: M) -> M:
    """Take everything off that ``wrap`` put on a model.

    Args:
        model: a wrapped model, or a module around one.

    Returns:
        The same object, exactly what it was; it can be wrapped again.

    Raises:
        NotWrappedError: it is not wrapped.
    """
    root = _root(model)
    if find_gate(root) is None:
        raise NotWrappedError(f"{type(root).__name__} is not wrapped; there is nothing to unwrap.")
    rewriting.undo(root)
    _forget_compiled(model)
    return model


def _policy(policy: RegimePolicy | Mapping[str, Any] | None) -> RegimePolicy:
    if policy is None:
        return RegimePolicy()
    if not isinstance(policy, RegimePolicy):
        raise WrapError(
            f"policy must be a regimewrap.RegimePolicy; got {type(policy).__name__}. "
            "RegimePolicy.preset(name) and RegimePolicy.from_file(path) make one."
        )
    return policy


def _root(model: nn.Module) -> nn.Module:
    """Look through wrappers to the user's own model."""
    if not isinstance(model, nn.Module):
        hint = " (call wrap(model), not wrap(model.forward) or wrap(ModelClass))" if callable(model) else ""
        raise WrapError(f"expected a torch.nn.Module; got {type(model).__name__}{hint}.")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        name = getattr(model, "original_name", type(model).__name__)
        raise WrapError(f"{name} is a TorchScript module, whose code cannot be gated; wrap before torch.jit.script.")
    return model


def _forget_compiled(model: nn.Module) -> None:
    # Compiled code does not look at hooks that came later (pytorch #117758), so it must be compiled again.
    compiled = isinstance(model, torch._dynamo.OptimizedModule) or any(
        module._compiled_call_impl is not None for module in model.modules()
    )
    if compiled:
        torch.compiler.reset()
        warnings.warn(
            "The model was compiled before: torch.compiler.reset() was called so that it is compiled anew. "
            "Wrap before torch.compile to avoid that.",
            stacklevel=3,
        )
