"""Where a value inside a model comes from and where it goes, followed from module to module.

Each module's methods are read by the tracer with its children as leaves; modules that read alike share a graph. All of
it is built at most once for a plan and ends with it.
"""

from __future__ import annotations

import inspect
import types
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import fx, nn

from regimewrap.sites import catalog
from regimewrap.sites.flow.operators import is_one, name_of, pools, reads_shape
from regimewrap.sites.flow.trace import Tracer
from regimewrap.sites.flow.writing import Frame, Trace, either, unknown
from regimewrap.sites.read.code import stored

#: Where a value comes from, each covering those before it: from parameters and buffers alone; from features averaged
#: over positions; from features, or from something that cannot be followed.
Origin = Literal["constant", "pooled", "features"]
_ORDER: tuple[Origin, ...] = ("constant", "pooled", "features")

#: How many operations back an origin is looked for; an average or a lookup is close by.
_BACK = 16


class Dataflow:
    """Follows values through one model.

    Args:
        model: read only; nothing of it runs.

    Attributes:
        modules: the model's, by all of their dotted names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, each in self.modules.items():
            self._names[id(each)].append(name)
        self._traces: dict[tuple[str, str], Trace | None] = {}
        self._known: dict[Any, list[Trace | None]] = defaultdict(list)
        self._index: dict[int, list[tuple[str, fx.Node]]] | None = None

    def module(self, path: str) -> nn.Module:
        """Return the module with a dotted name."""
        found = self.modules.get(path)
        return self.model.get_submodule(path) if found is None else found

    def trace(self, path: str, method: str = "forward") -> Trace | None:
        """Return what was read of a module's method, or ``None`` if it has no source or is not a plain method."""
        if (path, method) not in self._traces:
            self._traces[path, method] = self._read(path, method)
        return self._traces[path, method]

    def _read(self, path: str, method: str) -> Trace | None:
        module = self.module(path)
        if isinstance(module, torch.jit.ScriptModule):
            return None
        function = stored(module, method)
        if not isinstance(function, types.MethodType) or function.__self__ is not module:
            function = inspect.getattr_static(type(module), method, None)
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType):
            return None
        known = self._known[function, type(module)]
        for trace in known:
            if trace is None or all(
                self._finds(module, path, inner, name, value) for (inner, name), value in trace.reads.items()
            ):
                return trace
        trace = Tracer(module, {id(each): name for name, each in module.named_modules()}).read(function)
        # Kept of the module: only what shows that another module reads alike.
        known.append(trace)
        return trace

    def _finds(self, module: nn.Module, home: str, path: str, name: str, value: Any) -> bool:
        """Say whether the module at ``home`` has, at a dotted name below it, an attribute that reads like a value."""
        for part in path.split(".") if path else ():
            if part not in module._modules or module._modules[part] is None:
                return False
            module = module._modules[part]  # type: ignore[assignment]
        now = tuple(module._modules) if name == "_modules" else stored(module, name)
        return self._alike(now, value, home)

    def _alike(self, a: Any, b: Any, home: str) -> bool:
        if a is b:
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, bool | int | float | str):
            return bool(a == b)
        if isinstance(a, nn.Module):
            return any(not home or name == home or name.startswith(f"{home}.") for name in self._names.get(id(a), ()))
        if isinstance(a, torch.Tensor):
            return True
        if type(a) in (list, tuple):
            return len(a) == len(b) and all(self._alike(one, other, home) for one, other in zip(a, b, strict=True))
        if type(a) is dict:
            return a.keys() == b.keys() and all(self._alike(a[key], b[key], home) for key in a)
        return isinstance(a, types.MethodType) and a.__func__ is b.__func__ and isinstance(a.__self__, nn.Module)

    def forget(self) -> None:
        """Drop all references to the model: graphs are cycles, and theirs would look like those of another holder."""
        for traces in self._known.values():
            for trace in traces:
                if trace is not None:
                    trace.reads.clear()
                    trace.callees.clear()
        self.modules.clear()
        self._names.clear()

    def graph(self, path: str, method: str = "forward") -> fx.Graph | None:
        """Return the graph of a module's own forward, or ``None`` if that cannot be followed."""
        module = self.module(path)
        if isinstance(module, fx.GraphModule):
            return module.graph
        trace = self.trace(path, method)
        return None if trace is None else trace.graph

    def calls(self, path: str) -> list[tuple[str, fx.Node]]:
        """Return the calls of a module, by whichever name, each with the caller's dotted name; none if not known."""
        if self._index is None:
            self._index = defaultdict(list)
            for caller, module in self.model.named_modules():
                if is_layer(module) or catalog.kind_of_module(module) is not None:
                    continue
                graph = self.graph(caller)
                for node in graph.find_nodes(op="call_module") if graph is not None else ():
                    callee = self.modules.get(f"{caller}.{node.target}" if caller else str(node.target))
                    self._index[id(callee)].append((caller, node))
        return self._index.get(id(self.module(path)), [])

    def computed(self, path: str, method: str, frames: tuple[Frame, ...]) -> list[fx.Node]:
        """Return the nodes of a module's graph that a call makes; ``frames`` are its place and those of its callers."""
        for entry in dict.fromkeys(("forward", method)):
            graph = self.graph(path, entry)
            found = (
                [node for node in graph.nodes if node.meta.get("frames", ())[-len(frames) :] == frames] if graph else []
            )
            if found:
                return found
        return []

    def entries(self, path: str, call: fx.Node, value: fx.Node) -> list[fx.Node] | None:
        """Return the placeholders through which a call passes a value to a module, or ``None`` if it is not traced."""
        graph = self.graph(path)
        if graph is None:
            return None
        return [
            placeholder
            for place, placeholder in enumerate(graph.find_nodes(op="placeholder"))
            if value in self._given(path, call, place, placeholder)
        ]

    def origin(self, path: str, node: fx.Node, depth: int = 0) -> Origin:
        """Say where a value of the module at ``path`` comes from."""
        if depth > _BACK or (node.op == "call_function" and name_of(node).startswith(("rand", "normal"))):
            return "features"
        if node.op == "get_attr" or reads_shape(node):
            return "constant"
        if node.op == "placeholder":
            return self._widest(self.given(path, node), depth + 1) or "features"
        if node.op == "call_module":
            inner = f"{path}.{node.target}" if path else str(node.target)
            child = self.module(inner)
            graph = None if is_layer(child) or catalog.kind_of_module(child) else self.graph(inner)
            if graph is not None:
                values = [(inner, each) for each in graph.output_node().all_input_nodes]
                return self._widest(values, depth + 1) or "features"
            pooled = pools_by_class(child)
        else:
            pooled = pools(node) or self._averages(path, node, depth)
        found = self._widest(((path, each) for each in node.all_input_nodes), depth + 1)
        if found is None:
            # A function without inputs makes a constant; a layer without inputs was traced without its own.
            return "constant" if node.op == "call_function" and node.target is not unknown else "features"
        return "pooled" if pooled and found == "features" else found

    def _averages(self, path: str, node: fx.Node, depth: int) -> bool:
        """Say whether branches meet and one of them pools: an average with a mask and one without are alike."""
        inputs = node.all_input_nodes if node.target is either else ()
        return any(self.origin(path, each, depth + 8) == "pooled" for each in inputs)

    def given(self, path: str, placeholder: fx.Node) -> list[tuple[str, fx.Node]]:
        """Return the values that all calls of a module pass for one of its placeholders; none if they are not known."""
        graph = placeholder.graph
        place = list(graph.find_nodes(op="placeholder")).index(placeholder)
        return [
            (caller, each) for caller, call in self.calls(path) for each in self._given(path, call, place, placeholder)
        ]

    def _widest(self, values: Iterable[tuple[str, fx.Node]], depth: int) -> Origin | None:
        widest: Origin | None = None
        for path, node in values:
            widest = max(widest or "constant", self.origin(path, node, depth), key=_ORDER.index)
            if widest == "features":
                break
        return widest

    def _given(self, path: str, call: fx.Node, place: int, placeholder: fx.Node) -> list[fx.Node]:  # noqa: ARG002
        """Return the values that a call passes for a placeholder."""
        name = str(placeholder.target)
        return _nodes(call.args[place]) if place < len(call.args) else _nodes(call.kwargs.get(name))


def related(a: fx.Node, b: fx.Node) -> bool:
    """Say whether two values of one graph depend on a common one that is no constant and no size."""
    return bool(_sources(a) & _sources(b))


def is_layer(module: nn.Module) -> bool:
    """Say whether a module is one operation on its input: torch's own, or with parameters and no children."""
    if next(module.children(), None) is not None:
        return False
    return type(module).__module__.startswith("torch.nn") or next(module.parameters(), None) is not None


def pools_by_class(module: nn.Module) -> bool:
    """Say whether a module leaves one value for all positions."""
    name = type(module).__name__
    one = is_one(getattr(module, "output_size", None)) or hasattr(module, "pool_type")
    return ("Adaptive" in name and one) or (name == "Reduce" and getattr(module, "reduction", "") in ("mean", "max"))


def _sources(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each not in found and each.op != "get_attr" and not reads_shape(each):
            found.add(each)
            waiting += each.all_input_nodes
    return found


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found
