"""The one tracer: reads the syntax tree of a method and writes down, as a graph, which values go where.

Nothing of the user's runs: names are looked up, own methods and plain functions are read in turn, branches on what is not
known are read both ways, loops over known things are unrolled. What cannot be told becomes a node that takes all its
arguments. So a graph always exists; it is good enough to say what an activation is for, and not to compute with.
"""

from __future__ import annotations

import ast
import builtins
import functools
import operator
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from regimewrap.sites.read.code import UNKNOWN, Span, attribute_of, body_of, parse, span_of, stored

#: A function, by its code, and a place in it: where a call stands. The last of a node's frames made it.
Frame = tuple[types.CodeType, Span]

_BINARY: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.MatMult: operator.matmul,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}  # fmt: skip
_COMPARE: dict[type, Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_UNARY: dict[type, Any] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_, ast.Invert: operator.invert}
#: Values that may be computed with: operators of these run no code of the user's.
_PLAIN = (bool, int, float, str, bytes, type(None), range, slice)
_CONTAINERS = (list, tuple, dict, set)
_SAFE = {len, range, enumerate, zip, reversed, list, tuple, dict, set, int, float, bool, str, min, max, sum, abs, sorted, any,
         all, iter, next, round, divmod, isinstance, map, filter, getattr, hasattr, callable}  # fmt: skip
#: How deep functions are followed into each other, how many expressions are read, how often a loop is unrolled.
_DEPTH, _STEPS, _TURNS = 12, 30_000, 64


def either(*values: Any) -> Any:
    """Stand, in a graph, for a value that is one of several: branches that meet."""
    return values[0]


def unknown(*values: Any) -> Any:
    """Stand, in a graph, for what some values are given to and cannot be followed."""
    return values


@dataclass(frozen=True)
class _Bound:
    """A function defined in code that is read, or a method, with what it closes over or belongs to."""

    function: Any
    owner: Any = None
    env: Any = None
    code: Any = None


@dataclass(frozen=True)
class _Made:
    """A module that code makes while it runs."""

    cls: type


@dataclass(frozen=True)
class _Super:
    cls: Any
    owner: Any


