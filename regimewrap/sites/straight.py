"""Is a method straight-line code, so that a trace of it can be trusted?

A trace that succeeds can still be wrong: it freezes branches, loop counts, defaults and attributes at what they were
while tracing. So a method is traced only if nothing in it could be frozen: its code is a plain sequence of assignments
and calls, of child modules, torch functions and methods of its own intermediate values. Reads source; runs nothing.
"""

from __future__ import annotations

import ast
import functools
import types
from typing import Any

import torch
from torch import nn
from torch.overrides import get_overridable_functions

from regimewrap.sites.calls import UNKNOWN, Scope, parse

_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr, ast.Pass)
_EXPRESSIONS = (
    ast.Attribute,
    ast.BinOp,
    ast.Call,
    ast.Constant,
    ast.List,
    ast.Name,
    ast.Slice,
    ast.Subscript,
    ast.Tuple,
    ast.UnaryOp,
)
_GRAMMAR = (ast.expr_context, ast.operator, ast.unaryop, ast.keyword)
_WORDS = {
    ast.If: "an if statement",
    ast.IfExp: "a conditional expression",
    ast.For: "a loop",
    ast.While: "a loop",
    ast.With: "a with statement",
    ast.Try: "a try statement",
    ast.AugAssign: "an in-place assignment",
    ast.Raise: "a raise statement",
    ast.Assert: "an assert statement",
    ast.Compare: "a comparison",
    ast.BoolOp: "and/or",
    ast.Lambda: "a lambda",
    ast.ListComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.JoinedStr: "an f-string",
    ast.Starred: "star arguments",
}


def why_not_straight(function: types.FunctionType, module: nn.Module) -> str | None:
    """Return why a trace of a method might be wrong, or ``None`` if it can be trusted.

    Args:
        function: the method's function, as its class holds it.
        module: the instance whose children and attributes the method reads.
    """
    tree = parse(function)
    if tree is None:
        return "has no readable source"
    if tree.decorator_list or hasattr(function, "__wrapped__"):
        return "is decorated"
    arguments = tree.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        return "takes star, keyword-only or positional-only arguments"
    scope = Scope(function, module)
    for statement in tree.body:
        reason = _statement(statement, scope)
        if reason is not None:
            return reason
    return None


def _statement(statement: ast.stmt, scope: Scope) -> str | None:
    if not isinstance(statement, _STATEMENTS):
        return f"has {_WORDS.get(type(statement), type(statement).__name__)}"
    if isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant):
        return "drops a result"
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    for target in targets:
        names = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        if not all(isinstance(name, ast.Name) for name in names):
            return f"assigns to {ast.unparse(target)}"
    value = getattr(statement, "value", None)
    return None if value is None else _expression(value, scope)


def _expression(node: ast.AST, scope: Scope) -> str | None:
    if not isinstance(node, _EXPRESSIONS + _GRAMMAR):
        return f"has {_WORDS.get(type(node), type(node).__name__)}"
    if isinstance(node, ast.Call):
        return _call(node, scope)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return "has a not"
    if isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
        value = scope.value_of(node)
        if value is not UNKNOWN:
            stored = isinstance(value, nn.Module | torch.Tensor)
            return None if stored and _reads_self(node, scope) else f"reads {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and _is_self(node.value, scope):
            return f"reads {ast.unparse(node)}"
        if isinstance(node, ast.Name):
            return None if node.id in scope.locals and not _is_self(node, scope) else f"reads {node.id}"
    for child in ast.iter_child_nodes(node):
        reason = _expression(child, scope)
        if reason is not None:
            return reason
    return None


def _call(node: ast.Call, scope: Scope) -> str | None:
    if any(keyword.arg is None for keyword in node.keywords):
        return "has star arguments"
    arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
    for argument in arguments:
        reason = _expression(argument, scope)
        if reason is not None:
            return reason
    callee = scope.value_of(node.func)
    text = ast.unparse(node.func)
    if isinstance(callee, nn.Module):
        return None if callee is not scope.module else f"calls {text}"
    if callee is not UNKNOWN:
        if _reads_self(node.func, scope):
            return f"reads {text}"
        if not _from_torch(callee):
            return f"calls {text}"
        # Without an input among its arguments the call would run once, while tracing, and its result be frozen.
        has_input = any(
            isinstance(each, ast.Name) and each.id in scope.locals for a in arguments for each in ast.walk(a)
        )
        return None if has_input else f"calls {text} without an input"
    if isinstance(node.func, ast.Attribute) and not _is_self(node.func.value, scope):
        return _expression(node.func.value, scope)
    return f"calls {text}"


@functools.cache
def _traced_functions() -> frozenset[Any]:
    # Functions that hand a call on a traced value to the tracer whole, whatever branches they have inside.
    return frozenset(function for group in get_overridable_functions().values() for function in group)


def _from_torch(function: Any) -> bool:
    try:
        return function in _traced_functions()
    except TypeError:  # unhashable
        return False


def _is_self(node: ast.AST, scope: Scope) -> bool:
    return isinstance(node, ast.Name) and node.id == scope.self_name


def _reads_self(node: ast.AST, scope: Scope) -> bool:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return _is_self(node, scope)
