"""Carry out a plan on a model, all of it or nothing, and take it off again.

Taking off needs no memory: it looks for what regimewrap puts on objects and removes it. So it works on deep copies, on
models that came out of a file, and on models whose children were replaced meanwhile.
"""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from regimewrap.gate import GATE_ATTRIBUTE, SiteGate, TopKGate
from regimewrap.rewrite import hook, rebind
from regimewrap.rewrite.graph import NotTraceableError, trace_method
from regimewrap.sites.plan import Plan, Row


def apply(model: nn.Module, plan: Plan, gate: TopKGate) -> None:
    """Put ``gate`` behind every gated row of ``plan``.

    Raises:
        Exception: whatever went wrong; the model is then as it was.
    """
    recipes = recipes_for(model, plan)
    try:
        for row in plan.gated:
            if row.mechanism == "hook":
                assert row.site is not None  # noqa: S101  gated rows have one
                hook.attach(model.get_submodule(row.activation.module), SiteGate(gate, row.site))
        for path, (methods, rows) in recipes.items():
            gates = tuple(SiteGate(gate, row.site) for row in rows if row.site is not None)
            rebind.rebind(model.get_submodule(path), methods, gates)
        gate.sites = tuple(row.site for row in plan.gated if row.site is not None)
        gate.anchor(model)
        model.__dict__[GATE_ATTRIBUTE] = gate
    except BaseException:
        undo(model)
        raise


def undo(model: nn.Module) -> None:
    """Remove everything that ``apply`` put on ``model`` or on any module in it."""
    for module in model.modules():
        hook.detach(module)
        rebind.release(module)
        module.__dict__.pop(GATE_ATTRIBUTE, None)


def recipes_for(model: nn.Module, plan: Plan) -> dict[str, tuple[dict[str, rebind.Recipe], list[Row]]]:
    """Build the new methods that a plan's ``graph`` rows need, by module; nothing is changed."""
    by_module: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in plan:
        if row.activation.method is not None:
            by_module[row.activation.module][row.activation.method].append(row)
    built: dict[str, tuple[dict[str, rebind.Recipe], list[Row]]] = {}
    for path, methods in by_module.items():
        recipes: dict[str, rebind.Recipe] = {}
        gated: list[Row] = []
        for method, rows in methods.items():
            indices: list[int | None] = []
            for row in rows:
                indices.append(len(gated) if row.gated else None)
                if row.gated:
                    gated.append(row)
            if any(index is not None for index in indices):
                calls = [row.activation.call for row in rows if row.activation.call is not None]
                recipes[method] = trace_method(model.get_submodule(path), method, calls, indices)
        if recipes:
            built[path] = (recipes, gated)
    return built


def why_not_graph(module: nn.Module, method: str, rows: list[Row]) -> str | None:
    """Return why the graph mechanism cannot take a method, by trying; ``None`` if it can."""
    calls = [row.activation.call for row in rows if row.activation.call is not None]
    try:
        trace_method(module, method, calls, [None] * len(calls))
    except NotTraceableError as error:
        return str(error)
    return None
