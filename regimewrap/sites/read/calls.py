"""Activations called as functions: where a method's own code says ``F.relu(x)`` or ``x.relu()``."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from regimewrap.sites import catalog
from regimewrap.sites.read.code import (
    NOWHERE,
    UNKNOWN,
    Scope,
    Span,
    body_of,
    call_nodes,
    code_of,
    constant_of,
    in_evaluation_order,
    names_in,
    parse,
    span_of,
)
from regimewrap.sites.read.helpers import helper_nodes
from regimewrap.sites.read.memory import remembered
from regimewrap.sites.read.named import holds_activation, kind_of_call, kind_of_short, names_activation


@dataclass(frozen=True)
class Call:
    """One call of an activation function in a method.

    ``text`` is the callee as written (``F.relu``); ``span`` the call's first line, column, last line and column in the
    method's source, whose first line is 1. ``dropped`` says that the method drops the result, which has an effect only
    if the call works in place; ``target`` is then the local name that it works on, if that is certain. ``relu`` says
    that the callee is a ReLU, certainly called to make a new tensor of one argument; ``factor`` that the call's result
    only multiplies something, and its argument may be left out: ``out * F.silu(z)`` where ``z`` is ``None`` by default;
    ``mixed`` that something else than an activation is called at the same place, another time.
    """

    text: str
    kind: str
    span: Span
    dropped: bool = False
    target: str | None = None
    relu: bool = False
    factor: bool = False
    mixed: bool = False

    @property
    def short(self) -> str:
        """The last part of the callee's name."""
        name = re.sub(r"\[[^]]*\]|\([^)]*\)", "", self.text).rpartition(".")[2]
        return name if name.isidentifier() and name != "getattr" else self.kind


def find_calls(
    function: types.FunctionType,
    module: nn.Module | None,
    registered: Set[int] = frozenset(),
    arguments: Mapping[str, Any] = MappingProxyType({}),
    callees: Mapping[Span, Sequence[Any]] = MappingProxyType({}),
) -> list[Call]:
    """Return the activation calls in one function's own code.

    Args:
        function: a method's function, or a plain one.
        module: for a method an instance, so that ``self.act(x)`` can be looked up.
        registered: ids of the modules that hooks reach; a call of any other activation module counts as a call here.
        arguments: what a plain function is certainly called with.
        callees: by place, what is called there, as far as the tracer followed the code.
    """
    function = body_of(function)
    names = names_in(code_of(function))
    known = {span: _kinds_called(values, registered) for span, values in callees.items()}
    known = {span: kinds for span, kinds in known.items() if any(kinds)}
    if not (known or names_activation(function) or (module is not None and holds_activation(module, names))):
        return []
    if parse(function) is None:
        children = {name for each in module.modules() for name in each._modules} if module is not None else set()
        kinds = {name: catalog.TENSOR_METHODS.get(name) or catalog.kind_of_name(name) for name in names}
        return [Call(name, kind, NOWHERE) for name, kind in sorted(kinds.items()) if kind and name not in children]
    scope = Scope(function, module, arguments)
    factors = _factors(function)
    found = []
    for node, dropped in call_nodes(function):
        span = span_of(node)
        several = known.get(span, ())
        kind = kind_of_call(node, scope, registered) or next(filter(None, several), None)
        if kind is not None:
            target = in_place_target(node) if dropped and _works_in_place(node) else None
            relu = _is_plain_relu(node, scope) and not dropped
            mixed = None in several
            found.append(Call(ast.unparse(node.func), kind, span, dropped, target, relu, span in factors, mixed))
    return found + [Call("swish", "silu", span_of(node)) for node in _swishes(function)]


def _kinds_called(values: Sequence[Any], registered: Set[int]) -> tuple[str | None, ...]:
    """Return the kinds of the activations that are called at one place; ``None`` for what is none, or has a hook."""
    kinds = [
        None if id(value) in registered else catalog.kind_of_callee(value) or kind_of_short(value) for value in values
    ]
    return tuple(dict.fromkeys(kinds))


