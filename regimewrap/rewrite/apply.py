"""Carry out a plan on a model, all of it or nothing, and take it off again.

Taking off needs no memory: it looks for what regimewrap puts on objects and removes it. So it works on deep copies, on
models that came out of a file, and on models whose children were replaced meanwhile.
"""

from __future__ import annotations

from torch import fx, nn

from regimewrap.gate.gate import GATE_ATTRIBUTE, SiteGate, TopKGate
from regimewrap.rewrite import graph, hook, rebind, share
from regimewrap.sites.plan import Plan


def apply(model: nn.Module, plan: Plan, gate: TopKGate) -> None:
    """Put ``gate`` behind every gated row of ``plan``.

    Raises:
        Exception: whatever went wrong; the model is then as it was.
    """
    gates = {row.name: SiteGate(gate, row.site) for row in plan.rows if row.site is not None}
    hooked = {row.activation.module: gates[row.name] for row in plan.gated if row.mechanism == "hook"}
    try:
        share.replace_shared(model, map(model.get_submodule, filter(None, hooked)))
        for path, site_gate in hooked.items():
            hook.attach(model.get_submodule(path), site_gate)
        for path, rebinding in plan.recipes.items():
            module, called = model.get_submodule(path), tuple(gates[name] for name in rebinding.sites)
            if isinstance(module, fx.GraphModule):
                graph.gate_graph_module(module, [rebinding.nodes] * len(graph.graphs_of(module)), called)
            else:
                rebind.rebind(module, rebinding.methods, called)
        _guard_encoders(model)
        gate.sites = tuple(each.site for each in gates.values())
        gate.anchor(model)
        model.__dict__[GATE_ATTRIBUTE] = gate
    except BaseException:
        undo(model)
        raise


def _guard_encoders(model: nn.Module) -> None:
    """Keep encoders of gated layers from packing their input into nested tensors while the gate has something to do."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not rebind.is_rebound(module):
            gates = next((rebind.gates_of(each) for each in module.modules() if rebind.is_rebound(each)), ())
            if gates:
                rebind.rebind(module, (), gates)


def undo(model: nn.Module) -> None:
    """Remove everything that ``apply`` put on ``model`` or on any module in it."""
    share.put_back(model)
    for module in list(model.modules()):
        hook.detach(module)
        rebind.release(module)
        if isinstance(module, fx.GraphModule):
            graph.ungate_graph_module(module)
        module.__dict__.pop(GATE_ATTRIBUTE, None)
