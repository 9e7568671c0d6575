"""Find every activation of a model, without running or changing it."""

from __future__ import annotations

import inspect
import types
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from regimewrap.sites import catalog
from regimewrap.sites.flow.dataflow import Dataflow
from regimewrap.sites.read.calls import Call, find_calls, find_dropped, in_place_target
from regimewrap.sites.read.code import NOWHERE, TORCH_LAYERS, Span, body_of, code_of, names_in, own_methods, span_of
from regimewrap.sites.read.graphs import graphs_of
from regimewrap.sites.read.helpers import Helper, calls_itself, find_helpers
from regimewrap.sites.read.named import function_of, kind_of_short


@dataclass(frozen=True)
class Method:
    """Where code stands: a module's dotted name, the class that defines the method, and the method's name."""

    module: str
    owner: type
    name: str

    @property
    def function(self) -> types.FunctionType:
        """The function, below its decorators."""
        return body_of(vars(self.owner)[self.name])


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

    @property
    def short(self) -> str:
        """The last part of the name of what is called."""
        return self.call.short if self.call is not None else self.label

    @property
    def code(self) -> types.CodeType | None:
        """The code that makes the call."""
        if self.through:
            return code_of(body_of(self.through[-1].function))
        return code_of(self.method.function) if self.method is not None else None


_LAZY = "its module is lazy; call the model once, then wrap it"


def find(model: nn.Module, flow: Dataflow | None = None) -> list[Activation]:
    """Return a model's activations, in the order of ``named_modules``; shared modules once.

    Args:
        model: read only.
        flow: where its values go, if the caller needs that too.
    """
    flow = flow if flow is not None else Dataflow(model)
    modules = list(model.named_modules())
    # A hook on the activation of torch's encoder layer would switch off its fused kernel forever; so the call is gated.
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
                inside = _in_methods(path, module, registered, flow)
                # Its first pass makes a lazy module one of another class, which loses what was put on this one.
                lazy = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()  # type: ignore[misc]
                found.extend(replace(each, problem=_LAZY) if lazy else each for each in inside)
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
    # A child has its own graph; this one shows it as a call of a method.
    for name, kind in _in_script_graph(getattr(module, "graph", None)):
        yield Activation(f"{path}.{name}" if path else name, name, kind, path, problem=problem)


def _in_script_graph(graph: Any) -> Iterator[tuple[str, str]]:
    """Yield name and family of the activations that a scripted graph calls."""
    names = sorted({getattr(function, "__name__", "") for function in catalog.FUNCTIONS})
    nodes = [node for name in names for node in graph.findAllNodes(f"aten::{name}")] if graph is not None else []
    for node in (*(graph.findAllNodes("prim::CallFunction") if graph is not None else ()), *nodes):
        called = next(node.inputs()).node().s("name") if node.kind() == "prim::CallFunction" else node.kind()
        name = called.rpartition(":")[2]
        kind = catalog.kind_of_name(name.rstrip("_"))
        if kind is not None:
            yield name, kind


def _in_graph(path: str, module: fx.GraphModule) -> Iterator[Activation]:
    # Activation modules in the graph are found as modules, like all others.
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
    """Return, by the id of an activation, where methods drop its in-place result, and why one cannot be mended."""
    places: dict[int, list[tuple[Method, Span]]] = defaultdict(list)
    lost: dict[int, str] = {}
    # A dropped result has an effect only if the activation works in place. If none does, no code is read.
    if not any(getattr(module, "inplace", False) for _, module in modules):
        return places, lost
    for path, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for owner, name, function in own_methods(module):
            for node, callee in find_dropped(function, module):
                if not getattr(callee, "inplace", False):
                    continue
                if in_place_target(node) is None:
                    lost[id(callee)] = f"{name} drops its result, line {node.lineno} of it; assign the result"
                places[id(callee)].append((Method(path, owner, name), span_of(node)))
    return places, lost


def _in_methods(path: str, module: nn.Module, registered: Set[int], flow: Dataflow) -> Iterator[Activation]:
    methods = own_methods(module)
    if not methods and _is_torchs(module):
        return
    prefix = f"{path}." if path else ""
    trace = flow.trace(path)
    seen: dict[types.CodeType, dict[Span, Sequence[Any]]] = defaultdict(dict)
    for (code, span), callees in trace.callees.items() if trace is not None else ():
        seen[code][span] = callees
    listed: dict[tuple[types.CodeType | None, Span], None] = {}
    for owner, name, function in methods:
        place, method = f"{prefix}{name}", Method(path, owner, name)
        if getattr(type(module), name, None) is not function:
            if not _reached_by_super(type(module), name, owner):
                continue
            place = f"{prefix}{owner.__name__}.{name}"
        calls = find_calls(function, module, registered, callees=seen[code_of(method.function)])
        found = [*_named(place, calls, method, path), *_in_helpers(place, method, function, module)]
        followed = {span for each in found for helper in each.through[:1] for span in helper.spans}
        for each in found:
            if each.through or each.call is None or each.call.span not in followed:
                listed[each.code, each.call.span if each.call is not None else NOWHERE] = None
                yield each
    # A function that is one activation call, such as a lambda, is gated where it is called.
    for calling, span in listed:
        for callee in seen[calling].get(span, ()) if calling is not None else ():
            gated = function_of(callee) if kind_of_short(callee) is not None else None
            if gated is not None:
                seen.pop(code_of(gated), None)
    yield from _elsewhere(path, prefix, seen, listed, registered)