@remembered
def _swishes(function: types.FunctionType) -> tuple[ast.expr, ...]:
    """Return the expressions that spell a swish out: ``x * sigmoid(x)``, ``x * sigmoid(x * alpha)``."""
    tree, scope = parse(function), Scope(function)
    if tree is None or "sigmoid" not in names_in(code_of(function)):
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


@remembered
def _factors(function: types.FunctionType, depth: int = 1) -> Mapping[Span, str]:
    """Return where activations of optional arguments are called and at once multiplied with something, and of which.

    What a function hands on as such an argument counts too: the same gate is often applied here or there.
    """
    tree = parse(function)
    if tree is None:
        return {}
    named = [*tree.args.posonlyargs, *tree.args.args]
    pairs = [*zip(reversed(named), reversed(tree.args.defaults), strict=False)]
    pairs += [(name, value) for name, value in zip(tree.args.kwonlyargs, tree.args.kw_defaults, strict=True) if value]
    optional = {name.arg for name, value in pairs if isinstance(value, ast.Constant) and value.value is None}
    for helper, nodes in helper_nodes(function) if depth else ():
        for parameter in set(_factors(body_of(helper), depth - 1).values()):
            given = [_argument(node, helper, parameter) for node in nodes]
            handed = {_root_name(each.body if isinstance(each, ast.IfExp) else each) for each in given if each}
            optional |= {each for each in handed if each is not None and each != code_of(function).co_varnames[0]}
    sides: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides += [node.left, node.right]
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Mult):
            sides.append(node.value)
    scope = Scope(function)
    calls = [each for each in sides if isinstance(each, ast.Call) and len(each.args) == 1]
    roots = {span_of(each): _root_name(each.args[0]) for each in calls if _may_activate(each, scope)}
    return {span: root for span, root in roots.items() if root in optional}


def _argument(call: ast.Call, callee: types.FunctionType, name: str) -> ast.expr | None:
    code = code_of(body_of(callee))
    named = dict(zip(code.co_varnames[: code.co_argcount], call.args, strict=False))
    named |= {each.arg: each.value for each in call.keywords if each.arg is not None}
    found = named.get(name)
    return None if isinstance(found, ast.Starred) else found


def _may_activate(node: ast.Call, scope: Scope) -> bool:
    """Say whether a call is one of an activation, as far as can be said without an instance."""
    return isinstance(node.func, ast.Subscript) or kind_of_call(node, scope, frozenset()) is not None


def _root_name(node: ast.expr) -> str | None:
    """Return ``z`` of ``z``, ``z[..., 0]`` and ``z.to(dtype)``."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def find_dropped(function: types.FunctionType, module: nn.Module) -> list[tuple[ast.Call, nn.Module]]:
    """Return the calls of activation modules whose result is dropped, with that module.

    ``self.relu(x)`` on a line of its own works in place on ``x``; what a hook returns would be dropped with it.
    """
    function = body_of(function)
    dropped = [node for node, dropped in call_nodes(function) if dropped]
    if not dropped:
        return []
    scope = Scope(function, module)
    callees = [(node, scope.value_of(node.func)) for node in dropped]
    return [
        (node, callee) for node, callee in callees if isinstance(callee, nn.Module) and catalog.kind_of_module(callee)
    ]


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
    keeps = (constant_of(each.value, scope) is False for each in node.keywords)
    return len(node.args) == 1 and not isinstance(node.args[0], ast.Starred) and all(keeps)


def _works_in_place(node: ast.Call) -> bool:
    """Say whether a function call certainly changes its input: ``relu_(x)``, ``F.relu(x, inplace=True)``."""
    name = ast.unparse(node.func)
    flags = [keyword.value for keyword in node.keywords if keyword.arg == "inplace"] or node.args[1:2]
    return name.endswith("_") or any(isinstance(flag, ast.Constant) and flag.value is True for flag in flags)
