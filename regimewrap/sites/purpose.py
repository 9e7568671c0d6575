"""What an activation is for: features that go on, or a weight that something else is multiplied with.

The inner activations of squeeze-excite, attention and gating branches are small and steer other units; gating them
would silence whole channels. Whether one is such is read off what it feeds: followed through layers, does every path
end in a sigmoid-like function whose result multiplies something? Where a module's forward cannot be followed, shapes
say it (features pooled to one position, in a block with a sigmoid), and names last.
"""

from __future__ import annotations

import ast
import functools
import operator
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from regimewrap.sites import catalog
from regimewrap.sites.calls import body_of, parse
from regimewrap.sites.finder import Activation

_GATES = ("sigmoid", "tanh", "softmax")
_PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}
# What a value may pass on its way and still be the same branch; layers and activations besides.
_PASSING = {
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "expand_as", "expand", "contiguous",
    "mean", "float", "to", "type_as", "dropout", "conv2d", "linear", "interpolate", "adaptive_avg_pool2d", "getattr",
    "getitem", "unflatten", "clamp", "batch_norm", "layer_norm",
}  # fmt: skip
# Class names of blocks that compute a gate, in lower case, for code that cannot be followed.
_NAMES = (
    "squeezeexc",
    "semodule",
    "selayer",
    "seblock",
    "channelattn",
    "spatialattn",
    "ecamodule",
    "cbam",
    "gatherexcite",
)

#: How far a value is followed, in modules and operations; a branch that computes a gate is short.
_LIMIT = 40


class Purpose:
    """Answers, for one model, whether an activation computes a gate; traces each module once at most.

    Args:
        model: read only; forward code is traced, not run.
        shapes: shapes of activations' outputs by dotted module name, if a forward pass was watched.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._model = model
        self._shapes = shapes or {}
        self._paths = {name for name, _ in model.named_modules(remove_duplicate=False)}
        self._graphs: dict[str, fx.Graph | None] = {}

    def gate_computed(self, activation: Activation) -> str | None:
        """Return words for what an activation helps to compute if that is a gate, else ``None``."""
        parent, _, target = activation.module.rpartition(".")
        if isinstance(self._model, fx.GraphModule):
            parent, target = "", activation.module
        if activation.name == activation.module and parent in self._paths and self._near_gate(parent):
            graph = self._graph(parent)
            if graph is not None:
                calls = graph.find_nodes(op="call_module", target=target)
                ends = [end for node in calls for end in self._ends(parent, node, 0)]
                if ends:
                    gate = all(end == "gate" for end in ends)
                    return f"all it feeds is a gate in {parent or type(self._model).__name__}" if gate else None
        shape = self._shapes.get(activation.module, ())
        if len(shape) == 4 and shape[2:] == (1, 1) and parent and self._holds_gate(parent):
            return f"{parent} weighs pooled features with a sigmoid"
        return self._named(activation)

    def _named(self, activation: Activation) -> str | None:
        if activation.module not in self._paths:
            return None  # made during the forward pass
        parts = activation.module.split(".") if activation.module else []
        for length in range(len(parts) + 1):
            name = type(self._model.get_submodule(".".join(parts[:length]))).__name__
            if name.replace("_", "").lower().startswith(_NAMES):
                return f"{name} computes a gate, not features"
        return None

    def _near_gate(self, path: str) -> bool:
        """Say whether anything sigmoid-like is in a block or in the one around it; a cheap first look."""
        for near in {path, path.rpartition(".")[0]}:
            for module in self._model.get_submodule(near).modules() if near else (self._model, *self._model.children()):
                cls: Any = type(module)
                if catalog.kind_of_module(module) in _GATES or calls_gate(cls):
                    return True
        return False

    def _holds_gate(self, path: str) -> bool:
        return any(catalog.kind_of_module(module) in _GATES for module in self._model.get_submodule(path).modules())

    def _ends(self, path: str, node: fx.Node, depth: int) -> Iterator[str]:
        """Yield where a value of the module at ``path`` ends up: ``gate`` or ``other``."""
        if depth > _LIMIT:
            yield "other"
            return
        for user in node.users:
            kind = catalog.kind_of_node(user, self._model.get_submodule(path))
            if user.op == "output":
                yield from self._after(path, depth)
            elif kind in _GATES:
                yield "gate" if self._multiplies(path, user, depth) else "other"
            elif kind is not None or self._passes(user):
                yield from self._ends(path, user, depth + 1)
            elif user.op == "call_module":
                yield from self._through(path, user, depth)
            else:
                yield "other"

    def _after(self, path: str, depth: int) -> Iterator[str]:
        """Go on where the module at ``path`` returns the value to."""
        if not path:
            yield "other"
            return
        parent, _, name = path.rpartition(".")
        graph = self._graph(parent)
        calls = list(graph.find_nodes(op="call_module", target=name)) if graph is not None else []
        if not calls:
            yield "other"
        for call in calls:
            yield from self._ends(parent, call, depth + 1)

    def _through(self, path: str, node: fx.Node, depth: int) -> Iterator[str]:
        """Go on inside the child that a node calls with the value."""
        inner = f"{path}.{node.target}" if path else str(node.target)
        child = self._model.get_submodule(inner)
        if next(child.children(), None) is None:
            # A layer, unless it is something of the user's own of which nothing is known.
            if type(child).__module__.startswith("torch.nn") or next(child.parameters(), None) is not None:
                yield from self._ends(path, node, depth + 1)
            else:
                yield "other"
            return
        graph = self._graph(inner)
        inputs = list(graph.find_nodes(op="placeholder")) if graph is not None else []
        if not inputs:
            yield "other"
            return
        yield from self._ends(inner, inputs[0], depth + 1)

    def _multiplies(self, path: str, node: fx.Node, depth: int) -> bool:
        """Say whether a sigmoid's value, reshaped perhaps, multiplies something."""
        for user in node.users:
            target = user.target
            if target in _PRODUCTS:
                return True
            if self._passes(user) and self._multiplies(path, user, depth + 1):
                return True
            if user.op == "output" and path and depth < _LIMIT:
                parent, _, name = path.rpartition(".")
                graph = self._graph(parent)
                calls = graph.find_nodes(op="call_module", target=name) if graph is not None else ()
                if any(self._multiplies(parent, call, depth + 1) for call in calls):
                    return True
        return False

    @staticmethod
    def _passes(node: fx.Node) -> bool:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        return node.op in ("call_method", "call_function") and name in _PASSING

    def _graph(self, path: str) -> fx.Graph | None:
        if path not in self._graphs:
            self._graphs[path] = _follow(self._model.get_submodule(path))
        return self._graphs[path]


