"""Carry out a plan on a model, all of it or nothing, and take it off again.

Taking off needs no memory: it looks for what regimewrap puts on objects and removes it. So it works on deep copies, on
models that came out of a file, and on models whose children were replaced meanwhile.
"""

from __future__ import annotations

from torch import fx, nn

from regimewrap.gate.gate import GATE_ATTRIBUTE, SiteGate, TopKGate
from regimewrap.rewrite import graph, runtime, share, shown
from regimewrap.sites.plan import Plan


def apply(model: nn.Module, plan: Plan, gate: TopKGate) -> None:
    """Put ``gate`` behind every gated row of ``plan``.

    Raises:
        Exception: whatever went wrong; the model is then as it was.
    """
    hooked = {row.name: row.activation.module for row in plan.gated if row.mechanism == "hook"}
    gates: dict[str, SiteGate] = {}
    for row in plan.gated:
        if row.site is not None:
            kind = runtime.ModuleGate if row.name in hooked and row.activation.module in plan.recipes else SiteGate
            gates[row.name] = kind(gate, row.site)
    try:
        share.replace_shared(model, map(model.get_submodule, filter(None, hooked.values())))
        for name, path in hooked.items():
            runtime.attach_hook(model.get_submodule(path), gates[name])
        for path, change in plan.recipes.items():
            module = model.get_submodule(path)
            if isinstance(module, fx.GraphModule):
                graph.gate_graph_module(module, change.nodes, gates)
            else:
                called = {key: gates[name] for key, name in change.sites.items()}
                runtime.attach_sites(module, runtime.Sites(called, change.parts))
        gate.sites = tuple(each.site for each in gates.values())
        gate.anchor(model)
        model.__dict__[GATE_ATTRIBUTE] = gate
        model.__dict__[runtime.SCRIPTING] = runtime.refuse_scripting
        shown.show(model)
    except BaseException:
        undo(model)
        raise


def undo(model: nn.Module) -> None:
    """Remove everything that ``apply`` put on ``model`` or on any module in it."""
    share.put_back(model)
    for module in list(model.modules()):
        runtime.detach(module)
        if isinstance(module, fx.GraphModule):
            graph.ungate_graph_module(module)
        module.__dict__.pop(GATE_ATTRIBUTE, None)


def any_hooks() -> bool:
    """Say whether any model, also a copy or one that was read from a file, has hooks of ours."""
    return bool(runtime.GateHook.alive)
