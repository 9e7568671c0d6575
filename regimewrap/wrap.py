"""Find, plan, apply; and the way back. Everything a user calls on a model is here, in that order."""

from __future__ import annotations

import gc
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from regimewrap.errors import AlreadyWrappedError, NoSitesError, NotWrappedError, UnreachableSiteError, WrapError
from regimewrap.gate.compiled import forget_hooks, notice_hooks
from regimewrap.gate.gate import TopKGate, at_keep_ratio, find_gate, whole_of
from regimewrap.measure.batchnorm import of_another_budget
from regimewrap.measure.verify import watched
from regimewrap.policy.policy import PolicyLike, RegimePolicy
from regimewrap.rewrite import apply as rewriting
from regimewrap.rewrite.prepare import prepare
from regimewrap.sites.plan import Plan, Row
from regimewrap.sites.probe import as_call, own
from regimewrap.sites.read.memory import remembering
from regimewrap.sites.survey import Survey, survey
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

    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> print(regimewrap.plan(model))
    Sequential: 1 of 1 activations gated
    site  activation  mechanism  gated  why
    1     ReLU        hook       yes    a hidden relu
    """
    root = _root(model)
    with remembering():
        return _plan(root, RegimePolicy.of(policy), example_inputs)[0]


def _plan(root: nn.Module, policy: RegimePolicy, example_inputs: Any) -> tuple[Plan, Survey]:
    """Return the plan, and all that was found out for it."""
    gate = find_gate(root)
    if gate is not None:
        name, whole, sharing = type(root).__name__, whole_of(root, gate), _sharing(root, gate)
        if sharing is not None:
            owner = type(sharing[0]).__name__
            raise AlreadyWrappedError(
                f"{name} shares {sharing[1]} with a wrapped {owner}. To have one gate for both, unwrap the {owner} and "
                "wrap a module that holds both, such as torch.nn.ModuleList([a, b])."
            )
        is_wrapped = "is wrapped already" if whole is None else f"is a part of a wrapped {type(whole).__name__}"
        raise AlreadyWrappedError(f"{name} {is_wrapped}; call regimewrap.unwrap(model) on that first.")
    found = survey(root, policy, example_inputs)
    prepared = prepare(root, [each.activation for each in found.verdicts if each.site is not None])
    rows = []
    for each in found.verdicts:
        name = each.activation.name
        mechanism = prepared.mechanisms.get(name)
        why = each.activation.problem if each.selected and each.activation.problem else each.why
        site = each.site if mechanism is not None else None
        rows.append(Row(each.activation, mechanism, each.selected, prepared.problems.get(name, why), site))
    return Plan(type(root).__name__, tuple(rows), prepared.changes), found


def wrap(model: M, policy: PolicyLike | None = None, *, example_inputs: Any = None, strict: bool = True) -> M:
    """Put one shared top-k gate behind the chosen activations of a model, in place.

    Args:
        model: any ``torch.nn.Module``; DDP's or ``torch.compile``'s wrapper around one works too.
        policy: what to gate and how: a policy, a preset's name or a policy file; ``None``: the default.
        example_inputs: as for ``plan``. With it the wrapped model is also compared with the bare one: the same output,
            bit for bit, at full budget, and no selected activation that runs without a gate.
        strict: raise if the policy selects an activation that cannot be gated soundly; otherwise warn.

    Returns:
        The same object. What changes on it: activation modules get forward hooks; modules that call an activation get
        one private attribute each, with their gates; an activation that anything outside the model holds too is
        replaced by a copy. Classes stay what they are, but while a wrapped model lives, functions of them that call an
        activation run other code, which asks each module for its gates and else does what it did. Parameters, buffers,
        ``state_dict`` keys, modes, the random number generator and the users' hooks are not touched; at keep ratio 1
        outputs and gradients are bit for bit those of the bare model. ``copy.deepcopy`` gives a copy with a gate of
        its own.

    Raises:
        NoSitesError: the policy selects nothing; the message lists the activations that were seen.
        AlreadyWrappedError: the model is wrapped.
        UnreachableSiteError: ``strict``, and a selected activation cannot be reached.
        PolicyError: the policy names kinds or patterns that the model does not have, or contradicts itself.
        WrapError: not a model, scripted, or its output changed. After any failure the model is as it was.

    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> regimewrap.wrap(model) is model
    True
    >>> regimewrap.gate_of(model).sites[0].name
    '1'
    """
    root = _root(model)
    policy = RegimePolicy.of(policy)
    with remembering():
        _wrap(root, policy, example_inputs, strict)
    _forget_compiled(model)
    return model


def _wrap(root: nn.Module, policy: RegimePolicy, example_inputs: Any, strict: bool) -> None:
    planned, found = _plan(root, policy, example_inputs)
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
    for warning in found.warnings:
        warnings.warn(warning, stacklevel=3)
    rewriting.apply(root, planned, TopKGate(policy))
    if example_inputs is not None:
        try:
            _compare(root, found, example_inputs, strict)
        except BaseException:
            rewriting.undo(root)
            raise


def unwrap(model: M) -> M:
    """Take everything off that ``wrap`` put on a model.

    Args:
        model: a wrapped model, or a module around one.

    Returns:
        The same object, exactly what it was; it can be wrapped again.

    Raises:
        NotWrappedError: it is not wrapped.
        WrapError: it is a part of a wrapped model, whose other parts would stay gated.

    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> regimewrap.unwrap(regimewrap.wrap(model)) is model
    True
    """
    root = _root(model)
    gate = find_gate(root)
    if gate is None:
        raise NotWrappedError(f"{type(root).__name__} is not wrapped; there is nothing to unwrap.")
    if whole_of(root, gate) is not None or _sharing(root, gate) is not None:
        gc.collect()  # a model that is no longer held may still be there, in a cycle
    sharing = _sharing(root, gate)
    if sharing is not None:
        owner = type(sharing[0]).__name__
        raise WrapError(
            f"{type(root).__name__} is not wrapped itself; it shares {sharing[1]} with a wrapped {owner}, which would "
            f"lose its gates there. To have them off, unwrap the {owner}."
        )
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
    if not rewriting.any_hooks():
        forget_hooks()
    return model


def _sharing(model: nn.Module, gate: TopKGate) -> tuple[nn.Module, str] | None:
    """Return the wrapped model that a model which is no part of it shares gated modules with, and where they are."""
    root = gate.root
    if root is None or any(module is root for module in model.modules()) or whole_of(model, gate) is not None:
        return None
    shared = {id(module) for module in root.modules()}
    for path, module in model.named_modules():
        if id(module) in shared and find_gate(module) is gate:
            return root, path
    return None


def _compare(model: nn.Module, found: Survey, example_inputs: Any, strict: bool) -> None:
    args, kwargs = as_call(example_inputs)
    with at_keep_ratio(probe := own(model), 1.0), torch.no_grad():
        coverage, full = watched(probe, args, kwargs, found.verdicts)
    before, after = tree_leaves(found.bare), tree_leaves(full)
    if len(before) != len(after) or not all(map(_equal, before, after)):
        raise WrapError(
            f"{type(model).__name__}: the wrapped model's output at full budget is not that of the bare one, so the "
            "model is left as it was. Is it random beyond torch's generators? If not, this is a fault of regimewrap."
        )
    known = {each.activation.name for each in found.verdicts if each.activation.problem is not None}
    escaped = [name for name in coverage.escaped if name not in known]
    if escaped:
        _refuse(f"{type(model).__name__}: activations ran without a gate: {', '.join(escaped)}", strict)


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.is_meta:
        return True
    return a.shape == b.shape and bool(torch.all((a == b) | ((a != a) & (b != b))))


def _refuse(message: str, strict: bool) -> None:
    message += ". Exclude them in sites.exclude, or pass strict=False to gate the others only."
    if strict:
        raise UnreachableSiteError(message)
    warnings.warn(message, stacklevel=4)


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
