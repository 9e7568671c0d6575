"""Where a value inside a model comes from and where it goes, followed through the forward code of its modules.

Each module's own forward is traced with its children as leaves, and values are followed from one such graph into the
next. The graphs are only read, never run: a branch on values or shapes, most often a check that raises, is taken one
way, which is good enough to say what an activation is for and not good enough to compute with.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.overrides import TorchFunctionMode

from regimewrap.sites.read.code import UNKNOWN, body_of, parse, stored
from regimewrap.torch_private import tree_leaves

#: Where a value comes from, each covering those before it: from parameters and buffers alone; from features averaged
#: over positions; from features, or from something that cannot be followed.
Origin = Literal["constant", "pooled", "features"]
_ORDER: tuple[Origin, ...] = ("constant", "pooled", "features")

#: How many operations back an origin is looked for; what is averaged or looked up is so close by.
_BACK = 16

_REDUCTIONS = {"mean", "amax", "amin", "max", "std", "var", "nanmean", "median", "logsumexp"}
_WINDOWS = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d"}
_SHAPES = {"shape", "device", "dtype", "ndim", "size", "dim", "numel", "is_cuda", "requires_grad", "__len__"}
_PLAIN = bool | int | float | str | None


class Dataflow:
    """Follows values through one model; traces each module once at most.

    Args:
        model: read only; forward code is traced, not run.

    Attributes:
        modules: the model's, by all of their dotted names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._graphs: dict[str, fx.Graph | None] = {}
        self._calls: dict[str, list[tuple[str, fx.Node]]] = {}

    def module(self, path: str) -> nn.Module:
        """Return what a dotted name stands for; quicker than asking the model each time."""
        found = self.modules.get(path)
        return self._model.get_submodule(path) if found is None else found

    def graph(self, path: str) -> fx.Graph | None:
        """Return the graph of a module's own forward, or ``None`` if that cannot be followed."""
        if path not in self._graphs:
            module = self.module(path)
            graph = _follow(module)
            # Modules that look alike may still differ further down.
            self._graphs[path] = graph if graph is None or _fits(graph, module) else _trace(module)
        return self._graphs[path]

    def calls(self, path: str) -> list[tuple[str, fx.Node]]:
        """Return the calls of a module, each with the caller's dotted name; none if they cannot be followed."""
        if path not in self._calls:
            self._calls[path] = self._find_calls(path)
        return self._calls[path]

    def _find_calls(self, path: str) -> list[tuple[str, fx.Node]]:
        parts = path.split(".") if path else []
        for length in range(len(parts) - 1, -1, -1):
            caller = ".".join(parts[:length])
            graph = self.graph(caller)
            found = graph.find_nodes(op="call_module", target=".".join(parts[length:])) if graph is not None else ()
            if found:
                return [(caller, node) for node in found]
            if graph is None and not _is_container(self.module(caller)):
                break
        return []

    def entries(self, path: str, call: fx.Node, value: fx.Node) -> list[fx.Node] | None:
        """Return the placeholders through which a call passes a value to a module, or ``None`` if it is not traced."""
        graph = self.graph(path)
        if graph is None:
            return None
        return [
            placeholder
            for place, placeholder in enumerate(graph.find_nodes(op="placeholder"))
            if value in self._given(path, call, place)
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
            graph = None if is_layer(child) else self.graph(inner)
            if graph is not None:
                return self.origin(inner, graph.output_node(), depth + 1)
            pooled = "Adaptive" in type(child).__name__ and _is_one(getattr(child, "output_size", None))
        else:
            pooled = _pools(node)
        found = self._widest(((path, each) for each in node.all_input_nodes), depth + 1)
        if found is None:
            # A function makes a constant of nothing; a layer that is given nothing was traced without its input.
            return "constant" if node.op == "call_function" else "features"
        return "pooled" if pooled and found == "features" else found

    def given(self, path: str, placeholder: fx.Node) -> list[tuple[str, fx.Node]]:
        """Return the values that all calls of a module pass for one of its placeholders; none if they are not known."""
        graph = self.graph(path)
        if graph is None:
            return []
        place = list(graph.find_nodes(op="placeholder")).index(placeholder)
        return [(caller, each) for caller, call in self.calls(path) for each in self._given(path, call, place)]

    def _widest(self, values: Iterable[tuple[str, fx.Node]], depth: int) -> Origin | None:
        widest: Origin | None = None
        for path, node in values:
            widest = max(widest or "constant", self.origin(path, node, depth), key=_ORDER.index)
            if widest == "features":
                break
        return widest

    def _given(self, path: str, call: fx.Node, place: int) -> list[fx.Node]:
        """Return the values that a call passes for the placeholder at ``place``."""
        if place < len(call.args):
            return _nodes(call.args[place])
        names = list(inspect.signature(_forward(self.module(path))).parameters)[1:]
        return _nodes(call.kwargs.get(names[place])) if place < len(names) else []


def related(a: fx.Node, b: fx.Node) -> bool:
    """Say whether two values of one graph are computed from a common one, constants and sizes apart."""
    return bool(_sources(a) & _sources(b))


def is_layer(module: nn.Module) -> bool:
    """Say whether a module is one operation on its input: torch's own, or with parameters and no children."""
    if next(module.children(), None) is not None:
        return False
    return type(module).__module__.startswith("torch.nn") or next(module.parameters(), None) is not None


def reads_shape(node: fx.Node) -> bool:
    """Say whether a node reads a tensor's size or type, not its values."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPES
    return node.op == "call_method" and node.target in _SHAPES


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


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


def _pools(node: fx.Node) -> bool:
    """Say whether a function or method call leaves one value for all positions."""
    name = name_of(node)
    rest = [*node.args[1:], *node.kwargs.values()]
    if name in _REDUCTIONS:
        # Of the first dimension, it averages a list's entries; with a second tensor, the larger of two is meant.
        return rest[:1] != [0] and not any(isinstance(each, fx.Node) for each in rest)
    if name.startswith("adaptive_"):
        return _is_one(node.kwargs.get("output_size", rest[0] if rest else None))
    if name in _WINDOWS:
        return any(_nodes(each) for each in rest[:1])  # a window as large as the input
    if name in ("view", "reshape"):
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        return len(shape) > 3 and tuple(shape[-2:]) == (1, 1)
    return False


def _is_one(size: object) -> bool:
    return all(each == 1 for each in size) if isinstance(size, tuple | list) else size == 1


def _is_container(module: nn.Module) -> bool:
    return _forward(module) is nn.Module.forward


def _forward(module: nn.Module) -> Any:
    return inspect.getattr_static(type(module), "forward")  # a scripted module's cannot be had


class _Tracer(GraphAppendingTracer):
    """Takes every branch the same way, and any object as a constant."""

    def __init__(self, branch: bool) -> None:
        super().__init__(fx.Graph())
        self._branch = branch

    def to_bool(self, obj: fx.Proxy) -> bool:  # noqa: ARG002  fx fixes the signature
        return self._branch

    def create_arg(self, a: Any) -> Any:
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return type(a).__name__


class _Part:
    """Stands for a module while it is traced: calling it becomes a node, and so does reading a tensor from it.

    It keeps what is assigned to its attributes to itself, and nothing in torch is patched meanwhile.
    """

    def __init__(self, tracer: _Tracer, module: nn.Module, path: str = "") -> None:
        self.__tracer, self.__module, self.__path = tracer, module, path

    @property
    def __class__(self) -> Any:  # isinstance and super() ask for it
        return type(self.__module)

    @__class__.setter
    def __class__(self, cls: Any) -> None:
        raise TypeError("a module that is traced keeps its class")

    def __getattr__(self, name: str) -> Any:
        if name in ("_modules", "_parameters", "_buffers"):
            return {key: getattr(self, key) for key in self.__module.__dict__[name]}
        value = stored(self.__module, name)
        if value is UNKNOWN:
            return self.__of_class(name)
        path = f"{self.__path}.{name}" if self.__path else name
        if isinstance(value, nn.Module):
            value = self.__dict__[name] = _Part(self.__tracer, value, path)
        elif isinstance(value, torch.Tensor):
            value = self.__tracer.create_proxy("get_attr", path, (), {})
        elif type(value) in (list, tuple, dict):
            value = copy.copy(value)
        return value

    def __of_class(self, name: str) -> Any:
        cls = type(self.__module)
        value = inspect.getattr_static(cls, name)
        if isinstance(value, types.FunctionType):
            return types.MethodType(body_of(value), self)
        if isinstance(value, property) and value.fget is not None:
            return value.fget(self)
        return getattr(cls, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__tracer.create_proxy("call_module", self.__path, args, kwargs)

    def __iter__(self) -> Any:
        return self.__of_class("__iter__")()

    def __len__(self) -> Any:
        return self.__of_class("__len__")()

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self.__of_class("__getitem__")(key)

    def __contains__(self, key: Any) -> Any:
        return self.__of_class("__contains__")(key)


class _Recorded(TorchFunctionMode):
    """Hands every torch function to a tracer, so that none runs."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, fx.Proxy) for each in tree_leaves((args, kwargs))):
            return fx.Proxy.__torch_function__(func, types, args, kwargs)
        return self._tracer.create_proxy("call_function", func, args, kwargs or {})


def _parts(module: nn.Module) -> tuple[object, ...]:
    """Return what a module's code may call by name: its children, and those of containers among them."""
    return tuple(
        (name, type(child), _parts(child) if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential) else ())
        for name, child in module._modules.items()
    )


