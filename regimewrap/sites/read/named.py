"""Which activation a call, a name, or what an object holds stands for, as far as code shows."""

from __future__ import annotations

import ast
import dis
import types
from collections.abc import Set
from typing import Any

from torch import nn

from regimewrap.sites import catalog
from regimewrap.sites.read.code import TORCH_LAYERS, UNKNOWN, Scope, code_of, constant_of, names_in
from regimewrap.sites.read.memory import remembered


def kind_of_call(node: ast.Call, scope: Scope, registered: Set[int]) -> str | None:
    """Return the kind of activation that a call is, if it is one; ``registered`` as for ``find_calls``."""
    value = scope.value_of(node.func)
    if value is UNKNOWN:
        if isinstance(node.func, ast.Attribute) and scope.value_of(node.func.value) is UNKNOWN:
            return catalog.TENSOR_METHODS.get(node.func.attr)
        if isinstance(node.func, ast.Subscript):
            return _kind_held(scope.value_of(node.func.value), constant_of(node.func.slice, scope))
        if isinstance(node.func, ast.Call):  # nn.ReLU()(x)
            return catalog.kind_of_class(scope.value_of(node.func.func))
        if isinstance(node.func, ast.IfExp):  # (F.relu if here else F.gelu)(x)
            kinds = [catalog.kind_of_function(scope.value_of(each)) for each in (node.func.body, node.func.orelse)]
            return kinds[0] if all(kinds) else None
        return None
    if isinstance(value, nn.Module):
        return None if id(value) in registered or not registered else catalog.kind_of_module(value)
    return catalog.kind_of_function(value)


def _kind_held(container: Any, key: Any = UNKNOWN) -> str | None:
    """Return the kind of what a list or dict gives for a key, or for every key, if that is an activation function."""
    if isinstance(container, dict):
        values = [dict.__getitem__(container, key)] if _has(container, key) else list(dict.values(container))
    elif type(container) in (list, tuple):
        values = list(container)
    else:
        return None
    # A dictionary with a __getitem__ of its own may make what it returns, as Hugging Face's ACT2FN does of classes.
    makes = isinstance(container, dict) and type(container).__getitem__ is not dict.__getitem__
    kinds = {_kind_of_item(value, makes) for value in values}
    return kinds.pop() if len(kinds) == 1 else None


def _has(container: dict[Any, Any], key: Any) -> bool:
    return type(key) in (str, int, bool) and dict.__contains__(container, key)


def _kind_of_item(value: Any, makes: bool) -> str | None:
    if makes:
        value = value[0] if type(value) is tuple and value else value  # a class with its arguments
        if isinstance(value, type):
            return catalog.kind_of_class(value)
    return None if isinstance(value, nn.Module) else catalog.kind_of_function(value)


def kind_of_short(value: Any) -> str | None:
    """Return the kind of an unnamed function that returns one activation call and does nothing else.

    ``lambda t: F.leaky_relu(t, 0.2)``, a function defined in another, or a method of a helper object.
    """
    function = function_of(value)
    return None if function is None or (function.__module__ or "").startswith("torch") else _kind_returned(function)


def function_of(value: Any) -> types.FunctionType | None:
    """Return the plain function that runs when a function, a method or a helper object is called."""
    if isinstance(value, types.MethodType):
        value = value.__func__
    own = type(value).__dict__.get("__call__")
    value = own if isinstance(own, types.FunctionType) else value
    return value if isinstance(value, types.FunctionType) else None


@remembered
def _kind_returned(value: types.FunctionType) -> str | None:
    code = code_of(value)
    steps = [each.opname for each in dis.get_instructions(code) if each.opname not in ("CACHE", "RESUME", "NOP")]
    calls = [name for name in steps if name.startswith("CALL") and "INTRINSIC" not in name]
    if len(calls) != 1 or len(steps) < 2 or steps[-1] != "RETURN_VALUE" or not steps[-2].startswith("CALL"):
        return None
    cells = dict(zip(code.co_freevars, value.__closure__ or (), strict=True))
    held = [_content(cell) for cell in cells.values()] + [value.__globals__.get(name) for name in code.co_names]
    kinds = {catalog.TENSOR_METHODS.get(name) or catalog.kind_of_name(name) for name in code.co_names}
    kinds |= {catalog.kind_of_callee(each) for each in held}
    kinds -= {None}
    return kinds.pop() if len(kinds) == 1 else None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@remembered
def names_activation(function: types.FunctionType) -> bool:
    """Say whether code uses a name that may be an activation's, whatever it does with it."""
    names = names_in(code_of(function))
    return any(
        name in catalog.TENSOR_METHODS
        or catalog.kind_of_name(name) is not None
        or _holds_activation(function.__globals__.get(name))
        for name in names
    )


def holds_activation(module: nn.Module, names: Set[str]) -> bool:
    """Say whether a plain attribute of one of these names is an activation function, or a list or dict of them."""
    if isinstance(module, TORCH_LAYERS) and "activation" in names:
        return True
    return any(_holds_activation(module.__dict__[name]) for name in names & module.__dict__.keys() - _TORCHS)


_TORCHS = nn.Module().__dict__.keys()


def _holds_activation(value: Any, depth: int = 2) -> bool:
    if isinstance(value, dict) and depth:
        makes = type(value).__getitem__ is not dict.__getitem__
        values = list(dict.values(value))
        return any(_kind_of_item(each, makes) is not None or _holds_activation(each, depth - 1) for each in values)
    if type(value) in (list, tuple) and depth:
        return any(_holds_activation(each, depth - 1) for each in value)
    if isinstance(value, nn.Module):
        return catalog.kind_of_module(value) is not None
    return callable(value) and catalog.kind_of_function(value) is not None
