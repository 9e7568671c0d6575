"""Can a trace of a method be trusted, and under which condition?

A trace that succeeds can still be wrong: it freezes branches, loop counts, defaults and attributes at what they were
while tracing. So a method is traced only if nothing in it could be frozen unnoticed: its code is a plain sequence of
assignments and calls, of child modules, torch functions and methods of its own intermediate values. Plain attributes
of ``self`` (``self.training``, ``self.drop_rate``), and branches on nothing else, are accepted and recorded: such a
trace holds as long as these attributes read the same. Reads source; runs nothing.
"""

from __future__ import annotations

import ast
import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import get_overridable_functions

from regimewrap.sites.read.code import UNKNOWN, Scope, parse

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
# What may be made of plain attributes and constants, in the test of a branch too.
_PLAIN_EXPRESSIONS = (
    ast.BinOp,
    ast.BoolOp,
    ast.Compare,
    ast.Constant,
    ast.IfExp,
    ast.List,
    ast.Slice,
    ast.Subscript,
    ast.Tuple,
    ast.UnaryOp,
)
_PLAIN_GRAMMAR = (ast.boolop, ast.cmpop, ast.expr_context, ast.operator, ast.unaryop)
_WORDS = {
    ast.For: "a loop",
    ast.While: "a loop",
    ast.With: "a with statement",
    ast.Try: "a try statement",
    ast.AugAssign: "an in-place assignment",
    ast.Raise: "a raise statement",
    ast.Assert: "an assert statement",
    ast.Lambda: "a lambda",
    ast.ListComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.JoinedStr: "an f-string",
    ast.Starred: "star arguments",
}


@dataclass(frozen=True)
class Proof:
    """Whether a trace of a method can be trusted, and what of ``self`` it depends on.

    Attributes:
        why_not: why a trace might be wrong; ``None`` if it can be trusted.
        attributes: names of the plain attributes that the method may read; a trace holds for what they were.
        parts: the expressions that read children or tensors of ``self``, each with which of the two it is.
    """

    why_not: str | None
    attributes: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()


class _Reads(Scope):
    """A method's scope that writes down what is read from ``self``."""

    def __init__(self, function: types.FunctionType, module: nn.Module) -> None:
        super().__init__(function, module)
        self.owner = module
        self.attributes: dict[str, None] = {}
        self.parts: dict[str, str] = {}

    def accept(self, node: ast.expr, value: Any) -> bool:
        """Write down the reading of a known value; ``False`` if it is neither a part of ``self`` nor plain."""
        if not _reads_self(node, self):
            return False
        if isinstance(value, nn.Module | torch.Tensor):
            self.parts[ast.unparse(node)] = "child" if isinstance(value, nn.Module) else "tensor"
            return True
        return self.accept_plain(node)

    def accept_plain(self, node: ast.expr) -> bool:
        """Write down the reading of a plain attribute, or of an item of one; ``False`` if it is something else."""
        while isinstance(node, ast.Subscript):
            node = node.value
        if not isinstance(node, ast.Attribute) or not _is_self(node.value, self):
            return False
        shadowed = hasattr(getattr(type(self.owner), node.attr, None), "__set__")  # a property wins over __dict__
        if shadowed or not is_plain(self.owner.__dict__.get(node.attr, UNKNOWN)):
            return False
        self.attributes[node.attr] = None
        return True


def is_plain(value: object) -> bool:
    """Say whether a value is a bool, int, float, str, None or a tuple of these, and of no subclass of them.

    The ``repr`` of such a value tells it from every other, so that ``True``, ``1`` and ``1.0``, or ``0.0`` and
    ``-0.0``, are told apart, and a NaN is recognised.
    """
    kind = type(value)
    if kind is tuple:
        return all(map(is_plain, value))  # type: ignore[call-overload]
    return value is None or kind is bool or kind is int or kind is float or kind is str


def prove(function: types.FunctionType, module: nn.Module) -> Proof:
    """Say whether a trace of a method can be trusted.

    Args:
        function: the method's function, as its class holds it.
        module: the instance whose children and attributes the method reads.
    """
    tree = parse(function)
    if tree is None:
        return Proof("has no readable source")
    if tree.decorator_list or hasattr(function, "__wrapped__"):
        return Proof("is decorated")
    arguments = tree.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        return Proof("takes star, keyword-only or positional-only arguments")
    scope = _Reads(function, module)
    reason = _block(tree.body, scope)
    return Proof(reason) if reason is not None else Proof(None, tuple(scope.attributes), tuple(scope.parts.items()))


def _block(statements: list[ast.stmt], scope: _Reads) -> str | None:
    reasons = (_statement(statement, scope) for statement in statements)
    return next((reason for reason in reasons if reason is not None), None)


def _statement(statement: ast.stmt, scope: _Reads) -> str | None:
    if isinstance(statement, ast.If):
        return _plain(statement.test, scope) or _block([*statement.body, *statement.orelse], scope)
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


def _expression(node: ast.AST, scope: _Reads) -> str | None:
    if isinstance(node, ast.IfExp):
        return _plain(node.test, scope) or _expression(node.body, scope) or _expression(node.orelse, scope)
    if isinstance(node, ast.BoolOp | ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        return _plain(node, scope)
    if not isinstance(node, _EXPRESSIONS + _GRAMMAR):
        return f"has {_WORDS.get(type(node), type(node).__name__)}"
    if isinstance(node, ast.Call):
        return _call(node, scope)
    if isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
        value = scope.value_of(node)
        if value is not UNKNOWN:
            return None if scope.accept(node, value) else f"reads {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and _is_self(node.value, scope):
            return f"reads {ast.unparse(node)}"
        if isinstance(node, ast.Name):
            return None if node.id in scope.locals and not _is_self(node, scope) else f"reads {node.id}"
    for child in ast.iter_child_nodes(node):
        reason = _expression(child, scope)
        if reason is not None:
            return reason
    return None


def _plain(node: ast.AST, scope: _Reads) -> str | None:
    """Say why a value depends on more than plain attributes and constants."""
    if isinstance(node, ast.Attribute) and scope.accept_plain(node):
        return None
    if not isinstance(node, _PLAIN_EXPRESSIONS + _PLAIN_GRAMMAR):
        return f"decides by {ast.unparse(node)}"
    if isinstance(node, ast.Compare) and any(isinstance(each, ast.Is | ast.IsNot) for each in node.ops):
        # Equal numbers and strings need not be one object, so identity is known for None, True and False only.
        known = (isinstance(each, ast.Constant) and isinstance(each.value, bool | None) for each in node.comparators)
        if not all(known):
            return f"decides by {ast.unparse(node)}"
    for child in ast.iter_child_nodes(node):
        reason = _plain(child, scope)
        if reason is not None:
            return reason
    return None


def _call(node: ast.Call, scope: _Reads) -> str | None:
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
        return None if callee is not scope.module and scope.accept(node.func, callee) else f"calls {text}"
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