@dataclass
class Trace:
    """What reading one method gave.

    Attributes:
        graph: children are called by their dotted names below the module.
        reads: what was looked up on the module and below, by dotted name and attribute: the graph holds for every
            module on which the same is found.
        callees: by place, what is called there.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    callees: dict[Frame, list[Any]] = field(default_factory=dict)


class _TooLongError(Exception):
    """There is more code than is worth reading."""


class _Env(dict[str, Any]):
    """Local names, with the function whose they are and the names around it."""

    def __init__(self, function: types.FunctionType, cells: Any = None, code: Any = None) -> None:
        super().__init__()
        self.function, self.cells, self.code = function, cells, code or function.__code__

    def copy(self) -> _Env:
        twin = _Env(self.function, self.cells, self.code)
        twin.update(self)
        return twin


class Tracer:
    """Reads one method of one module.

    Args:
        module: whose method it is.
        paths: dotted names of the modules in it, by id.
    """

    def __init__(self, module: nn.Module, paths: dict[int, str]) -> None:
        self.trace = Trace()
        self._graph, self._paths, self._module = self.trace.graph, paths, module
        self._frames: tuple[Frame, ...] = ()
        self._running: list[Any] = []
        self._returned: list[list[Any]] = []
        self._steps = 0

    def read(self, function: types.FunctionType, given: Sequence[Any] = ()) -> Trace | None:
        """Return what a method does, or ``None`` if it has no source, or too much of it."""
        function = body_of(function)
        tree = parse(function)
        if tree is None:
            return None
        try:
            result = self._enter(function, tree, [self._module, *given], None)
        except (_TooLongError, RecursionError):
            return None
        self._graph.output(self._plain(result))
        return self.trace

    # What functions do.

    def _enter(
        self, function: Any, tree: Any, args: list[Any], kwargs: dict[str, Any] | None, env: _Env | None = None
    ) -> Any:
        """Read a function's body; ``kwargs=None``: as the entry, whose arguments are placeholders."""
        inner = _Env(function, env, env.code if env is not None else None)
        self._bind(inner, tree.args, args, kwargs, _defaults(function) if env is None else None)
        self._running.append(tree)
        self._returned.append([])
        try:
            if isinstance(tree, ast.Lambda):
                return self._value(tree.body, inner)
            self._block(tree.body, inner)
            return self._either(self._returned[-1])
        finally:
            self._returned.pop()
            self._running.pop()

    def _bind(
        self, env: _Env, spec: ast.arguments, args: list[Any], kwargs: dict[str, Any] | None, defaults: dict[str, Any] | None
    ) -> None:
        entry = kwargs is None
        rest, named = list(args), dict(kwargs or {})
        positional = [each.arg for each in (*spec.posonlyargs, *spec.args)]
        if defaults is None:  # of a function that is defined in what is read
            pairs = zip(reversed(positional), reversed(spec.defaults), strict=False)
            keyed = zip((each.arg for each in spec.kwonlyargs), spec.kw_defaults, strict=True)
            defaults = {name: self._value(each, env) for name, each in (*pairs, *keyed) if each is not None}
        for name in (*positional, *(each.arg for each in spec.kwonlyargs)):
            default = defaults.get(name, UNKNOWN)
            if name in positional and rest and not _is_star(rest[0]):
                env[name] = rest.pop(0)
            elif name in named:
                env[name] = named.pop(name)
            elif entry and not (isinstance(default, int | float | str | tuple) and not isinstance(default, bool)) and not (
                callable(default) and default is not UNKNOWN
            ):
                env[name] = self._node("placeholder", name)
            elif rest and name in positional:
                env[name] = self._node("call_function", unknown, (rest[0].value,))
            else:
                env[name] = default
        if spec.vararg is not None:
            env[spec.vararg.arg] = self._node("placeholder", spec.vararg.arg) if entry else tuple(rest)
        if spec.kwarg is not None:
            env[spec.kwarg.arg] = self._node("placeholder", spec.kwarg.arg) if entry else named

    def _call(self, node: ast.Call, env: _Env) -> Any:
        base = UNKNOWN
        if isinstance(node.func, ast.Attribute):
            base = self._value(node.func.value, env)
            callee = base if isinstance(base, fx.Node) else self._attribute(base, node.func.attr)
        else:
            callee = self._value(node.func, env)
        args: list[Any] = []
        for each in node.args:
            if isinstance(each, ast.Starred):
                value = self._value(each.value, env)
                args += list(value) if type(value) in (list, tuple) else [_Star(value)]
            else:
                args.append(self._value(each, env))
        kwargs: dict[str, Any] = {}
        for word in node.keywords:
            value = self._value(word.value, env)
            if word.arg is not None:
                kwargs[word.arg] = value
            elif type(value) is dict and all(type(name) is str for name in value):
                kwargs.update(value)
            else:
                args.append(_Star(value))
        before = self._frames
        self._frames = (*before, (env.code, span_of(node)))
        try:
            if isinstance(base, fx.Node):
                return self._node("call_method", node.func.attr, (base, *args), kwargs)  # type: ignore[attr-defined]
            if callee is builtins.super:
                cell = args[0] if args else self._name("__class__", env)
                return _Super(cell, args[1] if len(args) > 1 else next(iter(env.values()), UNKNOWN))
            if type(base) in (*_CONTAINERS, str) and isinstance(node.func, ast.Attribute):
                return self._of_container(base, node.func.attr, args, kwargs)
            if type(base) is not _Super and callee is not UNKNOWN:
                callee = self._whole(callee)
            if not (isinstance(callee, type) and issubclass(callee, nn.Module)):  # that makes one, and calls none
                called = callee.cls if type(callee) is _Made else callee
                self.trace.callees.setdefault(self._frames[-1], []).append(called)
            return self._apply(callee, args, kwargs)
        finally:
            self._frames = before

    def _whole(self, callee: Any) -> Any:
        """Return the module for ``module.forward``, which does what calling it does, hooks apart."""
        if type(callee) is types.MethodType and callee.__name__ == "forward" and id(callee.__self__) in self._paths:
            return callee if callee.__self__ is self._module else callee.__self__
        return callee

    def _apply(self, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        kind = type(callee)
        if kind is functools.partial:
            return self._apply(callee.func, [*callee.args, *args], {**callee.keywords, **kwargs})
        if kind is _Made:
            return self._node("call_function", callee.cls, args, kwargs)
        if issubclass(kind, nn.Module):
            path = self._paths.get(id(callee))
            if path is not None:
                return self._node("call_module", path, args, kwargs)
            return self._node("call_function", callee, args, kwargs)
        if kind is types.MethodType:
            function = callee.__func__
            if isinstance(callee.__self__, type) and issubclass(callee.__self__, torch.autograd.Function):
                return self._node("call_function", callee.__self__, args, kwargs)
            if isinstance(function, types.FunctionType):
                return self._inline(function, [callee.__self__, *args], kwargs)
        if kind is types.FunctionType:
            return self._inline(callee, args, kwargs)
        if kind is _Bound:
            return self._inline(callee.function, args, kwargs, callee)
        if issubclass(kind, type):
            if callee in _SAFE:
                return self._builtin(callee, args, kwargs)
            if issubclass(callee, nn.Module):
                return _Made(callee)
        elif kind is types.BuiltinFunctionType and callee in _SAFE:
            return self._builtin(callee, args, kwargs)
        elif not callable(callee) or callee is UNKNOWN or isinstance(callee, fx.Node):
            return self._node("call_function", unknown, (callee, *args), kwargs)
        elif issubclass(kind, object) and kind.__module__.partition(".")[0] not in ("builtins", "torch"):
            own = attribute_of(callee, "__call__")
            if type(own) is types.MethodType and isinstance(own.__func__, types.FunctionType):
                return self._inline(own.__func__, [callee, *args], kwargs)
        return self._node("call_function", callee, args, kwargs)

    def _inline(self, function: Any, args: list[Any], kwargs: dict[str, Any], bound: _Bound | None = None) -> Any:
        """Read a function where it is called, unless it is torch's, or deep down."""
        if bound is not None and bound.env is not None:
            if function in self._running or len(self._running) > _DEPTH:
                return self._node("call_function", unknown, args, kwargs)
            return self._enter(bound.env.function, function, args, kwargs, bound.env)
        home, name = function.__module__ or "", function.__name__
        if name in ("checkpoint", "_gradient_checkpointing_func") and args:
            return self._apply(args[0], args[1:], {})
        if home.partition(".")[0] in ("torch", "einops") and not home.startswith("torch.nn.modules."):
            return self._node("call_function", function, args, kwargs)
        inner = body_of(function)
        tree = parse(inner)
        if tree is None or tree in self._running or len(self._running) > _DEPTH:
            return self._node("call_function", function, args, kwargs)
        return self._enter(inner, tree, args, kwargs)

    def _builtin(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if function is builtins.getattr and len(args) > 1:
            found = self._attribute(args[0], args[1]) if type(args[1]) is str else UNKNOWN
            return args[2] if found is UNKNOWN and len(args) > 2 else found
        if function is builtins.hasattr and len(args) == 2 and type(args[1]) is str and not isinstance(args[0], fx.Node):
            return self._attribute(args[0], args[1]) is not UNKNOWN or UNKNOWN
        if function is builtins.isinstance and len(args) == 2 and not isinstance(args[0], fx.Node):
            kinds = args[1] if type(args[1]) is tuple else (args[1],)
            known = args[0] is not UNKNOWN and all(type(each) is type for each in kinds)
            return any(each in type(args[0]).__mro__ for each in kinds) if known else UNKNOWN
        if function in (builtins.map, builtins.filter) and len(args) > 1:
            items = [self._items(each) for each in args[1:]]
            results = [self._apply(args[0], list(each), {}) for each in zip(*items, strict=False)]
            return results if function is builtins.map else items[0]
        if function in (zip, enumerate, reversed, list, tuple, iter, sorted) and args:
            items = [self._items(each) for each in args]
            if function is enumerate:
                return list(enumerate(items[0]))
            if function is zip:
                return list(zip(*items, strict=False))
            return items[0][::-1] if function is reversed else tuple(items[0]) if function is tuple else items[0]
        if function is len and args and type(args[0]) in _CONTAINERS:
            return len(args[0])
        if function is len and args and issubclass(type(args[0]), nn.Module):
            return len(self._items(args[0]))
        if function is sum and args and type(args[0]) in (list, tuple) and args[0]:
            return functools.reduce(lambda a, b: self._binary(operator.add, a, b), args[0])
        if all(type(each) in _PLAIN for each in (*args, *kwargs.values())) and function is not callable:
            try:
                return function(*args, **kwargs)
            except Exception:  # noqa: BLE001  it would raise there, too
                return UNKNOWN
        if any(isinstance(each, fx.Node) for each in args):
            return self._node("call_function", function, args, kwargs)
        if function is dict and not args:
            return dict(kwargs)
        return UNKNOWN

    def _of_container(self, base: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        try:
            if type(base) is dict and type(base).__dict__.get(name):
                result = getattr(base, name)(*args, **kwargs)
                return list(result) if name in ("items", "keys", "values") else result
            if type(base) is str and not all(type(each) in _PLAIN for each in args):
                return UNKNOWN
            return getattr(base, name)(*args, **kwargs)
        except Exception:  # noqa: BLE001  it would raise there, too
            return UNKNOWN

    # What names and expressions mean.

    def _name(self, name: str, env: _Env) -> Any:
        around: Any = env
        while around is not None:
            if name in around:
                return around[name]
            around = around.cells
        function = env.function
        if name in function.__code__.co_freevars:
            try:
                return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents
            except (ValueError, TypeError):
                return UNKNOWN
        return function.__globals__.get(name, getattr(builtins, name, UNKNOWN))

    def _attribute(self, base: Any, name: str) -> Any:
        if base is UNKNOWN or base is None:
            return UNKNOWN
        if isinstance(base, fx.Node):
            return self._node("call_function", getattr, (base, name))
        if type(base) is _Super:
            classes = type(base.owner).__mro__
            after = classes[classes.index(base.cls) + 1 :] if base.cls in classes else ()
            value = next((vars(home)[name] for home in after if name in vars(home)), UNKNOWN)
            return types.MethodType(value, base.owner) if isinstance(value, types.FunctionType) else value
        if not issubclass(type(base), nn.Module):
            value = attribute_of(base, name)
            if value is UNKNOWN:
                return self._property(base, name)
            return _own(value)
        path = self._paths.get(id(base))
        value = stored(base, name)
        if path is not None:
            self.trace.reads[path, name] = value
        if name in ("_modules", "_parameters", "_buffers"):
            return {key: self._attribute(base, key) for key in base.__dict__[name]}
        if name == "training":
            return UNKNOWN  # read in both modes
        if value is UNKNOWN:
            value = attribute_of(base, name)
            return self._property(base, name) if value is UNKNOWN else value
        if isinstance(value, torch.Tensor):
            return self._node("get_attr", f"{path}.{name}" if path else name) if path is not None else UNKNOWN
        return _own(value)

    def _property(self, base: Any, name: str) -> Any:
        found = next((vars(home)[name] for home in type(base).__mro__ if name in vars(home)), UNKNOWN)
        if isinstance(found, property) and isinstance(found.fget, types.FunctionType):
            return self._inline(found.fget, [base], {})
        if issubclass(type(base), nn.Module) and name in ("weight", "bias"):
            return self._node("get_attr", name)  # of a parametrization
        return UNKNOWN

    def _items(self, value: Any) -> list[Any]:
        """Return what a loop over a value meets."""
        if isinstance(value, nn.Module) and isinstance(value, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            path = self._paths.get(id(value))
            if path is not None:
                self.trace.reads[path, "_modules"] = tuple(value._modules)
            names = list(value._modules)
            return list(names) if isinstance(value, nn.ModuleDict) else [self._attribute(value, name) for name in names]
        if type(value) in _CONTAINERS or type(value) is range:
            return list(value)[:_TURNS]
        if isinstance(value, fx.Node):
            return [self._node("call_function", operator.getitem, (value, 0))]
        return [UNKNOWN]

    def _value(self, node: ast.expr, env: _Env) -> Any:
        self._steps += 1
        if self._steps > _STEPS:
            raise _TooLongError
        read = getattr(self, f"_of_{type(node).__name__}", None)
        if read is not None:
            return read(node, env)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child, env)
        return UNKNOWN

    def _of_Constant(self, node: ast.Constant, env: _Env) -> Any:  # noqa: ARG002
        return node.value

    def _of_Name(self, node: ast.Name, env: _Env) -> Any:
        return self._name(node.id, env)

    def _of_Call(self, node: ast.Call, env: _Env) -> Any:
        return self._call(node, env)

    def _of_Attribute(self, node: ast.Attribute, env: _Env) -> Any:
        return self._attribute(self._value(node.value, env), node.attr)

    def _of_Lambda(self, node: ast.Lambda, env: _Env) -> Any:
        return _Bound(node, env=env)

    def _of_NamedExpr(self, node: ast.NamedExpr, env: _Env) -> Any:
        value = self._value(node.value, env)
        self._assign(node.target, value, env)
        return value

    def _of_Await(self, node: ast.Await, env: _Env) -> Any:
        return self._value(node.value, env)

    def _of_Yield(self, node: ast.Yield, env: _Env) -> Any:
        if node.value is not None:
            self._returned[-1].append(self._value(node.value, env))
        return UNKNOWN

    def _of_Tuple(self, node: ast.Tuple | ast.List, env: _Env) -> Any:
        found: list[Any] = []
        for each in node.elts:
            value = self._value(each.value if isinstance(each, ast.Starred) else each, env)
            found += list(value) if isinstance(each, ast.Starred) and type(value) in (list, tuple) else [value]
        return found if isinstance(node, ast.List) else tuple(found)

    _of_List = _of_Tuple

    def _of_Dict(self, node: ast.Dict, env: _Env) -> Any:
        found: dict[Any, Any] = {}
        for key, each in zip(node.keys, node.values, strict=True):
            value = self._value(each, env)
            name = self._value(key, env) if key is not None else None
            if key is None and type(value) is dict:
                found.update(value)
            else:
                found[name if type(name) in _PLAIN else len(found)] = value
        return found

    def _of_Slice(self, node: ast.Slice, env: _Env) -> Any:
        return slice(*(None if each is None else self._value(each, env) for each in (node.lower, node.upper, node.step)))

    def _of_Subscript(self, node: ast.Subscript, env: _Env) -> Any:
        base, key = self._value(node.value, env), self._value(node.slice, env)
        if isinstance(base, fx.Node):
            return self._node("call_function", operator.getitem, (base, key))
        if isinstance(base, nn.Sequential | nn.ModuleList) and type(key) in (int, slice):
            items = self._items(base)
            return items[key] if isinstance(key, slice) or -len(items) <= key < len(items) else UNKNOWN
        if isinstance(base, nn.ModuleDict) and type(key) is str:
            return self._attribute(base, key)
        if isinstance(base, list | tuple | dict | str):
            if isinstance(base, dict) and type(base).__getitem__ is not dict.__getitem__:
                return _made_by(base, key)
            try:
                return base[key]
            except Exception:  # noqa: BLE001  any of them may be meant
                return self._either(list(base.values()) if isinstance(base, dict) else list(base)) if base else UNKNOWN
        if isinstance(base, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            return UNKNOWN
        return UNKNOWN

    def _binary(self, function: Any, left: Any, right: Any) -> Any:
        if isinstance(left, fx.Node) or isinstance(right, fx.Node):
            return self._node("call_function", function, (left, right))
        if type(left) in (*_PLAIN, *_CONTAINERS) and type(right) in (*_PLAIN, *_CONTAINERS):
            try:
                return function(left, right)
            except Exception:  # noqa: BLE001  it would raise there, too
                return UNKNOWN
        return UNKNOWN

    def _of_BinOp(self, node: ast.BinOp, env: _Env) -> Any:
        left, right = self._value(node.left, env), self._value(node.right, env)
        before = self._frames
        self._frames = (*before, (env.code, span_of(node)))
        try:
            return self._binary(_BINARY[type(node.op)], left, right)
        finally:
            self._frames = before

    def _of_UnaryOp(self, node: ast.UnaryOp, env: _Env) -> Any:
        value = self._value(node.operand, env)
        if isinstance(value, fx.Node) and not isinstance(node.op, ast.Not):
            return self._node("call_function", _UNARY[type(node.op)], (value,))
        return _UNARY[type(node.op)](value) if type(value) in (*_PLAIN, *_CONTAINERS) else UNKNOWN

    def _of_BoolOp(self, node: ast.BoolOp, env: _Env) -> Any:
        values: list[Any] = []
        for each in node.values:
            value = self._value(each, env)
            known = type(value) in (*_PLAIN, *_CONTAINERS)
            if known and bool(value) == isinstance(node.op, ast.Or):
                return self._either([*values, value])
            if not known or each is node.values[-1]:
                values.append(value)
        return self._either(values)

    def _of_Compare(self, node: ast.Compare, env: _Env) -> Any:
        values = [self._value(each, env) for each in (node.left, *node.comparators)]
        if len(values) == 2 and isinstance(node.ops[0], ast.Is | ast.IsNot) and values[1] is None:
            value = values[0]
            if isinstance(value, fx.Node):
                known = value.op != "placeholder" and value.target not in (either, unknown, getattr)
                return isinstance(node.ops[0], ast.IsNot) if known and value.op != "call_module" else UNKNOWN
            return UNKNOWN if value is UNKNOWN else _COMPARE[type(node.ops[0])](value, None)
        if any(isinstance(each, fx.Node) for each in values) and not isinstance(node.ops[0], ast.Is | ast.IsNot | ast.In):
            return self._node("call_function", _COMPARE[type(node.ops[0])], values[:2])
        if all(type(each) in (*_PLAIN, *_CONTAINERS) for each in values):
            try:
                pairs = zip(node.ops, values, values[1:], strict=False)
                return all(_COMPARE[type(test)](a, b) for test, a, b in pairs)
            except Exception:  # noqa: BLE001  it would raise there, too
                return UNKNOWN
        return UNKNOWN

    def _of_IfExp(self, node: ast.IfExp, env: _Env) -> Any:
        test = self._value(node.test, env)
        if type(test) in (*_PLAIN, *_CONTAINERS):
            return self._value(node.body if test else node.orelse, env)
        return self._either([self._value(node.body, env), self._value(node.orelse, env)])

    def _of_ListComp(self, node: Any, env: _Env) -> Any:
        inner, found = _Env(env.function, env, env.code), []

        def loop(rest: list[ast.comprehension]) -> None:
            if not rest:
                if isinstance(node, ast.DictComp):
                    found.append((self._value(node.key, inner), self._value(node.value, inner)))
                else:
                    found.append(self._value(node.elt, inner))
                return
            for item in self._items(self._value(rest[0].iter, inner)):
                self._assign(rest[0].target, item, inner)
                tests = [self._value(each, inner) for each in rest[0].ifs]
                if not any(type(each) in _PLAIN and not each for each in tests):
                    loop(rest[1:])

        loop(node.generators)
        if isinstance(node, ast.DictComp):
            return {key if type(key) in _PLAIN else place: value for place, (key, value) in enumerate(found)}
        return found

    _of_GeneratorExp = _of_SetComp = _of_DictComp = _of_ListComp

    # What statements do.

    def _block(self, statements: list[ast.stmt], env: _Env) -> bool:
        """Read statements in order; ``True`` if what stands behind them is certainly not reached."""
        return any(self._statement(each, env) for each in statements)

    def _statement(self, node: ast.stmt, env: _Env) -> bool:
        if isinstance(node, ast.Return):
            self._returned[-1].append(None if node.value is None else self._value(node.value, env))
            return True
        if isinstance(node, ast.If):
            return self._if(node, env)
        if isinstance(node, ast.For | ast.AsyncFor):
            for item in self._items(self._value(node.iter, env))[:_TURNS]:
                self._assign(node.target, item, env)
                self._branches([node.body, []], env) if item is UNKNOWN else self._block(node.body, env)
            return self._block(node.orelse, env) and False
        if isinstance(node, ast.While):
            test = self._value(node.test, env)
            if not (type(test) in _PLAIN and not test):
                self._branches([node.body, []], env)
            return False
        if isinstance(node, ast.With | ast.AsyncWith):
            for each in node.items:
                value = self._value(each.context_expr, env)
                if each.optional_vars is not None:
                    self._assign(each.optional_vars, value, env)
            return self._block(node.body, env)
        if isinstance(node, ast.Try):
            over = self._branches([[*node.body, *node.orelse], *(each.body for each in node.handlers)], env)
            return self._block(node.finalbody, env) or over
        if isinstance(node, ast.Match):
            self._value(node.subject, env)
            return self._branches([*(each.body for each in node.cases), []], env)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            env[node.name] = _Bound(node, env=env)
        elif isinstance(node, ast.Assign):
            value = self._value(node.value, env)
            for target in node.targets:
                self._assign(target, value, env)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, self._value(node.value, env), env)
        elif isinstance(node, ast.AugAssign):
            load = ast.copy_location(ast.BinOp(node.target, node.op, node.value), node.value)
            self._assign(node.target, self._value(load, env), env)
        elif isinstance(node, ast.Expr):
            value = self._value(node.value, env)
            self._in_place(node.value, value, env)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                env[(alias.asname or alias.name).partition(".")[0]] = UNKNOWN
        return isinstance(node, ast.Raise | ast.Continue | ast.Break)

    def _in_place(self, node: ast.expr, value: Any, env: _Env) -> None:
        """``x.relu_()`` and ``self.relu(x)`` on lines of their own: what follows may see their result as ``x``."""
        if isinstance(value, fx.Node) and value.op in ("call_method", "call_module", "call_function"):
            first = next(iter(value.args), None)
            named = [name for name, held in env.items() if isinstance(first, fx.Node) and held is first]
            inplace = value.op != "call_method" or str(value.target).endswith("_")
            for name in named if inplace and isinstance(node, ast.Call) else ():
                env[name] = value

    def _if(self, node: ast.If, env: _Env) -> bool:
        test = self._value(node.test, env)
        if type(test) in (*_PLAIN, *_CONTAINERS):
            return self._block(node.body if test else node.orelse, env)
        return self._branches([node.body, node.orelse], env)

    def _branches(self, blocks: list[list[ast.stmt]], env: _Env) -> bool:
        """Read alternatives from the same start, and let what they leave meet; ``True`` if none goes on."""
        ends: list[_Env] = []
        for block in blocks:
            inner = env.copy()
            if not self._block(block, inner):
                ends.append(inner)
        for name in dict.fromkeys(name for each in ends for name in each):
            env[name] = self._either([each[name] for each in ends if name in each])
        return not ends

    def _assign(self, target: ast.expr, value: Any, env: _Env) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            many = list(value) if type(value) in (list, tuple) and len(value) == len(target.elts) else None
            for place, each in enumerate(target.elts):
                inner = each.value if isinstance(each, ast.Starred) else each
                if many is not None:
                    part = many[place]
                elif isinstance(value, fx.Node):
                    part = self._node("call_function", operator.getitem, (value, place))
                else:
                    part = UNKNOWN
                self._assign(inner, part, env)
        elif isinstance(target, ast.Subscript):
            base, key = self._value(target.value, env), self._value(target.slice, env)
            if type(base) in (list, dict) and type(key) in _PLAIN:
                self._of_container(base, "__setitem__", [key, value], {})
            elif isinstance(base, fx.Node) and isinstance(target.value, ast.Name):
                env[target.value.id] = self._node("call_function", operator.setitem, (base, key, value))

    # What goes into the graph.

    def _either(self, values: Sequence[Any]) -> Any:
        known: list[Any] = []
        for value in values:
            if value is not UNKNOWN and not any(each is value or _equal(each, value) for each in known):
                known.append(value)
        if not known:
            return UNKNOWN
        if len(known) == 1 and (isinstance(known[0], fx.Node) or len(values) == 1 or UNKNOWN not in values):
            return known[0]
        nodes = [each for each in known if isinstance(each, fx.Node) or _has_nodes(each)]
        return self._node("call_function", either, nodes) if nodes else UNKNOWN

    def _node(self, op: str, target: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
        if not (isinstance(target, str) or callable(target)):
            target = unknown
        named = {name: self._plain(value) for name, value in (kwargs or {}).items()}
        node = self._graph.create_node(op, target, tuple(map(self._plain, args)), named, name=f"v{self._steps}")
        node.meta["frames"] = self._frames
        return node

    def _plain(self, value: Any) -> Any:
        """Return what a graph may hold: nodes and plain values; anything else is ``None``."""
        if isinstance(value, fx.Node) or type(value) in (bool, int, float, str, type(None)):
            return value
        if type(value) is _Star:
            return self._plain(value.value)
        if type(value) in (list, tuple, set):
            return tuple(map(self._plain, value)) if type(value) is tuple else [self._plain(each) for each in value]
        if type(value) is dict:
            return {str(key): self._plain(each) for key, each in value.items()}
        if type(value) is slice:
            return slice(self._plain(value.start), self._plain(value.stop), self._plain(value.step))
        return None


@dataclass(frozen=True)
class _Star:
    """What stands behind a star among arguments and cannot be counted."""

    value: Any


def _is_star(value: Any) -> bool:
    return type(value) is _Star


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    code = function.__code__
    named = code.co_varnames[: code.co_argcount]
    found = dict(zip(reversed(named), reversed(function.__defaults__ or ()), strict=False))
    return found | (function.__kwdefaults__ or {})


def _own(value: Any) -> Any:
    """Return a copy of a container of the user's, so that reading code that fills it changes nothing."""
    return type(value)(value) if type(value) in (list, dict, set) else value


def _made_by(container: dict[Any, Any], key: Any) -> Any:
    """Return the module that a dictionary makes of a class, as Hugging Face's ACT2FN does."""
    value = dict.get(container, key) if type(key) in (str, int, bool) else None
    value = value[0] if type(value) is tuple and value else value
    return _Made(value) if isinstance(value, type) and issubclass(value, nn.Module) else UNKNOWN


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and type(a) in _PLAIN and a == b


def _has_nodes(value: Any) -> bool:
    if type(value) in (list, tuple):
        return any(isinstance(each, fx.Node) or _has_nodes(each) for each in value)
    return type(value) is dict and any(isinstance(each, fx.Node) or _has_nodes(each) for each in value.values())