def _fits(graph: fx.Graph, module: nn.Module) -> bool:
    """Say whether a module has all children that a graph calls."""
    try:
        for node in graph.find_nodes(op="call_module"):
            module.get_submodule(str(node.target))
    except AttributeError:
        return False
    return True


_FOLLOWED: dict[object, fx.Graph | None] = {}


def _follow(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's own forward, traced once for modules that are built alike; only to be read."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    children = _parts(module)
    absent = tuple(name for name, each in (*module._parameters.items(), *module._buffers.items()) if each is None)
    plain = tuple((name, type(value), value) for name, value in module.__dict__.items() if isinstance(value, _PLAIN))
    key = (type(module), children, absent, plain)
    if key not in _FOLLOWED:
        _FOLLOWED[key] = _trace(module)
    return _FOLLOWED[key]


def _trace(module: nn.Module) -> fx.Graph | None:
    """Trace a module's own forward, children as leaves, if that cannot change anything."""
    cls: Any = type(module)
    method = _forward(module)
    if not isinstance(method, types.FunctionType) or not _only_computes(method, cls):
        return None
    forward = body_of(method)
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    # Checks that raise pass one way, assertions the other; then once more with the optional arguments given.
    for branch, given in ((False, False), (True, False), (False, True)):
        tracer = _Tracer(branch)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for each in parameters:
            value: Any = tracer.create_proxy("placeholder", each.name, (), {})
            if not given and isinstance(each.default, _PLAIN):
                value = each.default
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD):
                args.append(value)
            elif each.kind is each.KEYWORD_ONLY:
                kwargs[each.name] = value
        try:
            with _Recorded(tracer):
                result = forward(_Part(tracer, module), *args, **kwargs)
            tracer.graph.output(tracer.create_arg(result))
        except Exception:  # noqa: BLE001, S112  whatever stops the tracer means the same to us
            continue
        return tracer.graph
    return None


