"""Find, plan, apply; and the way back. Everything a user calls on a model is here, in that order."""

from __future__ import annotations

import gc
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from regimewrap.errors import AlreadyWrappedError, NoSitesError, NotWrappedError, UnreachableSiteError, WrapError
from regimewrap.gate.compiled import notice_hooks
from regimewrap.gate.gate import TopKGate, at_keep_ratio, find_gate, whole_of
from regimewrap.measure.batchnorm import of_another_budget
from regimewrap.measure.verify import verify
from regimewrap.policy.policy import PolicyLike, RegimePolicy
from regimewrap.rewrite import apply as rewriting
from regimewrap.rewrite.prepare import prepare
from regimewrap.sites.choose import check, choose, site_for
from regimewrap.sites.finder import find
from regimewrap.sites.flow.purpose import Purpose
from regimewrap.sites.plan import Plan, Row
from regimewrap.sites.probe import activation_shapes, as_call, run
from regimewrap.torch_private import compiles_itself, is_compiled_module, original_of, tree_leaves

M = TypeVar("M", bound=nn.Module)


def plan(model: nn.Module, policy: PolicyLike | None = None, *, example_inputs: Any = None) -> Plan:
    """Say what ``wrap`` would do to a model, and why, without doing it.

    Args:
        model: any ``torch.nn.Module`` that is not wrapped.
        policy: what to gate: a policy, a preset's name or a policy file; ``None``: the default.
        example_inputs: what the model can be called with: a tuple of positional arguments, a mapping of keyword ones,
            or a single one. With it the model is run once, without a trace left, and the shapes of its activations
            help to tell features from the weights that gates compute.

    Returns:
        A row for each activation; print it.

    Raises:
        WrapError: the model is not one, is wrapped already, or is scripted as a whole.
        PolicyError: the policy names kinds or patterns that the model does not have, or contradicts itself.
    """
    root = _root(model)
    policy = RegimePolicy.of(policy)
    gate = find_gate(root)
    if gate is not None:
        whole = whole_of(root, gate)
        is_wrapped = "is wrapped already" if whole is None else f"is a part of a wrapped {type(whole).__name__}"
        raise AlreadyWrappedError(f"{type(root).__name__} {is_wrapped}; call regimewrap.unwrap(model) on that first.")
    found = find(root)
    check(policy.sites, [activation.name for activation in found])
    purpose = Purpose(root, activation_shapes(root, example_inputs) if example_inputs is not None else None)
    choices = [choose(policy.sites, activation, purpose) for activation in found]
    wanted = [activation for activation, (chosen, _) in zip(found, choices, strict=True) if chosen]
    places = {each.name: site_for(policy, each, root) for each in wanted}
    prepared = prepare(root, [each for each in wanted if places[each.name] is not None])
    rows = []
    for activation, (chosen, why) in zip(found, choices, strict=True):
        name = activation.name
        if chosen and places[name] is None:
            why = "nothing tells which of its dimensions holds the channels; set gate.channel_dim"
        mechanism = prepared.mechanisms.get(name)
        site = places[name] if mechanism is not None else None
        rows.append(Row(activation, mechanism, chosen, prepared.problems.get(name, why), site))
    return Plan(type(root).__name__, tuple(rows), prepared.rebindings)