def _is_torchs(module: nn.Module) -> bool:
    """Say whether a module runs a forward of torch's own layers: what these call is a module, or inside torch."""
    forward = module.__dict__.get("forward", getattr(type(module), "forward", None))
    return (getattr(forward, "__module__", None) or "").startswith("torch.nn.modules.")


def _named(
    place: str, calls: Sequence[Call], method: Method, path: str, through: tuple[Helper, ...] = ()
) -> Iterator[Activation]:
    """Name the calls of one function: ``relu``, ``relu_2``, ..."""
    counts: Counter[str] = Counter()
    for call in calls:
        counts[call.short] += 1
        suffix = f"_{counts[call.short]}" if counts[call.short] > 1 else ""
        inside = through[-1].function.__name__ if through else method.name
        problem = _problem(inside, through[-1].function if through else method.function, call)
        if any(calls_itself(each.function) for each in through):
            problem = f"the function {inside} calls itself, or one that calls it does"
        name = f"{place}.{call.short}{suffix}"
        yield Activation(name, call.text, call.kind, path, method, call, through, problem=problem)


def _in_helpers(
    place: str,
    method: Method,
    function: types.FunctionType,
    module: nn.Module | None,
    through: tuple[Helper, ...] = (),
) -> Iterator[Activation]:
    """Find activations in the plain functions that a method calls, and in those that these call."""
    arguments = through[-1].arguments if through else {}
    methods = [each for _, _, each in own_methods(module)] if module is not None else []
    for helper in find_helpers(function, module, arguments):
        if helper.function in methods or helper.function in [each.function for each in through]:
            continue  # its activations are listed once; Base.forward(self, x) calls a method
        inside, way = f"{place}.{helper.function.__name__}", (*through, helper)
        calls = find_calls(helper.function, None, arguments=helper.arguments)
        yield from _named(inside, calls, method, method.module, way)
        yield from _in_helpers(inside, method, helper.function, None, way)


def _elsewhere(
    path: str,
    prefix: str,
    seen: Mapping[types.CodeType, Mapping[Span, Sequence[Any]]],
    listed: Mapping[tuple[types.CodeType | None, Span], None],
    registered: Set[int],
) -> Iterator[Activation]:
    """Find activations that run and that no mechanism reaches: in code of other objects, or scripted."""
    counts: Counter[str] = Counter()
    found = [
        (code, callee)
        for code, places in seen.items()
        for span, callees in places.items()
        for callee in callees
        if (code, span) not in listed and id(callee) not in registered
    ]
    for code, callee in found:
        kind, problem = catalog.kind_of_callee(callee), f"it is called in {code.co_qualname}, which is not rewritten"
        label = getattr(callee, "__name__", "") if isinstance(callee, type | types.FunctionType) else ""
        if isinstance(callee, torch.jit.ScriptFunction):
            label, problem = str(callee.name), "it is scripted; wrap before torch.jit.script"
            kind = next((kind for _, kind in _in_script_graph(callee.inlined_graph)), None)
        if kind is None:
            continue
        name = f"{prefix}{code.co_name}.{label or kind}"
        counts[name] += 1
        suffix = f"_{counts[name]}" if counts[name] > 1 else ""
        yield Activation(f"{name}{suffix}", label or kind, kind, path, problem=problem)


def _problem(method: str, function: types.FunctionType | types.MethodType, call: Call) -> str | None:
    if call.span == NOWHERE:
        code = code_of(function)
        if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            return f"{method} is async; write it without, or its activations as modules"
        if code.co_name == "<lambda>":
            return "a lambda does more there than call one activation; make it a method, or its activations modules"
        return f"{method} has no readable source, or it is not the code that runs (was the file edited meanwhile?)"
    if call.dropped and call.target is None:
        return f"{method} drops its result; assign it"
    if call.mixed:
        return f"{method} calls something else there, too, that is no activation"
    return None


def _reached_by_super(cls: type, method: str, owner: type) -> bool:
    """Say whether an overridden method can still be called: all that override it use ``super()`` or name a class."""
    order = cls.__mro__[: cls.__mro__.index(owner) + 1]
    ways = {"__class__", *(home.__name__ for home in order[1:])}
    overriding = [vars(home).get(method) for home in order[:-1]]
    codes = [
        code_of(body) if isinstance(body := body_of(each), types.FunctionType) else None
        for each in overriding
        if each is not None
    ]
    return all(code is not None and method in code.co_names and ways & names_in(code) for code in codes)
