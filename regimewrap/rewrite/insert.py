"""The FX pass by itself, for people who want a graph: ``insert_gates`` and the pass class ``InsertGates``.

``wrap`` never needs this: it keeps the user's object. Here the result is a new ``GraphModule`` that shares parameters
with what it was made from. Like every whole trace it freezes what is not tensor code, so it is the user's choice.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from regimewrap.errors import NoSitesError, WrapError
from regimewrap.gate.gate import GATE_ATTRIBUTE, Site, SiteGate, TopKGate
from regimewrap.policy.policy import PolicyLike, RegimePolicy
from regimewrap.rewrite.graph import TwoModes, gate_graph_module
from regimewrap.sites import catalog
from regimewrap.sites.choose import choose, site_for
from regimewrap.sites.finder import Activation
from regimewrap.sites.flow.dataflow import Dataflow
from regimewrap.sites.flow.purpose import Purpose
from regimewrap.sites.read.graphs import graphs_of


class InsertGates(PassBase):
    """A pass that puts a shared gate behind the chosen activations of a ``GraphModule``, in place.

    Args:
        policy: what to gate and how: a policy, a preset's name or a policy file; ``None``: the default.
        gate: the gate to share; a new one if ``None``.
    """

    def __init__(self, policy: PolicyLike | None = None, gate: TopKGate | None = None) -> None:
        self.policy = RegimePolicy.of(policy)
        self.gate = gate if gate is not None else TopKGate(self.policy)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Insert the gates; ``modified`` says whether there was anything to gate."""
        sites: dict[str, Site] = {}
        names: dict[str, str] = {}
        purpose = Purpose(Dataflow(graph_module))
        for graph in graphs_of(graph_module):
            for node in graph.nodes:
                site = self._site(node, graph_module, purpose)
                if site is not None:
                    sites.setdefault(site.name, site)
                    names[node.name] = site.name
        if not sites:
            return PassResult(graph_module, modified=False)
        gate_graph_module(graph_module, names, {name: SiteGate(self.gate, site) for name, site in sites.items()})
        self.gate.sites = tuple(sites.values())
        self.gate.anchor(graph_module)
        graph_module.__dict__[GATE_ATTRIBUTE] = self.gate
        return PassResult(graph_module, modified=True)

    def _site(self, node: fx.Node, module: fx.GraphModule, purpose: Purpose) -> Site | None:
        kind = catalog.kind_of_node(node, module)
        if kind is None:
            return None
        name = str(node.target) if node.op == "call_module" else node.name
        found = Activation(name, name, kind, name if node.op == "call_module" else "")
        return site_for(self.policy, found, purpose) if choose(self.policy.sites, found, purpose)[0] else None


def insert_gates(module: nn.Module, policy: PolicyLike | None = None) -> fx.GraphModule:
    """Return a ``GraphModule`` with one shared gate after the chosen activations.

    Args:
        module: a ``torch.fx.GraphModule`` (also one from a feature extractor or ``torch.export(...).module()``), or any
            module that traces; train and eval mode are traced apart, and ``train()`` and ``eval()`` switch.
        policy: what to gate and how: a policy, a preset's name or a policy file; ``None``: the default.

    Returns:
        A new module that shares parameters, buffers and children with ``module``, which is not changed. Parts that
        cannot be traced stay calls of the original child, ungated, and are named in a warning. ``gate_of`` finds its
        gate.

    Raises:
        WrapError: not a module, scripted, or the module itself does not trace.
        NoSitesError: the policy selects nothing in the graph.

    >>> graph = regimewrap.insert_gates(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)))
    >>> type(graph).__mro__[1].__name__, len(regimewrap.gate_of(graph).sites)
    ('GraphModule', 1)
    """
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise WrapError(f"insert_gates takes a GraphModule or a module that traces; got {type(module).__name__}.")
    if isinstance(module, fx.GraphModule):
        result = fx.GraphModule(module, copy.deepcopy(module.graph), class_name=type(module).__name__)
    else:
        result = _traced(module)
    if not InsertGates(policy)(result).modified:  # type: ignore[union-attr]
        raise NoSitesError(f"the policy selects no activation in the graph of {type(module).__name__}.")
    return result


def _traced(module: nn.Module) -> fx.GraphModule:
    modes = [(each, each.training) for each in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    untraced: dict[str, str] = {}
    try:
        with torch.random.fork_rng():
            graphs = []
            for mode in (True, False):
                tracer = _Tracer(untraced)
                graph = tracer.trace(module.train(mode))
                graphs.append(fx.GraphModule(module, graph, class_name=type(module).__name__))
    except Exception as error:
        raise WrapError(
            f"{type(module).__name__} cannot be traced as a whole ({error}); "
            "use regimewrap.wrap, which does not need that."
        ) from error
    finally:
        for each, mode in modes:
            each.training = mode
        for buffer, before in buffers:
            buffer.data.copy_(before)
    if untraced:
        parts = "; ".join(f"{name} ({why})" for name, why in untraced.items())
        warnings.warn(f"these parts cannot be traced and stay ungated: {parts}", stacklevel=3)
    train, eval_ = graphs
    result = train if train.code == eval_.code else TwoModes(train.train(), eval_)
    result.train(module.training)
    return result


class _Tracer(fx.Tracer):
    """Traces through the user's modules; one whose code does not trace becomes a leaf."""

    def __init__(self, untraced: dict[str, str] | None = None) -> None:
        super().__init__()
        self._untraced = untraced if untraced is not None else {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return catalog.kind_of_module(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        before = set(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # noqa: BLE001  any error means that it does not trace
            for node in [node for node in reversed(self.graph.nodes) if node not in before]:
                self.graph.erase_node(node)
            if any(catalog.kind_of_module(child) is not None for child in m.modules()):
                self._untraced[name] = str(error).partition("\n")[0]
            return self.create_proxy("call_module", name, args, kwargs)
