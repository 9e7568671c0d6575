"""The one tracer: reads the syntax tree of a method and writes down, as a graph, which values go where.

Nothing of the user's runs: names are looked up, own methods and plain functions are read in turn, branches on what is
not known are read both ways, loops over known things are unrolled. What is not known becomes a node with all its
arguments. So there is always a graph. It is good enough to say what an activation is for, and not to compute with.
"""

from __future__ import annotations

import ast
import builtins
import functools
import operator
import types
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from regimewrap.sites import catalog
from regimewrap.sites.flow.expressions import own
from regimewrap.sites.flow.statements import Statements
from regimewrap.sites.flow.writing import (
    CONTAINERS,
    DEPTH,
    PLAIN,
    SAFE,
    Bound,
    Env,
    Made,
    Star,
    Super,
    TooLongError,
    Trace,
    attempt,
    unknown,
)
from regimewrap.sites.read.code import UNKNOWN, attribute_of, body_of, code_of, parse


class Tracer(Statements):
    """Reads one method of one module.

    Args:
        module: whose method it is.
        paths: dotted names of the modules in it, by id.
    """

    def read(self, function: types.FunctionType, given: Sequence[Any] = ()) -> Trace | None:
        """Return what a method does, or ``None`` if it has no source, or too much of it."""
        function = body_of(function)
        tree = parse(function)
        if tree is None:
            return None
        try:
            result = self._enter(function, tree, [self._module, *given], None)
        except (TooLongError, RecursionError):
            return None
        self._graph.output(self._plain(result))
        return self.trace

    # What functions do.

    def _enter(
        self, function: Any, tree: Any, args: list[Any], kwargs: dict[str, Any] | None, env: Env | None = None
    ) -> Any:
        """Read a function's body; ``kwargs=None``: as the entry, whose arguments are placeholders."""
        inner = Env(function, env, env.code if env is not None else None)
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
        self,
        env: Env,
        spec: ast.arguments,
        args: list[Any],
        kwargs: dict[str, Any] | None,
        defaults: dict[str, Any] | None,
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
            elif entry and (default is UNKNOWN or isinstance(default, bool) or not _is_setting(default)):
                env[name] = self._node("placeholder", name)
            elif rest and name in positional:
                env[name] = self._node("call_function", unknown, (rest[0].value,))
            else:
                env[name] = default
        if spec.vararg is not None:
            env[spec.vararg.arg] = self._node("placeholder", spec.vararg.arg) if entry else tuple(rest)
        if spec.kwarg is not None:
            env[spec.kwarg.arg] = self._node("placeholder", spec.kwarg.arg) if entry else named

    def _call(self, node: ast.Call, env: Env) -> Any:
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
                args += list(value) if type(value) in (list, tuple) else [Star(value)]
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
                args.append(Star(value))
        with self._at(node, env):
            if isinstance(base, fx.Node):
                return self._node("call_method", node.func.attr, (base, *args), kwargs)  # type: ignore[attr-defined]
            if callee is builtins.super:
                cell = args[0] if args else self._name("__class__", env)
                return Super(cell, args[1] if len(args) > 1 else next(iter(env.values()), UNKNOWN))
            if type(base) in (*CONTAINERS, str) and isinstance(node.func, ast.Attribute):
                return self._of_container(base, node.func.attr, args, kwargs)
            if type(base) is not Super and callee is not UNKNOWN:
                callee = self._whole(callee)
            if not (isinstance(callee, type) and issubclass(callee, nn.Module)):  # that makes one, and calls none
                called = callee.cls if type(callee) is Made else callee
                self.trace.callees.setdefault(self._frames[-1], []).append(called)
            return self._apply(callee, args, kwargs)

    def _whole(self, callee: Any) -> Any:
        """Return the module for ``module.forward``: both do the same, hooks apart."""
        if type(callee) is types.MethodType and callee.__name__ == "forward" and id(callee.__self__) in self._paths:
            return callee if callee.__self__ is self._module else callee.__self__
        if type(callee) is types.BuiltinMethodType and callee.__name__ == "apply" and isinstance(callee.__self__, type):
            return callee.__self__  # a torch.autograd.Function
        return callee

    def _apply(self, callee: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        kind = type(callee)
        if kind is functools.partial:
            return self._apply(callee.func, [*callee.args, *args], {**callee.keywords, **kwargs})
        if kind is Made:
            return self._node("call_function", callee.cls, args, kwargs)
        if issubclass(kind, nn.Module):
            path = self._paths.get(id(callee))
            if path is not None:
                return self._node("call_module", path, args, kwargs)
            return self._node("call_function", callee, args, kwargs)
        if kind is types.MethodType:
            function = callee.__func__
            if isinstance(function, types.FunctionType):
                return self._inline(function, [callee.__self__, *args], kwargs)
        if kind is types.FunctionType:
            return self._inline(callee, args, kwargs)
        if kind is Bound:
            return self._inline(callee.function, args, kwargs, callee)
        if issubclass(kind, type):
            if callee in SAFE:
                return self._builtin(callee, args, kwargs)
            if issubclass(callee, nn.Module):
                return Made(callee)
        elif kind is types.BuiltinFunctionType and callee in SAFE:
            return self._builtin(callee, args, kwargs)
        elif not callable(callee) or callee is UNKNOWN or isinstance(callee, fx.Node):
            return self._node("call_function", unknown, (callee, *args), kwargs)
        elif issubclass(kind, object) and kind.__module__.partition(".")[0] not in ("builtins", "torch"):
            own = attribute_of(callee, "__call__")
            if type(own) is types.MethodType and isinstance(own.__func__, types.FunctionType):
                return self._inline(own.__func__, [callee, *args], kwargs)
        return self._node("call_function", callee, args, kwargs)

    def _inline(self, function: Any, args: list[Any], kwargs: dict[str, Any], bound: Bound | None = None) -> Any:
        """Read a function where it is called, unless it is torch's, or deep down."""
        if bound is not None and bound.env is not None:
            if function in self._running or len(self._running) > DEPTH:
                return self._node("call_function", unknown, args, kwargs)
            return self._enter(bound.env.function, function, args, kwargs, bound.env)
        home, name = function.__module__ or "", function.__name__
        if name in ("checkpoint", "_gradient_checkpointing_func") and args:
            return self._apply(args[0], args[1:], {})
        outside = home.partition(".")[0] in ("torch", "einops") and not home.startswith("torch.nn.modules.")
        if outside or catalog.kind_of_function(function) is not None:  # its name says what it does
            return self._node("call_function", function, args, kwargs)
        inner = body_of(function)
        tree = parse(inner)
        if tree is None or tree in self._running or len(self._running) > DEPTH:
            return self._node("call_function", function, args, kwargs)
        return self._enter(inner, tree, args, kwargs)

    def _builtin(self, function: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if function is builtins.getattr and len(args) > 1:
            found = self._attribute(args[0], args[1]) if type(args[1]) is str else UNKNOWN
            return args[2] if found is UNKNOWN and len(args) > 2 else found
        of_known = len(args) == 2 and not isinstance(args[0], fx.Node)
        if function is builtins.hasattr and of_known and type(args[1]) is str:
            return self._attribute(args[0], args[1]) is not UNKNOWN or UNKNOWN
        if function is builtins.isinstance and of_known:
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
        if function is len and args and (type(args[0]) in CONTAINERS or issubclass(type(args[0]), nn.Module)):
            return len(args[0] if type(args[0]) in CONTAINERS else self._items(args[0]))
        if function is sum and args and type(args[0]) in (list, tuple) and args[0]:
            return functools.reduce(lambda a, b: self._binary(operator.add, a, b), args[0])
        if all(type(each) in PLAIN for each in (*args, *kwargs.values())) and function is not callable:
            return attempt(function, *args, **kwargs)
        if any(isinstance(each, fx.Node) for each in args):
            return self._node("call_function", function, args, kwargs)
        if function is dict and not args:
            return dict(kwargs)
        return UNKNOWN

    def _of_container(self, base: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if type(base) is str and not all(type(each) in PLAIN for each in args):
            return UNKNOWN
        result = attempt(getattr(base, name, None), *args, **kwargs)
        return list(result) if name in ("items", "keys", "values") and result is not UNKNOWN else result


def _is_setting(default: Any) -> bool:
    return isinstance(default, int | float | str | tuple) or callable(default)


def _is_star(value: Any) -> bool:
    return type(value) is Star


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    code = code_of(function)
    named = code.co_varnames[: code.co_argcount]
    found = dict(zip(reversed(named), reversed(function.__defaults__ or ()), strict=False))
    return {name: own(value) for name, value in (found | (function.__kwdefaults__ or {})).items()}