def wrap(model: M, policy: PolicyLike | None = None, *, example_inputs: Any = None, strict: bool = True) -> M:
    """Put one shared top-k gate behind the chosen activations of a model, in place.

    Args:
        model: any ``torch.nn.Module``; DDP's or ``torch.compile``'s wrapper around one works too.
        policy: what to gate and how: a policy, a preset's name or a policy file; ``None``: the default.
        example_inputs: as for ``plan``. With it the wrapped model is also compared with the bare one: the same output,
            bit for bit, at full budget, and no selected activation that runs without a gate.
        strict: raise if the policy selects an activation that cannot be gated soundly; otherwise warn.

    Returns:
        The same object. What changes on it: activation modules get forward hooks (a ReLU its ``forward`` too); a module
        whose methods call an activation function gets a subclass of its class with the same name, in which these
        methods are rewritten; an activation that something outside the model holds too is replaced by a copy; the
        model itself gets one private attribute. Parameters, buffers, ``state_dict`` keys, modes, the random number
        generator and the users' hooks are not touched; at keep ratio 1 outputs and gradients are bit for bit those of
        the bare model. ``copy.deepcopy`` gives a copy with a gate of its own. Wrap before ``fully_shard``.

    Raises:
        NoSitesError: the policy selects nothing; the message lists the activations that were seen.
        AlreadyWrappedError: the model is wrapped.
        UnreachableSiteError: ``strict``, and a selected activation cannot be reached.
        PolicyError: the policy names kinds or patterns that the model does not have, or contradicts itself.
        WrapError: not a model, scripted, or its output changed. After any failure the model is as it was.
    """
    root = _root(model)
    policy = RegimePolicy.of(policy)
    planned = plan(root, policy, example_inputs=example_inputs)
    if planned.unreachable:
        lines = "; ".join(f"{row.name} ({row.why})" for row in planned.unreachable)
        _refuse(f"{planned.model}: the policy selects activations that cannot be gated: {lines}", strict)
    if not planned.gated:
        seen = ", ".join(f"{row.name} ({row.activation.kind}: {row.why})" for row in planned.rows[:12]) or "none at all"
        more = f" and {len(planned) - 12} more" if len(planned) > 12 else ""
        raise NoSitesError(
            f"{planned.model} has no activation that the policy selects. Activations seen: {seen}{more}. "
            "Widen sites.kinds or sites.include."
        )
    _warn_if_causal(root, policy)
    bare = run(root, example_inputs) if example_inputs is not None else None
    rewriting.apply(root, planned, TopKGate(policy))
    if example_inputs is not None:
        try:
            _compare(root, bare, example_inputs, strict)
        except BaseException:
            rewriting.undo(root)
            raise
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
        WrapError: it is a part of a wrapped model, whose other parts would stay gated.
    """
    root = _root(model)
    gate = find_gate(root)
    if gate is None:
        raise NotWrappedError(f"{type(root).__name__} is not wrapped; there is nothing to unwrap.")
    if whole_of(root, gate) is not None:
        gc.collect()  # a model that nobody holds any more may still be there, in a cycle
    whole = whole_of(root, gate)
    if whole is not None:
        path = next(path for path, module in whole.named_modules() if module is root)
        raise WrapError(
            f"{type(root).__name__} is a part ({path}) of a wrapped {type(whole).__name__}; unwrap that. "
            "To leave a part of a model alone, wrap it with sites.exclude."
        )
    notice = of_another_budget(root, [1.0])
    served: Any = gate.__dict__.get("served")
    if served is not None:  # regimewrap.serve changed the model after wrap did, so its changes go first
        served.close()
    rewriting.undo(root)
    gate.released = True
    _forget_compiled(model)
    if notice is not None:
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
    return model


def _compare(model: nn.Module, bare: Any, example_inputs: Any, strict: bool) -> None:
    with at_keep_ratio(model, 1.0):
        full = run(model, example_inputs)
    before, after = tree_leaves(bare), tree_leaves(full)
    if len(before) != len(after) or not all(map(_equal, before, after)):
        raise WrapError(
            f"{type(model).__name__}: the wrapped model's output at full budget is not that of the bare one, so the "
            "model is left as it was. Is it random beyond torch's generators? If not, this is a fault of regimewrap."
        )
    args, kwargs = as_call(example_inputs)
    with torch.no_grad():
        coverage = verify(model, *args, **kwargs)
    if coverage.escaped:
        _refuse(f"{type(model).__name__}: activations ran without a gate: {', '.join(coverage.escaped)}", strict)


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.is_meta:
        return True
    return a.shape == b.shape and bool(torch.all((a == b) | ((a != a) & (b != b))))


def _refuse(message: str, strict: bool) -> None:
    message += ". Exclude them in sites.exclude, or pass strict=False to gate the others only."
    if strict:
        raise UnreachableSiteError(message)
    warnings.warn(message, stacklevel=3)


def _warn_if_causal(model: nn.Module, policy: RegimePolicy) -> None:
    if policy.gate.scope in ("position", "network"):
        return
    generates = getattr(model, "can_generate", None)
    causal = any(getattr(module, "is_causal", None) is True for module in model.modules())
    if causal or (callable(generates) and generates() is True):
        warnings.warn(
            f"{type(model).__name__} looks like a causal model, or holds one: with scope={policy.gate.scope!r} later "
            'tokens, frames or time steps decide what earlier ones keep. Use GatePolicy(scope="position").',
            stacklevel=3,
        )


def _root(model: nn.Module) -> nn.Module:
    """Look through wrappers to the user's own model."""
    if not isinstance(model, nn.Module):
        hint = " (call wrap(model), not wrap(model.forward) or wrap(ModelClass))" if callable(model) else ""
        raise WrapError(f"expected a torch.nn.Module; got {type(model).__name__}{hint}.")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif is_compiled_module(model):
            model = original_of(model)
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        name = getattr(model, "original_name", type(model).__name__)
        raise WrapError(f"{name} is a TorchScript module, whose code cannot be gated; wrap before torch.jit.script.")
    return model


def _forget_compiled(model: nn.Module) -> None:
    notice_hooks()
    # What this model runs was compiled for the other state of it.
    compiled = is_compiled_module(model) or any(compiles_itself(module) for module in model.modules())
    if compiled:
        torch.compiler.reset()
        warnings.warn(
            "The model was compiled before: torch.compiler.reset() was called so that it is compiled anew. "
            "Wrap before torch.compile to avoid that.",
            stacklevel=3,
        )
