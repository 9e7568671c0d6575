"""Activations called as functions: where a method's own code says ``F.relu(x)`` or ``x.relu()``.

Reads source; runs none of the user's code.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import types
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from regimewrap.sites import catalog

#: Modules of torch's own that call an activation function that they hold.
TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

#: Stands for "this expression's value cannot be known without running the method".
UNKNOWN = object()


Span = tuple[int, int, int, int]

#: The span of a call that only the compiled code shows, since there is no source to be read.
NOWHERE: Span = (0, 0, 0, 0)


@dataclass(frozen=True)
class Call:
    """One call of an activation function in a method.

    ``text`` is the callee as written (``F.relu``); ``span`` the call's first line, column, last line and column in the
    method's source, whose first line is 1. ``dropped`` says that the method drops the result, which has an effect only
    if the call works in place; ``target`` is then the local name that it works on, if that is certain. ``relu`` says
    that the callee is a ReLU, certainly called to make a new tensor of one argument.
    """

    text: str
    kind: str
    span: Span
    dropped: bool = False
    target: str | None = None
    relu: bool = False

    @property
    def short(self) -> str:
        """The last part of the callee's name."""
        return self.text.rpartition(".")[2].partition("[")[0]


def span_of(node: ast.expr | ast.stmt) -> Span:
    """Return where a node stands."""
    return node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0


def body_of(function: types.FunctionType) -> types.FunctionType:
    """Return the function that the user wrote, below its decorators."""
    while isinstance(inner := getattr(function, "__wrapped__", None), types.FunctionType):
        function = inner
    return function


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


def find_calls(
    function: types.FunctionType, module: nn.Module | None, registered: Set[int] = frozenset()
) -> list[Call]:
    """Return the activation calls in one function's own code.

    Args:
        function: a method's function, or a plain one.
        module: for a method an instance, so that ``self.act(x)`` can be looked up.
        registered: ids of the modules that hooks reach; a call of any other activation module counts as a call here.
    """
    function = body_of(function)
    held = held_activations(module) if module is not None else set()
    if not _names_activation(function) and not held & _names(function.__code__):
        return []
    if parse(function) is None:
        kinds = {
            name: catalog.TENSOR_METHODS.get(name) or catalog.kind_of_name(name) for name in _names(function.__code__)
        }
        return [
            Call(name, kind, NOWHERE)
            for name, kind in sorted(kinds.items())
            if kind and (module is None or name not in module._modules)
        ]
    scope = Scope(function, module)
    found = []
    for node, dropped in _call_nodes(function):
        kind = _kind(node, scope, registered)
        if kind is not None:
            target = in_place_target(node) if dropped and _works_in_place(node) else None
            relu = _is_plain_relu(node, scope) and not dropped
            found.append(Call(ast.unparse(node.func), kind, span_of(node), dropped, target, relu))
    return found + [Call("swish", "silu", span_of(node)) for node in _swishes(function)]


@functools.lru_cache(maxsize=4096)
def _swishes(function: types.FunctionType) -> tuple[ast.expr, ...]:
    """Return the expressions that spell a swish out: ``x * sigmoid(x)``, ``x * sigmoid(x * alpha)``."""
    tree, scope = parse(function), Scope(function)
    if tree is None or "sigmoid" not in _names(function.__code__):
        return ()
    return tuple(node for statement in tree.body for node in in_evaluation_order(statement) if _is_swish(node, scope))


def _is_swish(node: ast.AST, scope: Scope) -> TypeGuard[ast.expr]:
    for value, weight in _product(node):
        if isinstance(value, ast.Call) or not isinstance(weight, ast.Call):
            continue
        method = isinstance(weight.func, ast.Attribute) and scope.value_of(weight.func) is UNKNOWN
        given = [weight.func.value, *weight.args] if method and isinstance(weight.func, ast.Attribute) else weight.args
        kind = catalog.TENSOR_METHODS.get(ast.unparse(weight.func).rpartition(".")[2]) if method else None
        if len(given) == 1 and (kind or catalog.kind_of_function(scope.value_of(weight.func))) == "sigmoid":
            scaled = {ast.unparse(a) for a, b in _product(given[0]) if not isinstance(b, ast.Call)}
            if ast.unparse(value) in {ast.unparse(given[0]), *scaled}:
                return True
    return False


