"""Find every activation of a model, without running or changing it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from regimewrap.sites import catalog
from regimewrap.sites.read.calls import Call, find_calls, find_dropped, in_place_target
from regimewrap.sites.read.code import NOWHERE, TORCH_LAYERS, Span, body_of, own_methods, span_of
from regimewrap.sites.read.graphs import graphs_of
from regimewrap.sites.read.helpers import Helper, calls_itself, find_helpers


@dataclass(frozen=True)
class Method:
    """Where code stands: a module's dotted name, the class that defines the method, and the method's name."""

    module: str
    owner: type
    name: str


@dataclass(frozen=True)
class Activation:
    """One activation of a model: a module, or a call of a function in a method.

    Attributes:
        name: dotted name; for a call, the module's, the method's and the function's (``layer1.0.forward.relu``).
        label: what it is, as the user would write it (``ReLU``, ``F.relu``).
        kind: its family.
        module: dotted name of the module that it is, or that calls it.
        method: the calling method; ``None`` for a module.
        call: the call itself, for a call.
        through: the plain functions by way of which the method makes the call, outermost first.
        node: name of the graph's node, for a call in a ``GraphModule``.
        dropped: where methods call a module on a line of its own, for what it does in place.
        problem: why no mechanism can reach it, if that is known already.
    """

    name: str
    label: str
    kind: str
    module: str
    method: Method | None = None
    call: Call | None = None
    through: tuple[Helper, ...] = ()
    node: str | None = None
    dropped: tuple[tuple[Method, Span], ...] = ()
    problem: str | None = None


def find(model: nn.Module) -> list[Activation]:
    """Return a model's activations, in the order of ``named_modules``; shared modules once."""
    modules = list(model.named_modules())
    # A hook on the activation of torch's encoder layer would switch its fused kernel off for good: gate the call.
    by_call = {id(each.activation) for _, each in modules if isinstance(each, TORCH_LAYERS)}
    registered = {id(module) for _, module in modules} - by_call
    dropped, lost = _dropped(modules)
    found: list[Activation] = []
    for path, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            found.extend(_in_script(path, module))
            continue
        if isinstance(module, fx.GraphModule):
            found.extend(_in_graph(path, module))
            continue
        if id(module) in by_call:
            continue
        fused = catalog.fused_activation(module)
        if fused is not None:
            label = type(module).__name__
            found.append(Activation(path or label, label, fused, path, problem=f"{label} computes it inside torch"))
            continue
        kind = catalog.kind_of_module(module)
        if kind is None:
            if type(module).__name__ not in catalog.NORM_AND_ACTIVATION:  # a normalisation without its activation
                found.extend(_in_methods(path, module, registered))
            continue
        label = type(module).__name__
        where = tuple(dropped[id(module)])
        found.append(Activation(path or label, label, kind, path, dropped=where, problem=lost.get(id(module))))
    return found


def _in_script(path: str, module: torch.jit.ScriptModule) -> Iterator[Activation]:
    problem = "it is scripted; wrap before torch.jit.script"
    label = getattr(module, "original_name", type(module).__name__)
    kind = catalog.kind_of_name(label)
    if kind is not None:
        yield Activation(path, label, kind, path, problem=problem)
        return
    # Children have graphs of their own; in this one they are calls of methods.
    graph = getattr(module, "graph", None)
    for node in (*graph.findAllNodes("prim::CallFunction"), *_aten_nodes(graph)) if graph is not None else ():
        called = next(node.inputs()).node().s("name") if node.kind() == "prim::CallFunction" else node.kind()
        name = called.rpartition(":")[2]
        kind = catalog.kind_of_name(name.rstrip("_"))
        if kind is not None:
            yield Activation(f"{path}.{name}" if path else name, name, kind, path, problem=problem)


def _aten_nodes(graph: Any) -> Iterator[Any]:
    names = {getattr(function, "__name__", "") for function in catalog.FUNCTIONS}
    return (node for name in sorted(names) for node in graph.findAllNodes(f"aten::{name}"))


