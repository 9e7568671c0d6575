"""All that a plan needs to know of a model, read once: its activations, where values go, what ran."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regimewrap.gate.gate import Site
from regimewrap.policy.policy import RegimePolicy
from regimewrap.sites.census import Census
from regimewrap.sites.choose import check, choose, could_run, site_for
from regimewrap.sites.finder import Activation, find
from regimewrap.sites.flow.dataflow import Dataflow
from regimewrap.sites.flow.operators import KEEPS, PRODUCTS, SUMS, name_of
from regimewrap.sites.flow.purpose import Purpose
from regimewrap.sites.probe import as_call, own, untouched
from regimewrap.sites.read.code import stored

UNTOLD = "nothing tells which of its dimensions holds the channels; set gate.channel_dim"


@dataclass(frozen=True)
class Verdict:
    """What becomes of one activation: whether the policy selects it, why, and its place under the gate, if any."""

    activation: Activation
    selected: bool
    why: str
    site: Site | None


@dataclass(frozen=True)
class Survey:
    """What was found. It refers to no part of the model, so the model may change.

    Attributes:
        verdicts: one for each activation, those that only ran behind those that the code shows.
        warnings: where samples, time steps or channels would compete that must not; each names the remedy.
        bare: what the model returned for the example inputs; ``None`` without any.
    """

    verdicts: tuple[Verdict, ...]
    warnings: tuple[str, ...]
    bare: Any = None


def survey(model: nn.Module, policy: RegimePolicy, example_inputs: Any = None) -> Survey:
    """Read a model, run it once if there are example inputs, and judge each activation.

    Args:
        model: read only.
        policy: which activations the user wants.
        example_inputs: what it can be called with; see ``regimewrap.plan``.

    Raises:
        PolicyError: the policy cannot mean what it says for this model.
        WrapError: lazy layers would have to be made, and the model cannot be copied.
    """
    flow = Dataflow(model)
    found = find(model, flow)
    purpose, bare = Purpose(flow), None
    if example_inputs is not None:
        probe = own(model)
        census = Census(probe, found)
        args, kwargs = as_call(example_inputs)
        with untouched(probe), torch.no_grad(), torch.compiler.set_stance("force_eager"), census.watching():
            bare = probe(*args, **kwargs)
        census.shapes.record("", (args, kwargs), bare)
        purpose = Purpose(flow, census.shapes)
        found += _unseen(census, found)
    named = [each.name for each in found]
    check(policy.sites, named, model)
    asked = (could_run(pattern, model) for pattern in policy.sites.include if pattern not in (*named, "*"))
    found += [each for each in asked if each is not None]
    verdicts = tuple(_judge(policy, each, purpose) for each in found)
    warnings = tuple(_warnings(purpose, verdicts, policy))
    flow.forget()
    return Survey(verdicts, warnings, bare)


def _unseen(census: Census, found: list[Activation]) -> Iterator[Activation]:
    """Yield each activation that ran and was not found, once a name."""
    names = {each.name for each in found}
    labels = {(each.module, each.short) for each in found if each.call is not None or each.problem is not None}
    for ran in census.ran:
        each = ran.activation
        if ran.planned or each.name in names or (each.module, each.label) in labels:
            continue
        names.add(each.name)
        problem = "it ran, but the code does not show where it is called; call it by its name in a method"
        yield Activation(each.name, each.label, each.kind, each.module, problem=problem)


def _judge(policy: RegimePolicy, activation: Activation, purpose: Purpose) -> Verdict:
    selected, why = choose(policy.sites, activation, purpose)
    site = site_for(policy, activation, purpose) if selected else None
    if selected and site is None and activation.problem is None:
        why = UNTOLD
    return Verdict(activation, selected, why, site)


def _warnings(purpose: Purpose, verdicts: tuple[Verdict, ...], policy: RegimePolicy) -> Iterator[str]:
    model, scope = purpose.flow.model, policy.gate.scope
    name = type(model).__name__
    if scope in ("sample", "batch"):
        generates = getattr(model, "can_generate", None)
        causal = any(getattr(module, "is_causal", None) is True for module in model.modules())
        if causal or (callable(generates) and generates() is True):
            yield (
                f"{name} looks like a causal model, or holds one: with scope={scope!r} later "
                'tokens, frames or time steps decide what earlier ones keep. Use GatePolicy(scope="position").'
            )
    if scope == "sample" and any(map(_takes_time_first, model.modules())):
        selected = [each.activation for each in verdicts if each.selected]
        first = [each.name for each in selected if _sequence_first(purpose, each)]
        if first:
            yield (
                f"{name}: the first dimension at {', '.join(first[:3])} is time, not samples (batch_first=False is "
                "torch's default), so the samples of a batch compete with each other. Build these layers with "
                'batch_first=True, or use GatePolicy(scope="position"), where cycle.full_share keeps time steps, not '
                "samples, at the full budget."
            )
    if scope in ("sample", "position") and any(map(_is_masked_linear, model.modules())):
        yield (
            f"{name} has masked linear layers, as autoregressive flows and MADE have: with scope={scope!r} units that "
            "must not see each other compete, and an inverse is no longer exact. "
            'Use GatePolicy(scope="network"), or exclude these activations in sites.exclude.'
        )


def _takes_time_first(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first


def _sequence_first(purpose: Purpose, activation: Activation) -> bool:
    """Say whether an activation's value comes, dimension by dimension, from attention or recurrence with time first."""
    flow = purpose.flow
    waiting = [(path, each, 0) for path, node in purpose.calls(activation) for each in node.all_input_nodes]
    seen = set()
    while waiting:
        path, node, depth = waiting.pop()
        if (path, node) in seen or depth > 24:
            continue
        seen.add((path, node))
        name, before = name_of(node), [(path, each) for each in node.all_input_nodes]
        if node.op == "placeholder":
            before = flow.given(path, node)
        elif node.op == "call_module":
            if _takes_time_first(flow.module(f"{path}.{node.target}" if path else str(node.target))):
                return True
        elif name == "getitem":
            inside = before[0][1].op == "call_module"  # of the tuple that such a layer returns
            before = before if inside or not isinstance(node.args[1], int) else []
        elif not (name in KEEPS or name in SUMS or name in PRODUCTS or name == "linear"):
            before = []
        waiting += [(home, each, depth + 1) for home, each in before]
    return False


def _is_masked_linear(module: nn.Module) -> bool:
    mask, weight = stored(module, "mask"), stored(module, "weight")
    both = isinstance(mask, torch.Tensor) and isinstance(weight, torch.Tensor) and not is_lazy(weight)
    return both and mask.shape == weight.shape and weight.dim() == 2