@functools.lru_cache(maxsize=4096)
def _only_computes(function: types.FunctionType, cls: type) -> bool:
    """Say whether a method assigns to local names only and calls nothing for its effect, nor methods that do."""
    seen: set[types.FunctionType] = set()
    waiting = [function]
    while waiting:
        each = body_of(waiting.pop())
        if each in seen:
            continue
        seen.add(each)
        if not _is_pure(each):
            return False
        waiting += [
            method
            for home in cls.__mro__
            if not home.__module__.startswith("torch.")
            for name in each.__code__.co_names
            if isinstance(method := vars(home).get(name), types.FunctionType)
        ]
    return True


@functools.lru_cache(maxsize=4096)
def _is_pure(function: types.FunctionType) -> bool:
    tree = parse(function)
    code = function.__code__
    if tree is None or "random" in code.co_names:
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            own = isinstance(node, ast.Attribute) and ast.unparse(node.value) == next(iter(code.co_varnames), None)
            if not own:
                return False
        if isinstance(node, ast.Global | ast.Nonlocal | ast.Yield | ast.YieldFrom | ast.Await | ast.Import | ast.While):
            return False
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            called = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
            # What works in place on a tensor is recorded, not run.
            if called.rpartition(".")[2] != "_assert" and not called.endswith("_"):
                return False
    return True