def _in_graph(path: str, module: fx.GraphModule) -> Iterator[Activation]:
    # Activation modules that its graph calls are found as modules, like any others.
    nodes: dict[str, fx.Node] = {}
    for node in (node for graph in graphs_of(module) for node in graph.nodes):
        nodes.setdefault(node.name, node)
    for node in nodes.values():
        kind = catalog.kind_of_node(node)
        if kind is not None:
            name = f"{path}.{node.name}" if path else node.name
            label = getattr(node.target, "__name__", str(node.target))
            yield Activation(name, label, kind, path, node=node.name)


def _dropped(modules: list[tuple[str, nn.Module]]) -> tuple[dict[int, list[tuple[Method, Span]]], dict[int, str]]:
    """Find, by the id of an activation module, the places that drop its in-place result, and those beyond help."""
    places: dict[int, list[tuple[Method, Span]]] = defaultdict(list)
    lost: dict[int, str] = {}
    for path, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for owner, name, function in own_methods(module):
            for node, callee in find_dropped(function, module):
                if not getattr(callee, "inplace", False):
                    continue  # without effect, gated or not
                if in_place_target(node) is None:
                    lost[id(callee)] = f"{name} drops its result, line {node.lineno} of it; assign the result"
                places[id(callee)].append((Method(path, owner, name), span_of(node)))
    return places, lost


def _in_methods(path: str, module: nn.Module, registered: Set[int]) -> Iterator[Activation]:
    prefix = f"{path}." if path else ""
    for owner, name, function in own_methods(module):
        place = f"{prefix}{name}"
        if getattr(type(module), name, None) is not function:
            if not _reached_by_super(type(module), name, owner):
                continue
            place = f"{prefix}{owner.__name__}.{name}"
        counts: Counter[str] = Counter()
        for call in find_calls(function, module, registered):
            counts[call.short] += 1
            suffix = f"_{counts[call.short]}" if counts[call.short] > 1 else ""
            yield Activation(
                f"{place}.{call.short}{suffix}",
                call.text,
                call.kind,
                path,
                Method(path, owner, name),
                call,
                problem=_problem(name, call),
            )
        yield from _in_helpers(place, Method(path, owner, name), function, module)


def _in_helpers(
    place: str, method: Method, function: FunctionType, module: nn.Module | None, through: tuple[Helper, ...] = ()
) -> Iterator[Activation]:
    """Find activations in the plain functions that a method calls, and in those that these call."""
    arguments = through[-1].arguments if through else {}
    for helper in find_helpers(function, module, arguments):
        if helper.function in [each.function for each in through]:
            continue  # its activations are listed once
        inside, way = f"{place}.{helper.function.__name__}", (*through, helper)
        counts: Counter[str] = Counter()
        for call in find_calls(helper.function, None, arguments=helper.arguments):
            counts[call.short] += 1
            suffix = f"_{counts[call.short]}" if counts[call.short] > 1 else ""
            name = f"{inside}.{call.short}{suffix}"
            problem = _problem(helper.function.__name__, call)
            if any(calls_itself(each.function) for each in way):
                problem = f"the function {helper.function.__name__} calls itself, or one that calls it does"
            yield Activation(name, call.text, call.kind, method.module, method, call, way, problem=problem)
        yield from _in_helpers(inside, method, helper.function, None, way)


def _problem(method: str, call: Call) -> str | None:
    if call.span == NOWHERE:
        return f"{method} has no readable source"
    if call.dropped and call.target is None:
        return f"{method} drops its result; assign it"
    return None


def _reached_by_super(cls: type, method: str, owner: type) -> bool:
    """Say whether an overridden method can still be called, by ``super()`` in each class that overrides it."""
    overriding = [vars(home).get(method) for home in cls.__mro__[: cls.__mro__.index(owner)]]
    codes = [getattr(body_of(each), "__code__", None) for each in overriding if each is not None]
    return all(code is not None and "__class__" in code.co_freevars and method in code.co_names for code in codes)
