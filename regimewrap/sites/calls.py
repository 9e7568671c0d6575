"""Activations called as functions: where a method's own code says ``F.relu(x)`` or ``x.relu()``.

Reads source; runs none of the user's code.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from regimewrap.sites import catalog

#: Stands for "this expression's value cannot be known without running the method".
UNKNOWN = object()


@dataclass(frozen=True)
class Call:
    """One call of an activation function in a method, in the order of evaluation.

    ``text`` is the callee as written (``F.relu``), ``line`` and ``column`` are those of the call in the dedented source.
    """

    text: str
    kind: str
    line: int
    column: int

    @property
    def short(self) -> str:
        """The last part of the callee's name."""
        return self.text.rpartition(".")[2]


@functools.lru_cache(maxsize=4096)
def parse(function: types.FunctionType) -> ast.FunctionDef | None:
    """Return a function's syntax tree (do not change it), or ``None`` when it has no readable source of its own."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef):
        return tree.body[0]
    return None  # a lambda, or several definitions on one line


def own_methods(module: nn.Module) -> Iterator[tuple[type, str, types.FunctionType]]:
    """Yield the methods of a module that its users wrote: defining class, name, function; overridden ones too."""
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] == "torch" or cls is object:
            continue
        for name, value in vars(cls).items():
            if isinstance(value, types.FunctionType) and not name.startswith("_regimewrap"):
                yield cls, name, value


class Scope:
    """What a method's names mean, as far as that is known without running it."""

    def __init__(self, function: types.FunctionType, module: nn.Module | None = None) -> None:
        code = function.__code__
        self.function = function
        self.module = module
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
                return getattr(base, node.attr, UNKNOWN)
            if isinstance(base, nn.Module):
                return _attribute(base, node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            base = self.value_of(node.value)
            if isinstance(base, list | tuple | dict | nn.ModuleList | nn.Sequential | nn.ModuleDict):
                try:
                    return base[node.slice.value]  # type: ignore[index]
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


def _attribute(module: nn.Module, name: str) -> Any:
    # Only what is stored: a property or a descriptor would run the user's code.
    for store in (module.__dict__, module._modules, module._parameters, module._buffers):
        if name in store:
            return store[name]
    return UNKNOWN


def in_evaluation_order(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a tree's nodes, children before parents: the order in which Python evaluates nested calls."""
    for child in ast.iter_child_nodes(node):
        yield from in_evaluation_order(child)
    yield node


def find_calls(function: types.FunctionType, module: nn.Module) -> list[tuple[Call, ast.Call]]:
    """Return the activation calls in one method's own code.

    Args:
        function: a method's function.
        module: an instance, so that ``self.act(x)`` can be looked up.
    """
    if not _may_call(function, module):
        return []
    tree = parse(function)
    if tree is None:
        return []
    scope = Scope(function, module)
    found = []
    for statement in tree.body:
        for node in in_evaluation_order(statement):
            if isinstance(node, ast.Call) and (kind := _kind(node, scope)) is not None:
                found.append((Call(ast.unparse(node.func), kind, node.lineno, node.col_offset), node))
    return found


def _kind(node: ast.Call, scope: Scope) -> str | None:
    value = scope.value_of(node.func)
    if value is UNKNOWN:
        if isinstance(node.func, ast.Attribute) and scope.value_of(node.func.value) is UNKNOWN:
            return catalog.TENSOR_METHODS.get(node.func.attr)
        return None
    if isinstance(value, nn.Module):
        return None  # a hook reaches it
    return catalog.kind_of_function(value)


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*(_names(each) for each in inner))


def _may_call(function: types.FunctionType, module: nn.Module) -> bool:
    names = _names(function.__code__) | set(function.__code__.co_freevars)
    for name in names:
        if name in catalog.TENSOR_METHODS or catalog.kind_of_name(name) is not None:
            return True
        held = module.__dict__.get(name, UNKNOWN)
        if held is not UNKNOWN and holds_activation(held):
            return True
        if catalog.kind_of_function(function.__globals__.get(name)) is not None:
            return True
    return False


def holds_activation(value: Any) -> bool:
    """Say whether a plain attribute is an activation function, or a list or dict with one in it."""
    if isinstance(value, list | tuple):
        return any(holds_activation(each) for each in value)
    if isinstance(value, dict):
        return any(holds_activation(each) for each in value.values())
    return catalog.kind_of_function(value) is not None
