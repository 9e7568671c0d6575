"""The plain functions that a method calls and that lead to activations: they count as its code too."""

from __future__ import annotations

import ast
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from regimewrap.sites import catalog
from regimewrap.sites.read.code import Scope, Span, body_of, call_nodes, code_of, constant_of, names_in, span_of
from regimewrap.sites.read.memory import remembered
from regimewrap.sites.read.named import kind_of_short, names_activation


@dataclass(frozen=True)
class Helper:
    """A plain function that code calls, and where; ``arguments`` are those that it is certainly called with."""

    function: types.FunctionType
    spans: tuple[Span, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)


def find_helpers(
    function: types.FunctionType, module: nn.Module | None, arguments: Mapping[str, Any] = MappingProxyType({})
) -> list[Helper]:
    """Return the plain functions that code calls and that lead to an activation: by name, or held by ``self``.

    Args:
        function: a method's function, or a plain one.
        module: for a method an instance.
        arguments: what a plain function is certainly called with.
    """
    function = body_of(function)
    calls: dict[types.FunctionType, list[ast.Call]] = {}
    for helper, nodes in (*helper_nodes(function), *_held_helper_nodes(function, module)):
        calls.setdefault(helper, []).extend(nodes)
    if not calls:
        return []
    scope = Scope(function, module, arguments)
    return [
        Helper(helper, tuple(map(span_of, nodes)), _same_arguments(helper, nodes, scope))
        for helper, nodes in calls.items()
    ]


def _held_helper_nodes(
    function: types.FunctionType, module: nn.Module | None
) -> list[tuple[types.FunctionType, list[ast.Call]]]:
    """The same for ``self.act(x)``, where ``act`` is a plain attribute or a static method."""
    if module is None:
        return []
    cls: Any = type(module)  # mypy takes nn.Module's __hash__ for that of the class
    code, static, own = code_of(function), _static_methods(cls), module.__dict__
    named = names_in(code) & own.keys() | names_in(code) & static.keys()
    held: dict[str, Any] = {name: own.get(name, static.get(name)) for name in named}
    held = {name: value for name, value in held.items() if _is_helper(value, _DEPTH - 1)}
    nodes: dict[str, list[ast.Call]] = {}
    for node, _ in call_nodes(function) if held else ():
        base = node.func.value if isinstance(node.func, ast.Attribute) else None
        if isinstance(base, ast.Name) and base.id == code.co_varnames[0] and node.func.attr in held:  # type: ignore[attr-defined]
            nodes.setdefault(node.func.attr, []).append(node)  # type: ignore[attr-defined]
    return [(held[name], each) for name, each in nodes.items()]


@remembered
def _static_methods(cls: type) -> dict[str, types.FunctionType]:
    found = {name: value for home in reversed(cls.__mro__) for name, value in vars(home).items()}
    functions = {name: each.__func__ for name, each in found.items() if isinstance(each, staticmethod)}
    return {name: each for name, each in functions.items() if isinstance(each, types.FunctionType)}


#: From a method through so many functions an activation is followed; utilities far below are not its code any more.
_DEPTH = 3


@remembered
def helper_nodes(function: types.FunctionType) -> tuple[tuple[types.FunctionType, tuple[ast.Call, ...]], ...]:
    """Return the plain functions among these that code calls by name, each with its calls."""
    if not any(_is_helper(each, _DEPTH - 1) for each in _named(function)):
        return ()
    scope = Scope(function)
    nodes: dict[types.FunctionType, list[ast.Call]] = {}
    for node, _ in call_nodes(function):
        callee = scope.value_of(node.func)
        if _is_helper(callee, _DEPTH - 1):
            nodes.setdefault(callee, []).append(node)
    return tuple((helper, tuple(each)) for helper, each in nodes.items())


def _is_helper(value: Any, depth: int) -> bool:
    return (
        isinstance(value, types.FunctionType)
        and (value.__module__ or "").partition(".")[0] != "torch"
        and catalog.kind_of_function(value) is None
        and not (value.__name__ == "<lambda>" and kind_of_short(value))  # gated as a whole, where it is called
        and _reaches_activation(value, depth)
    )


@remembered
def _reaches_activation(function: types.FunctionType, depth: int) -> bool:
    body = body_of(function)
    return names_activation(body) or (depth > 0 and any(_is_helper(each, depth - 1) for each in _named(body)))


def _named(function: types.FunctionType) -> list[Any]:
    """Return the globals and closed-over values that code may mean, those of modules that it names among them."""
    scope, names = Scope(function), names_in(code_of(function))
    values = [scope.named(name) for name in names]
    homes = [vars(each) for each in values if isinstance(each, types.ModuleType | type) and each is not torch]
    inside = [home[name] for home in homes for name in names if name in home]
    return values + [each.__func__ if isinstance(each, staticmethod) else each for each in inside]


@remembered
def calls_itself(function: types.FunctionType) -> bool:
    """Say whether a plain function calls itself, perhaps by way of others, as far as ``find_helpers`` follows."""
    seen: set[types.FunctionType] = set()
    ahead = [function]
    while ahead:
        for callee, _ in helper_nodes(body_of(ahead.pop())):
            if callee is function:
                return True
            if callee not in seen:
                seen.add(callee)
                ahead.append(callee)
    return False


def _same_arguments(helper: types.FunctionType, nodes: Sequence[ast.Call], scope: Scope) -> dict[str, Any]:
    """Return the plain arguments of a function that are known, and the same in each of its calls."""
    code = code_of(body_of(helper))
    names = code.co_varnames[: code.co_argcount]
    defaults = dict(zip(reversed(names), reversed(body_of(helper).__defaults__ or ()), strict=False))
    defaults |= body_of(helper).__kwdefaults__ or {}
    calls = []
    for node in nodes:
        if any(isinstance(each, ast.Starred) for each in node.args):
            return {}
        given = dict(zip(names, node.args, strict=False))
        given |= {each.arg: each.value for each in node.keywords if each.arg is not None}
        open_ended = any(each.arg is None for each in node.keywords)
        values = {} if open_ended else dict(defaults)
        calls.append(values | {name: constant_of(value, scope) for name, value in given.items()})
    first, *others = calls
    return {
        name: value
        for name, value in first.items()
        if type(value) in (str, int, bool) and all(other.get(name) == value for other in others)
    }
