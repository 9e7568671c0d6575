"""Reads a function's code: its source, its syntax tree, what names in it mean. Runs none of the user's code."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import types
import weakref
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

#: Modules of torch's own that call an activation function that they hold.
TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

#: Stands for "this expression's value cannot be known without running the method".
UNKNOWN = object()

#: Functions whose code is exchanged at the moment, to what has their own as ``original``; kept by ``rewrite``.
EXCHANGED: weakref.WeakKeyDictionary[types.FunctionType, Any] = weakref.WeakKeyDictionary()

Span = tuple[int, int, int, int]

#: The span of a call that only the compiled code shows, since there is no source to be read.
NOWHERE: Span = (0, 0, 0, 0)


def span_of(node: ast.expr | ast.stmt) -> Span:
    """Return where a node stands."""
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def body_of(function: types.FunctionType) -> types.FunctionType:
    """Return the function that the user wrote, below its decorators."""
    while isinstance(inner := getattr(function, "__wrapped__", None), types.FunctionType):
        function = inner
    return function


def code_of(function: types.FunctionType) -> types.CodeType:
    """Return the code that the user wrote, also while a wrapped model has the function run other code."""
    exchange = EXCHANGED.get(function)
    code: types.CodeType = function.__code__ if exchange is None else exchange.original
    return code


@functools.lru_cache(maxsize=4096)
def parse(function: types.FunctionType) -> ast.FunctionDef | None:
    """Return a function's syntax tree (do not change it), or ``None`` when it has no readable source of its own.

    Lines count from 1 at the first line of the source, decorators included; columns are those of the file.
    """
    try:
        source = inspect.getsource(function.__code__)
        # Indented code is not dedented, which would change its multi-line strings, but put into a block.
        indented = source[:1] in " \t"
        body = ast.parse(f"if 1:\n{source}" if indented else source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if indented:
        body = body[0].body  # type: ignore[attr-defined]
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        return None  # a lambda, or several definitions on one line
    if indented:
        ast.increment_lineno(body[0], -1)
    return body[0]


def own_methods(module: nn.Module) -> tuple[tuple[type, str, types.FunctionType], ...]:
    """Return the methods of a module that its users wrote: defining class, name, function; overridden ones too."""
    cls: Any = type(module)  # mypy takes nn.Module's __hash__ for that of the class
    return _own_methods(cls)


@functools.lru_cache(maxsize=4096)
def _own_methods(cls: type) -> tuple[tuple[type, str, types.FunctionType], ...]:
    return tuple(
        (home, name, value)
        for home in cls.__mro__
        if home.__module__.partition(".")[0] != "torch" or home in TORCH_LAYERS
        # Mix-ins bring functions for other times than the forward pass (sampling, losses).
        if issubclass(home, nn.Module) or "forward" in vars(home)
        for name, value in vars(home).items()
        if home is not object and isinstance(value, types.FunctionType) and not name.startswith("_regimewrap")
    )


class Scope:
    """What a method's names mean, as far as that is known without running it."""

    def __init__(
        self,
        function: types.FunctionType,
        module: nn.Module | None = None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        code = function.__code__
        self.function = function
        self.module = module
        self.arguments = arguments
        self.locals = set(code.co_varnames) | set(code.co_cellvars)
        self.self_name = code.co_varnames[0] if code.co_argcount else None
        self._closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))

    def value_of(self, node: ast.expr) -> Any:
        """Return the object an expression such as ``F.relu`` or ``self.act`` stands for, or ``UNKNOWN``."""
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            base = self.value_of(node.value)
            if isinstance(base, types.ModuleType | type):
                try:
                    return getattr(base, node.attr, UNKNOWN)
                except Exception:  # noqa: BLE001  torch.classes and the like load things on access
                    return UNKNOWN
            if isinstance(base, nn.Module):
                return stored(base, node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            base = self.value_of(node.value)
            if type(base) in (list, tuple, dict, nn.ModuleList, nn.Sequential, nn.ModuleDict):
                try:
                    return base[node.slice.value]
                except (LookupError, TypeError):
                    return UNKNOWN
        return UNKNOWN

    def _name(self, name: str) -> Any:
        if name == self.self_name and self.module is not None:
            return self.module
        if name in self.locals:
            return UNKNOWN
        if name in self._closure:
            try:
                return self._closure[name].cell_contents
            except ValueError:  # not filled yet
                return UNKNOWN
        return self.function.__globals__.get(name, getattr(builtins, name, UNKNOWN))


def stored(module: nn.Module, name: str) -> Any:
    """Return an attribute of a module, or ``UNKNOWN`` if it is not stored: a property would run the user's code."""
    for store in (module.__dict__, module._modules, module._parameters, module._buffers):
        if name in store:
            return store[name]
    return UNKNOWN


def in_evaluation_order(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a tree's nodes, children before parents: the order in which Python evaluates nested calls."""
    for child in ast.iter_child_nodes(node):
        yield from in_evaluation_order(child)
    yield node


def constant_of(node: ast.expr, scope: Scope) -> Any:
    """Return a constant, the value of an argument that is certainly given, or of an attribute; else ``UNKNOWN``."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in scope.arguments and node.id not in assigned(scope.function):
        return scope.arguments[node.id]
    return scope.value_of(node)


@functools.lru_cache(maxsize=4096)
def assigned(function: types.FunctionType) -> frozenset[str]:
    """Return the names that code assigns to."""
    tree = parse(function)
    nodes = ast.walk(tree) if tree is not None else ()
    return frozenset(each.id for each in nodes if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load))


@functools.lru_cache(maxsize=4096)
def call_nodes(function: types.FunctionType) -> tuple[tuple[ast.Call, bool], ...]:
    """Return a function's calls in order of evaluation, each with whether its result is dropped."""
    tree = parse(function)
    if tree is None:
        return ()
    dropped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = [node for statement in tree.body for node in in_evaluation_order(statement)]
    return tuple((node, id(node) in dropped) for node in nodes if isinstance(node, ast.Call))


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Return the globals, attributes and closed-over names that code uses, functions defined in it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset((*code.co_names, *code.co_freevars)).union(*(names_in(each) for each in inner))
