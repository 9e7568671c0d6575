"""What names and expressions mean to the tracer, as far as that is known without running them."""

from __future__ import annotations

import ast
import builtins
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from regimewrap.sites.flow.writing import (
    BINARY,
    COMPARE,
    CONTAINERS,
    KNOWN,
    PLAIN,
    STEPS,
    TURNS,
    UNARY,
    Bound,
    Env,
    Made,
    Super,
    TooLongError,
    Writer,
    attempt,
    either,
    unknown,
)
from regimewrap.sites.read.code import UNKNOWN, attribute_of, code_of, stored

#: Containers with more entries than this are not read.
_MOST = 512


class Expressions(Writer):
    """Reads expressions; calls are for ``Tracer`` to follow."""

    _call: Callable[[ast.Call, Env], Any]
    _inline: Callable[..., Any]
    _assign: Callable[[ast.expr, Any, Env], None]

    def _name(self, name: str, env: Env) -> Any:
        around: Any = env
        while around is not None:
            if name in around:
                return around[name]
            around = around.cells
        function = env.function
        if name in code_of(function).co_freevars:
            try:
                cells = function.__closure__ or ()
                return own(cells[code_of(function).co_freevars.index(name)].cell_contents)
            except (ValueError, IndexError):
                return UNKNOWN
        return own(function.__globals__.get(name, getattr(builtins, name, UNKNOWN)))

    def _attribute(self, base: Any, name: str) -> Any:
        if base is UNKNOWN or base is None:
            return UNKNOWN
        if isinstance(base, fx.Node):
            return self._node("call_function", getattr, (base, name))
        if type(base) is Super:
            classes = type(base.owner).__mro__
            after = classes[classes.index(base.cls) + 1 :] if base.cls in classes else ()
            value = next((vars(home)[name] for home in after if name in vars(home)), UNKNOWN)
            return types.MethodType(value, base.owner) if isinstance(value, types.FunctionType) else value
        if not issubclass(type(base), nn.Module):
            value = attribute_of(base, name)
            if value is UNKNOWN:
                return self._property(base, name)
            return own(value)
        path = self._paths.get(id(base))
        value = stored(base, name)
        if path is not None:
            self.trace.reads[path, name] = value
        if name in ("_modules", "_parameters", "_buffers"):
            return {key: self._attribute(base, key) for key in base.__dict__[name]}
        if name == "training":
            return UNKNOWN  # read in both modes
        if value is UNKNOWN:
            value = attribute_of(base, name)
            return self._property(base, name) if value is UNKNOWN else own(value)
        if isinstance(value, torch.Tensor):
            return self._node("get_attr", f"{path}.{name}" if path else name) if path is not None else UNKNOWN
        return own(value)

    def _property(self, base: Any, name: str) -> Any:
        found = next((vars(home)[name] for home in type(base).__mro__ if name in vars(home)), UNKNOWN)
        if isinstance(found, property) and isinstance(found.fget, types.FunctionType):
            return self._inline(found.fget, [base], {})
        if issubclass(type(base), nn.Module) and name in ("weight", "bias"):
            return self._node("get_attr", name)  # of a parametrization
        return UNKNOWN

    def _items(self, value: Any) -> list[Any]:
        """Return what a loop over a value meets."""
        if isinstance(value, nn.Module) and isinstance(value, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            path = self._paths.get(id(value))
            if path is not None:
                self.trace.reads[path, "_modules"] = tuple(value._modules)
            names = list(value._modules)
            return list(names) if isinstance(value, nn.ModuleDict) else [self._attribute(value, name) for name in names]
        if type(value) in CONTAINERS or type(value) is range:
            return list(value)[:TURNS]
        if isinstance(value, fx.Node):
            return [self._node("call_function", operator.getitem, (value, 0))]
        return [UNKNOWN]

    def _value(self, node: ast.expr, env: Env) -> Any:
        self._steps += 1
        if self._steps > STEPS:
            raise TooLongError
        read = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if read is not None:
            return read(node, env)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child, env)
        return UNKNOWN

    def _of_constant(self, node: ast.Constant, env: Env) -> Any:  # noqa: ARG002
        return node.value

    def _of_name(self, node: ast.Name, env: Env) -> Any:
        return self._name(node.id, env)

    def _of_call(self, node: ast.Call, env: Env) -> Any:
        return self._call(node, env)

    def _of_attribute(self, node: ast.Attribute, env: Env) -> Any:
        return self._attribute(self._value(node.value, env), node.attr)

    def _of_lambda(self, node: ast.Lambda, env: Env) -> Any:
        return Bound(node, env=env)

    def _of_namedexpr(self, node: ast.NamedExpr, env: Env) -> Any:
        value = self._value(node.value, env)
        self._assign(node.target, value, env)
        return value

    def _of_await(self, node: ast.Await, env: Env) -> Any:
        return self._value(node.value, env)

    def _of_yield(self, node: ast.Yield, env: Env) -> Any:
        if node.value is not None:
            self._returned[-1].append(self._value(node.value, env))
        return UNKNOWN

    def _of_tuple(self, node: ast.Tuple | ast.List, env: Env) -> Any:
        found: list[Any] = []
        for each in node.elts:
            value = self._value(each.value if isinstance(each, ast.Starred) else each, env)
            found += list(value) if isinstance(each, ast.Starred) and type(value) in (list, tuple) else [value]
        return found if isinstance(node, ast.List) else tuple(found)

    _of_list = _of_tuple

    def _of_dict(self, node: ast.Dict, env: Env) -> Any:
        found: dict[Any, Any] = {}
        for key, each in zip(node.keys, node.values, strict=True):
            value = self._value(each, env)
            name = self._value(key, env) if key is not None else None
            if key is None and type(value) is dict:
                found.update(value)
            else:
                found[name if type(name) in PLAIN else len(found)] = value
        return found

    def _of_slice(self, node: ast.Slice, env: Env) -> Any:
        return slice(
            *(None if each is None else self._value(each, env) for each in (node.lower, node.upper, node.step))
        )

    def _of_subscript(self, node: ast.Subscript, env: Env) -> Any:
        base, key = self._value(node.value, env), self._value(node.slice, env)
        if isinstance(base, fx.Node):
            return self._node("call_function", operator.getitem, (base, key))
        if isinstance(base, nn.Sequential | nn.ModuleList) and type(key) in (int, slice):
            items = self._items(base)
            if isinstance(key, slice):
                known = all(type(each) in (int, type(None)) for each in (key.start, key.stop, key.step))
                return items[key] if known else items  # up to a number that the forward pass decides: any of them
            return items[key] if -len(items) <= key < len(items) else UNKNOWN
        if isinstance(base, nn.ModuleDict) and type(key) is str:
            return self._attribute(base, key)
        if isinstance(base, list | tuple | dict | str):
            if isinstance(base, dict) and type(base).__getitem__ is not dict.__getitem__:
                return _made_by(base, key)
            try:
                return base[key]
            except Exception:  # noqa: BLE001  any of them may be meant
                return self._either(list(base.values()) if isinstance(base, dict) else list(base))
        return UNKNOWN

    def _binary(self, function: Any, left: Any, right: Any) -> Any:
        if isinstance(left, fx.Node) or isinstance(right, fx.Node):
            return self._node("call_function", function, (left, right))
        known = type(left) in KNOWN and type(right) in KNOWN
        return attempt(function, left, right) if known else UNKNOWN

    def _of_binop(self, node: ast.BinOp, env: Env) -> Any:
        left, right = self._value(node.left, env), self._value(node.right, env)
        with self._at(node, env):
            return self._binary(BINARY[type(node.op)], left, right)

    def _of_unaryop(self, node: ast.UnaryOp, env: Env) -> Any:
        value = self._value(node.operand, env)
        if isinstance(value, fx.Node) and not isinstance(node.op, ast.Not):
            return self._node("call_function", UNARY[type(node.op)], (value,))
        return UNARY[type(node.op)](value) if type(value) in KNOWN else UNKNOWN

    def _of_boolop(self, node: ast.BoolOp, env: Env) -> Any:
        values: list[Any] = []
        for each in node.values:
            value = self._value(each, env)
            known = type(value) in KNOWN
            if known and bool(value) == isinstance(node.op, ast.Or):
                return self._either([*values, value])
            if not known or each is node.values[-1]:
                values.append(value)
        return self._either(values)

    def _of_compare(self, node: ast.Compare, env: Env) -> Any:
        values = [self._value(each, env) for each in (node.left, *node.comparators)]
        if len(values) == 2 and isinstance(node.ops[0], ast.Is | ast.IsNot) and values[1] is None:
            value = values[0]
            if isinstance(value, fx.Node):
                known = value.op != "placeholder" and value.target not in (either, unknown, getattr)
                return isinstance(node.ops[0], ast.IsNot) if known and value.op != "call_module" else UNKNOWN
            return UNKNOWN if value is UNKNOWN else COMPARE[type(node.ops[0])](value, None)
        if any(isinstance(each, fx.Node) for each in values) and not isinstance(
            node.ops[0], ast.Is | ast.IsNot | ast.In
        ):
            return self._node("call_function", COMPARE[type(node.ops[0])], values[:2])
        if not all(type(each) in KNOWN for each in values):
            return UNKNOWN
        pairs = zip(node.ops, values, values[1:], strict=False)
        return attempt(all, (COMPARE[type(test)](a, b) for test, a, b in pairs))

    def _of_ifexp(self, node: ast.IfExp, env: Env) -> Any:
        test = self._value(node.test, env)
        if type(test) in KNOWN:
            return self._value(node.body if test else node.orelse, env)
        return self._either([self._value(node.body, env), self._value(node.orelse, env)])

    def _of_listcomp(self, node: Any, env: Env) -> Any:
        inner, found = Env(env.function, env, env.code), []

        def loop(rest: list[ast.comprehension]) -> None:
            if not rest:
                if isinstance(node, ast.DictComp):
                    found.append((self._value(node.key, inner), self._value(node.value, inner)))
                else:
                    found.append(self._value(node.elt, inner))
                return
            for item in self._items(self._value(rest[0].iter, inner)):
                self._assign(rest[0].target, item, inner)
                tests = [self._value(each, inner) for each in rest[0].ifs]
                if not any(type(each) in PLAIN and not each for each in tests):
                    loop(rest[1:])

        loop(node.generators)
        if isinstance(node, ast.DictComp):
            return {key if type(key) in PLAIN else place: value for place, (key, value) in enumerate(found)}
        return found

    _of_generatorexp = _of_setcomp = _of_dictcomp = _of_listcomp


def own(value: Any, depth: int = 3) -> Any:
    """Return a copy of a user's container, so that code which is read and fills it changes only the copy."""
    if type(value) not in CONTAINERS:
        return value
    if not depth or len(value) > _MOST:
        return UNKNOWN
    if type(value) is dict:
        return {key: own(each, depth - 1) for key, each in value.items()}
    return type(value)(own(each, depth - 1) for each in value) if type(value) is not set else set(value)


def _made_by(container: dict[Any, Any], key: Any) -> Any:
    """Return the module that a dictionary makes of a class, as Hugging Face's ACT2FN does."""
    value = dict.get(container, key) if type(key) in (str, int, bool) else None
    value = value[0] if type(value) is tuple and value else value
    return Made(value) if isinstance(value, type) and issubclass(value, nn.Module) else UNKNOWN