def _product(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """Return the factors of a product of two, either way round; none for anything else."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [(node.left, node.right), (node.right, node.left)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "mul":
        both = node.args if ast.unparse(node.func.value) == "torch" else [node.func.value, *node.args]
        return [(both[0], both[1]), (both[1], both[0])] if len(both) == 2 and not node.keywords else []
    return []


@functools.lru_cache(maxsize=4096)
def find_helpers(function: types.FunctionType) -> tuple[types.FunctionType, ...]:
    """Return the plain functions that a method calls by name and that call an activation themselves."""
    function = body_of(function)
    known = (function.__globals__.get(name) for name in function.__code__.co_names)
    if not any(_is_helper(value) for value in known):
        return ()
    scope = Scope(function)
    callees = {id(value): value for node, _ in _call_nodes(function) if _is_helper(value := scope.value_of(node.func))}
    return tuple(callees.values())


def _is_helper(value: Any) -> bool:
    return (
        isinstance(value, types.FunctionType)
        and value.__module__.partition(".")[0] != "torch"
        and catalog.kind_of_function(value) is None
        and _names_activation(body_of(value))
    )


def find_dropped(function: types.FunctionType, module: nn.Module) -> list[tuple[ast.Call, nn.Module]]:
    """Return the calls of activation modules whose result is dropped, with that module.

    ``self.relu(x)`` on a line of its own works in place on ``x``; what a hook returns would be dropped with it.
    """
    function = body_of(function)
    dropped = [node for node, dropped in _call_nodes(function) if dropped]
    if not dropped:
        return []
    scope = Scope(function, module)
    callees = [(node, scope.value_of(node.func)) for node in dropped]
    return [
        (node, callee) for node, callee in callees if isinstance(callee, nn.Module) and catalog.kind_of_module(callee)
    ]


@functools.lru_cache(maxsize=4096)
def _call_nodes(function: types.FunctionType) -> tuple[tuple[ast.Call, bool], ...]:
    """Return a function's calls in order of evaluation, each with whether its result is dropped."""
    tree = parse(function)
    if tree is None:
        return ()
    dropped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = [node for statement in tree.body for node in in_evaluation_order(statement)]
    return tuple((node, id(node) in dropped) for node in nodes if isinstance(node, ast.Call))


def called_with(function: types.FunctionType, module: nn.Module, child: nn.Module) -> list[nn.Module]:
    """Return the modules whose results a method passes to a child.

    ``self.linear`` in ``self.act(self.linear(x))``, and in ``y = self.linear(x)`` followed by ``self.act(y)``.
    """
    function = body_of(function)
    scope = Scope(function, module)
    calls = [node for node, _ in _call_nodes(function) if node.args and scope.value_of(node.func) is child]
    sources = [_last_value(function, node.args[0]) for node in calls]
    callees = [scope.value_of(source.func) for source in sources if isinstance(source, ast.Call)]
    return [each for each in callees if isinstance(each, nn.Module)]


def _last_value(function: types.FunctionType, node: ast.expr) -> ast.expr:
    """Return what was last assigned, in the order of lines, to a local name; any other expression is itself."""
    tree = parse(function)
    if not isinstance(node, ast.Name) or tree is None:
        return node
    assigned = [
        each
        for each in ast.walk(tree)
        if isinstance(each, ast.Assign)
        and each.lineno < node.lineno
        and [target.id for target in each.targets if isinstance(target, ast.Name)] == [node.id]
    ]
    return max(assigned, key=lambda each: each.lineno).value if assigned else node


def in_place_target(node: ast.Call) -> str | None:
    """Return the local name that a call with a dropped result changes in place, if it is one name."""
    base = node.func.value if isinstance(node.func, ast.Attribute) else None
    if node.args and isinstance(node.args[0], ast.Name):
        return node.args[0].id
    return base.id if isinstance(base, ast.Name) and not node.args else None


def _is_plain_relu(node: ast.Call, scope: Scope) -> bool:
    """Say whether a call is ``F.relu(x)``, ``torch.relu(x)``, ``x.relu()`` or a module's, and makes a new tensor."""
    callee = scope.value_of(node.func)
    if callee is UNKNOWN:
        method = isinstance(node.func, ast.Attribute) and node.func.attr == "relu"
        return method and not node.args and not node.keywords
    if not (callee is F.relu or callee is torch.relu or type(callee) is nn.ReLU):
        return False
    keeps = (isinstance(each.value, ast.Constant) and each.value.value is False for each in node.keywords)
    return len(node.args) == 1 and not isinstance(node.args[0], ast.Starred) and all(keeps)


def _works_in_place(node: ast.Call) -> bool:
    """Say whether a function call certainly changes its input: ``relu_(x)``, ``F.relu(x, inplace=True)``."""
    name = ast.unparse(node.func)
    flags = [keyword.value for keyword in node.keywords if keyword.arg == "inplace"] or node.args[1:2]
    return name.endswith("_") or any(isinstance(flag, ast.Constant) and flag.value is True for flag in flags)


def _kind(node: ast.Call, scope: Scope, registered: Set[int]) -> str | None:
    value = scope.value_of(node.func)
    if value is UNKNOWN:
        if isinstance(node.func, ast.Attribute) and scope.value_of(node.func.value) is UNKNOWN:
            return catalog.TENSOR_METHODS.get(node.func.attr)
        if isinstance(node.func, ast.Subscript):
            return _kind_held(scope.value_of(node.func.value))
        return None
    if isinstance(value, nn.Module):
        return None if id(value) in registered or not registered else catalog.kind_of_module(value)
    return catalog.kind_of_function(value)


def _kind_held(container: Any) -> str | None:
    """Return the kind of the activation functions in a plain list or dict, if that is all there is in it."""
    values = list(container.values()) if type(container) is dict else container
    if type(values) not in (list, tuple) or not values:
        return None
    kinds = {None if isinstance(value, nn.Module) else catalog.kind_of_function(value) for value in values}
    return kinds.pop() if len(kinds) == 1 else None


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset((*code.co_names, *code.co_freevars)).union(*(_names(each) for each in inner))


@functools.lru_cache(maxsize=4096)
def _names_activation(function: types.FunctionType) -> bool:
    names = _names(function.__code__)
    return any(
        name in catalog.TENSOR_METHODS
        or catalog.kind_of_name(name) is not None
        or _holds_activation(function.__globals__.get(name))
        for name in names
    )


def held_activations(module: nn.Module) -> Set[str]:
    """Return the names of plain attributes that are activation functions, or lists or dicts of them."""
    held = {name for name, value in module.__dict__.items() if not name.startswith("_") and _holds_activation(value)}
    return held | {"activation"} if isinstance(module, TORCH_LAYERS) else held


def _holds_activation(value: Any) -> bool:
    if type(value) in (list, tuple, dict):
        values = value.values() if isinstance(value, dict) else value
        return any(_holds_activation(each) for each in values)
    if isinstance(value, nn.Module):
        return catalog.kind_of_module(value) is not None
    return callable(value) and catalog.kind_of_function(value) is not None