@functools.lru_cache(maxsize=4096)
def calls_gate(cls: Any) -> bool:
    """Say whether a module class's own code names a function such as sigmoid."""
    return any(
        catalog.kind_of_name(name) in _GATES
        for home in cls.__mro__
        if not home.__module__.startswith("torch.nn")
        for value in vars(home).values()
        if isinstance(value, types.FunctionType)
        for name in body_of(value).__code__.co_names
    )


class _Shallow(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  fx fixes the signature
        return True


_FOLLOWED: dict[object, fx.Graph | None] = {}


def _follow(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's own forward, traced once for modules that are built alike; only to be read."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    children = tuple((name, type(child)) for name, child in module._modules.items())
    plain = tuple(
        (name, type(value), value)
        for name, value in module.__dict__.items()
        if isinstance(value, bool | int | float | str | None)
    )
    key = (type(module), children, plain)
    if key not in _FOLLOWED:
        _FOLLOWED[key] = _trace(module)
    return _FOLLOWED[key]


def _trace(module: nn.Module) -> fx.Graph | None:
    """Trace a module's own forward, children as leaves, if that cannot change anything."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or not _only_computes(body_of(forward)):
        return None
    before = dict(module.__dict__)
    try:
        return _Shallow().trace(module)
    except Exception:  # noqa: BLE001  whatever stops the tracer means the same to us
        return None
    finally:
        module.__dict__.clear()
        module.__dict__.update(before)


@functools.lru_cache(maxsize=4096)
def _only_computes(function: types.FunctionType) -> bool:
    """Say whether a function's code assigns to local names only and calls nothing for its effect."""
    tree = parse(function)
    if tree is None:
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            return False
        if isinstance(node, ast.Global | ast.Nonlocal | ast.Yield | ast.YieldFrom | ast.Await | ast.Import | ast.While):
            return False
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            called = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
            if called.rpartition(".")[2] != "_assert":
                return False
    return True
