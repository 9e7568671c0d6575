"""The FX pass: gates in the graph of a module that is one already, or that is traced as a whole.

``insert_gate_nodes`` is the pass itself, on any ``torch.fx.Graph``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from regimewrap.gate.gate import SiteGate
from regimewrap.rewrite.runtime import GATE_CHILD, GraphGates
from regimewrap.sites.read.graphs import MODES, graphs_of

#: Decides for an activation's node which site it is, by name; ``None`` leaves it alone.
Chooser = Callable[[fx.Node], str | None]


def insert_gate_nodes(graph: fx.Graph, choose: Chooser) -> int:
    """Insert a call of the gate after each chosen node; the pass itself.

    Args:
        graph: changed in place; every use of a chosen node's value becomes a use of the gated value.
        choose: called with each node in order; returns the name of its site, or ``None``.

    Returns:
        How many gates were inserted.
    """
    inserted = 0
    for node in list(graph.nodes):
        site = choose(node)
        if site is None:
            continue
        dropped = _drops_result(node)
        with graph.inserting_after(node):
            gated = graph.create_node("call_module", GATE_CHILD, (node, site))  # the child may belong to another graph
        if dropped:
            # Code such as ``F.relu(x, inplace=True)`` goes on with its input instead.
            _replace_later_uses(graph, node, gated)
        else:
            node.replace_all_uses_with(gated, delete_user_cb=lambda user, gated=gated: user is not gated)
        inserted += 1
    return inserted


def _drops_result(node: fx.Node) -> bool:
    """Say whether an activation's node works in place and nothing uses its result."""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]  # relu_, and relu_.default of aten
    flags = [*node.args[1:], node.kwargs.get("inplace")]
    return not node.users and (name.endswith("_") or any(flag is True for flag in flags))


def _replace_later_uses(graph: fx.Graph, node: fx.Node, gated: fx.Node) -> None:
    order = {each: place for place, each in enumerate(graph.nodes)}
    value = node.args[0]
    if isinstance(value, fx.Node):
        value.replace_all_uses_with(gated, delete_user_cb=lambda user: order[user] > order[gated])


class TwoModes(fx.GraphModule):
    """A ``GraphModule`` with one graph for train mode and one for eval mode; ``train()`` and ``eval()`` switch.

    Args:
        train: traced in train mode.
        eval_: traced in eval mode, from the same module.
    """

    def __init__(self, train: fx.GraphModule, eval_: fx.GraphModule) -> None:
        super().__init__(train, copy.deepcopy(train.graph), class_name=type(train).__name__)
        for node in eval_.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                _adopt(self, eval_, str(node.target))
        # GraphModule.__deepcopy__ drops attributes but keeps meta.
        self.meta[MODES] = {True: self.graph, False: copy.deepcopy(eval_.graph)}

    def train(self, mode: bool = True) -> TwoModes:
        """Set the mode of every child, and run that mode's graph from now on."""
        if mode != self.training:
            self.graph = self.meta[MODES][mode]
        super().train(mode)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        modes = [fx.GraphModule(self, copy.deepcopy(self.meta[MODES][mode])) for mode in (True, False)]
        return (_two_modes, (*modes, self.training))


def _two_modes(train: fx.GraphModule, eval_: fx.GraphModule, training: bool) -> TwoModes:
    return TwoModes(train.train(), eval_).train(training)


def _adopt(module: nn.Module, source: nn.Module, target: str) -> None:
    """Give ``module`` the child, parameter or buffer that ``source`` has under a dotted name."""
    *path, name = target.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module, source = getattr(module, part), getattr(source, part)
    if not hasattr(module, name):
        setattr(module, name, getattr(source, name))


def gate_graph_module(module: fx.GraphModule, names: Mapping[str, str], gates: Mapping[str, SiteGate]) -> None:
    """Insert gates into every graph of a ``GraphModule``, in place.

    Args:
        module: it gets one child without state, and new code.
        names: name of an activation's node to the name of its site.
        gates: name of a site to its gate.
    """
    holder = GraphGates({site: gates[site] for site in names.values()})
    holder.training = module.training  # an exported module refuses train() and eval()
    module.add_module(GATE_CHILD, holder)
    for graph in graphs_of(module):
        insert_gate_nodes(graph, lambda node: names.get(node.name))
    module.recompile()


def ungate_graph_module(module: fx.GraphModule) -> None:
    """Take every gate out of a ``GraphModule``, also those that a trace of a wrapped model met."""
    found = False
    for graph in graphs_of(module):
        for node in [each for each in graph.nodes if each.op == "call_module"]:
            if str(node.target).rpartition(".")[2] == GATE_CHILD:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                found = True
    for each in list(module.modules()):
        found = each._modules.pop(GATE_CHILD, None) is not None or found
    if found:
        module.recompile()
