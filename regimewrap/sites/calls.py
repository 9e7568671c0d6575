"""Activations called as functions: where a method's own code says ``F.relu(x)`` or ``x.relu()``.

The plain functions that a method calls count as its code too: ``find_helpers`` names those that lead to activations.
Reads source; runs none of the user's code.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
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
    that the callee is a ReLU, certainly called to make a new tensor of one argument; ``factor`` that the call's result
    only multiplies something, and its argument may be left out: ``out * F.silu(z)`` where ``z`` is ``None`` by default.
    """

    text: str
    kind: str
    span: Span
    dropped: bool = False
    target: str | None = None
    relu: bool = False
    factor: bool = False

    @property
    def short(self) -> str:
        """The last part of the callee's name."""
        return re.sub(r"\[[^]]*\]|\([^)]*\)", "", self.text).rpartition(".")[2]


@dataclass(frozen=True)
class Helper:
    """A plain function that code calls, and where; ``arguments`` are those that it is certainly called with."""

    function: types.FunctionType
    spans: tuple[Span, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)


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


def find_calls(
    function: types.FunctionType,
    module: nn.Module | None,
    registered: Set[int] = frozenset(),
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> list[Call]:
    """Return the activation calls in one function's own code.

    Args:
        function: a method's function, or a plain one.
        module: for a method an instance, so that ``self.act(x)`` can be looked up.
        registered: ids of the modules that hooks reach; a call of any other activation module counts as a call here.
        arguments: what a plain function is certainly called with.
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
    scope = Scope(function, module, arguments)
    factors = _factors(function)
    found = []
    for node, dropped in _call_nodes(function):
        kind = _kind(node, scope, registered)
        if kind is not None:
            target = in_place_target(node) if dropped and _works_in_place(node) else None
            relu = _is_plain_relu(node, scope) and not dropped
            span = span_of(node)
            found.append(Call(ast.unparse(node.func), kind, span, dropped, target, relu, span in factors))
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
    scope = Scope(function, module, arguments)
    calls: dict[types.FunctionType, list[ast.Call]] = {}
    for helper, nodes in (*_helper_nodes(function), *_held_helper_nodes(function, module)):
        calls.setdefault(helper, []).extend(nodes)
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
    held = {name: value for name, value in module.__dict__.items() if isinstance(value, types.FunctionType)}
    held = {name: value for name, value in (_static_methods(cls) | held).items() if name in _names(function.__code__)}
    held = {name: value for name, value in held.items() if _is_helper(value, _DEPTH - 1)}
    nodes: dict[str, list[ast.Call]] = {}
    for node, _ in _call_nodes(function) if held else ():
        base = node.func.value if isinstance(node.func, ast.Attribute) else None
        if isinstance(base, ast.Name) and base.id == function.__code__.co_varnames[0] and node.func.attr in held:  # type: ignore[attr-defined]
            nodes.setdefault(node.func.attr, []).append(node)  # type: ignore[attr-defined]
    return [(held[name], each) for name, each in nodes.items()]


@functools.lru_cache(maxsize=4096)
def _static_methods(cls: type) -> dict[str, types.FunctionType]:
    found = {name: value for home in reversed(cls.__mro__) for name, value in vars(home).items()}
    functions = {name: each.__func__ for name, each in found.items() if isinstance(each, staticmethod)}
    return {name: each for name, each in functions.items() if isinstance(each, types.FunctionType)}


#: From a method through so many functions an activation is followed; utilities far below are not its code any more.
_DEPTH = 3


@functools.lru_cache(maxsize=4096)
def _helper_nodes(function: types.FunctionType) -> tuple[tuple[types.FunctionType, tuple[ast.Call, ...]], ...]:
    if not any(_is_helper(each, _DEPTH - 1) for each in _named(function)):
        return ()
    scope = Scope(function)
    nodes: dict[types.FunctionType, list[ast.Call]] = {}
    for node, _ in _call_nodes(function):
        callee = scope.value_of(node.func)
        if _is_helper(callee, _DEPTH - 1):
            nodes.setdefault(callee, []).append(node)
    return tuple((helper, tuple(each)) for helper, each in nodes.items())


def _is_helper(value: Any, depth: int) -> bool:
    return (
        isinstance(value, types.FunctionType)
        and (value.__module__ or "").partition(".")[0] != "torch"
        and catalog.kind_of_function(value) is None
        and _reaches_activation(value, depth)
    )


@functools.lru_cache(maxsize=8192)
def _reaches_activation(function: types.FunctionType, depth: int) -> bool:
    body = body_of(function)
    return _names_activation(body) or (depth > 0 and any(_is_helper(each, depth - 1) for each in _named(body)))


def _named(function: types.FunctionType) -> list[Any]:
    """Return the globals and closed-over values that code may mean, those of modules that it names among them."""
    scope, names = Scope(function), _names(function.__code__)
    values = [scope.value_of(ast.Name(name, ast.Load())) for name in names]
    homes = [vars(each) for each in values if isinstance(each, types.ModuleType | type) and each is not torch]
    inside = [home[name] for home in homes for name in names if name in home]
    return values + [each.__func__ if isinstance(each, staticmethod) else each for each in inside]


@functools.lru_cache(maxsize=4096)
def calls_itself(function: types.FunctionType) -> bool:
    """Say whether a plain function calls itself, perhaps by way of others, as far as ``find_helpers`` follows."""
    seen: set[types.FunctionType] = set()
    ahead = [function]
    while ahead:
        for callee, _ in _helper_nodes(body_of(ahead.pop())):
            if callee is function:
                return True
            if callee not in seen:
                seen.add(callee)
                ahead.append(callee)
    return False


def _same_arguments(helper: types.FunctionType, nodes: Sequence[ast.Call], scope: Scope) -> dict[str, Any]:
    """Return the plain arguments of a function that are known, and the same in each of its calls."""
    code = body_of(helper).__code__
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


def constant_of(node: ast.expr, scope: Scope) -> Any:
    """Return a constant, the value of an argument that is certainly given, or of an attribute; else ``UNKNOWN``."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in scope.arguments and node.id not in _assigned(scope.function):
        return scope.arguments[node.id]
    return scope.value_of(node)


@functools.lru_cache(maxsize=4096)
def _assigned(function: types.FunctionType) -> frozenset[str]:
    """Return the names that code assigns to."""
    tree = parse(function)
    nodes = ast.walk(tree) if tree is not None else ()
    return frozenset(each.id for each in nodes if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load))


@functools.lru_cache(maxsize=4096)
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
    for helper, nodes in _helper_nodes(function) if depth else ():
        for parameter in set(_factors(body_of(helper), depth - 1).values()):
            given = [argument_at(function, span_of(node), helper, parameter) for node in nodes]
            handed = {_root_name(each.body if isinstance(each, ast.IfExp) else each) for each in given if each}
            optional |= {each for each in handed if each is not None and each != function.__code__.co_varnames[0]}
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


def _may_activate(node: ast.Call, scope: Scope) -> bool:
    """Say whether a call is one of an activation, as far as can be said without an instance."""
    return isinstance(node.func, ast.Subscript) or _kind(node, scope, frozenset()) is not None


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
        elif not isinstance(node, ast.Name) or node.id not in _assigned(function):
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
    call = next((node for node, _ in _call_nodes(function) if span_of(node) == span), None)
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
            return _kind_held(scope.value_of(node.func.value), constant_of(node.func.slice, scope))
        if isinstance(node.func, ast.Call):  # nn.ReLU()(x)
            return catalog.kind_of_class(scope.value_of(node.func.func))
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
