"""Where a value comes from in a function's code: through names, casts and slices, back to the call that made it."""

from __future__ import annotations

import ast
import types

from torch import nn

from regimewrap.sites.read.code import Scope, Span, assigned, body_of, call_nodes, parse, span_of


def called_with(function: types.FunctionType, module: nn.Module, child: nn.Module) -> list[nn.Module]:
    """Return the modules whose results a method passes to a child.

    ``self.linear`` in ``self.act(self.linear(x))``, and in ``y = self.linear(x)`` followed by ``self.act(y)``.
    """
    function = body_of(function)
    scope = Scope(function, module)
    calls = [node for node, _ in call_nodes(function) if node.args and scope.value_of(node.func) is child]
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
        if isinstance(each, ast.Assign) and (each.end_lineno or 0) < node.lineno and _assigns(each, node.id)
    ]
    return max(assigned, key=lambda each: each.lineno).value if assigned else node


def _assigns(statement: ast.Assign, name: str) -> bool:
    """Say whether a statement gives a name its value, or a part of it that has the same dimensions."""
    for target in statement.targets:
        if isinstance(target, ast.Name) and target.id == name:
            return True
        parts = target.elts if isinstance(target, ast.Tuple) and _method(statement.value) in SPLITTING else []
        if any(isinstance(part, ast.Name) and part.id == name for part in parts):
            return True
    return False


#: Tensor methods that return parts along one dimension.
SPLITTING = ("chunk", "split", "tensor_split")

_KEEPING = ("to", "float", "half", "double", "bfloat16", "type_as", "contiguous", "clone", "detach")


def _method(node: ast.expr) -> str:
    """Return the name of the method that an expression calls, or an empty one."""
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""


def made_by(function: types.FunctionType, node: ast.expr) -> ast.expr:
    """Return the expression that a value comes from, through names, casts and slices that keep all dimensions."""
    function = body_of(function)
    for _ in range(20):
        node = _last_value(function, node)
        if isinstance(node, ast.Subscript):
            slices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if not all(isinstance(each, ast.Slice) for each in slices):
                break
            node = node.value
        elif _method(node) in _KEEPING:
            node = node.func.value  # type: ignore[attr-defined]
        elif not isinstance(node, ast.Name) or node.id not in assigned(function):
            break
    return node


def argument_at(
    function: types.FunctionType, span: Span, callee: types.FunctionType | None = None, name: str = ""
) -> ast.expr | None:
    """Return an argument of the call at a place: the first one (or the tensor whose method it is), or one by name.

    Args:
        function: whose code it is.
        span: where the call stands.
        callee: the plain function that is called, for an argument by name.
        name: its name.
    """
    function = body_of(function)
    call = next((node for node, _ in call_nodes(function) if span_of(node) == span), None)
    if call is None:
        return None
    if callee is not None:
        code = body_of(callee).__code__
        named = dict(zip(code.co_varnames[: code.co_argcount], call.args, strict=False))
        named |= {each.arg: each.value for each in call.keywords if each.arg is not None}
        found = named.get(name)
        return None if isinstance(found, ast.Starred) else found
    if call.args:
        return call.args[0]
    return call.func.value if isinstance(call.func, ast.Attribute) else None
