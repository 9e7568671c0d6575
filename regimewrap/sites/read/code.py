"""Reads a function's code: its source, its syntax tree, what names in it mean. Runs none of the user's code."""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import types
import weakref
from collections.abc import Iterator, Mapping, Set
from types import MappingProxyType
from typing import Any

from torch import nn

from regimewrap.sites.read.memory import remembered

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
    while isinstance(inner := getattr(function, "__wrapped__", None), types.FunctionType) and _may_call(
        function, inner
    ):
        function = inner
    return function


def _may_call(function: types.FunctionType, inner: types.FunctionType) -> bool:
    """Say whether a function can know another; ``functools.wraps`` may have lent it no more than the signature."""
    code = code_of(function)
    named = (function.__globals__.get(name) for name in code.co_names)
    held = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *named)
    return bool(set(code.co_freevars) - {"__class__"}) or any(each is inner for each in held)


def code_of(function: types.FunctionType | types.MethodType) -> types.CodeType:
    """Return the code that the user wrote, also while a wrapped model has the function run other code."""
    exchange = EXCHANGED.get(function)  # type: ignore[arg-type]
    code: types.CodeType = function.__code__ if exchange is None else exchange.original
    return code


@remembered
def parse(function: types.FunctionType) -> ast.FunctionDef | None:
    """Return a function's syntax tree (do not change it), or ``None`` when it has no readable source of its own.

    Lines count from 1 at the first line of the source, decorators included; columns are those of the file. A source
    that is not the code that runs, since the file was edited after the import, is not read.
    """
    code = code_of(function)
    places = _places_in(code)
    _look_for_edits(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)[code.co_firstlineno - 1 :]
    if not lines:
        return None
    # The code ends with its last instruction; a search for the end of the block takes longer than all the rest.
    length = max((last - code.co_firstlineno + 1 for _, _, last, _ in places), default=0)
    tree = _only_function(lines[:length]) or _only_function(inspect.getblock(lines))
    return tree if tree is not None and _is_source_of(tree, code, places) else None


@remembered
def _look_for_edits(filename: str) -> None:
    linecache.checkcache(filename)


def _only_function(lines: list[str]) -> ast.FunctionDef | None:
    """Return the tree of a source that is one function; ``None`` for a lambda, or several definitions on one line."""
    source = "".join(lines)
    # Indented code is not dedented, which would change its multi-line strings, but put into a block.
    indented = source[:1] in (" ", "\t")
    try:
        body = ast.parse(f"if 1:\n{source}" if indented else source).body
    except (SyntaxError, ValueError):
        return None
    if indented:
        body = body[0].body  # type: ignore[attr-defined]
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        return None
    if indented:
        ast.increment_lineno(body[0], -1)
    return body[0]


#: Line, column, last line and last column in a file.
_Place = tuple[int, int, int, int]


def _is_source_of(tree: ast.FunctionDef, code: types.CodeType, places: Set[_Place]) -> bool:
    """Say whether code was compiled from a tree, as far as its names and the places of its calls tell."""
    arguments = [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]
    if tree.name != code.co_name or len(arguments) != code.co_argcount + code.co_kwonlyargcount:
        return False
    written, spans = {each.arg for each in arguments}, list[Span]()
    ahead: list[ast.AST] = list(tree.body)
    for node in ahead:
        for value in vars(node).values():  # ast.walk takes three times as long
            if type(value) is str:
                written.add(value)
            elif type(value) is list:
                ahead += [each for each in value if isinstance(each, ast.AST)]
            elif isinstance(value, ast.AST) and type(value) is not ast.Load:
                ahead.append(value)
        if isinstance(node, ast.Call):
            spans.append(span_of(node))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            written.update(part for each in node.names for part in each.name.split("."))
            written.update((getattr(node, "module", None) or "").split("."))
    # Names with two underscores in front are compiled with that of their class; pytest compiles assertions anew.
    rewritten = any(name.startswith("@py") for name in (*names_in(code), *code.co_varnames))
    if not rewritten and not all(name in written or "__" in name for name in names_in(code)):
        return False
    first = code.co_firstlineno - 1
    compiled = [(line + first, start, last + first, end) in places for line, start, last, end in spans]
    # What stands behind a constant test, or in the annotation of a variable, is not compiled.
    return not places or sum(compiled) >= len(compiled) / 2


def _places_in(code: types.CodeType) -> set[_Place]:
    """Return the places of instructions, with those of functions defined inside; none if Python does not keep them."""
    found = ((line, start, last, end) for line, last, start, end in code.co_positions())
    places: set[Any] = {place for place in found if None not in place}
    return places.union(*(_places_in(each) for each in code.co_consts if isinstance(each, types.CodeType)))


def own_methods(module: nn.Module) -> tuple[tuple[type, str, types.FunctionType], ...]:
    """Return the methods of a module that its users wrote: defining class, name, function; overridden ones too."""
    cls: Any = type(module)  # mypy takes nn.Module's __hash__ for that of the class
    return _own_methods(cls)


@remembered
def _own_methods(cls: type) -> tuple[tuple[type, str, types.FunctionType], ...]:
    return tuple(
        (home, name, value)
        for home in cls.__mro__
        if home.__module__.partition(".")[0] != "torch" or issubclass(home, TORCH_LAYERS)
        # Mix-ins bring functions for other times than the forward pass (sampling, losses).
        if issubclass(home, nn.Module) or "forward" in vars(home)
        for name, value in vars(home).items()
        if home is not object
        and isinstance(value, types.FunctionType)
        and not name.startswith("_regimewrap")
        # What sets an object up, copies or shows it is over before, or apart from, a forward pass.
        and (name == "__call__" or not (name.startswith("__") and name.endswith("__")))
    )


class Scope:
    """What a method's names mean, as far as that is known without running it."""

    def __init__(
        self,
        function: types.FunctionType,
        module: nn.Module | None = None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        code = code_of(function)
        self.function = function
        self.module = module
        self.arguments = arguments
        self.locals = set(code.co_varnames) | set(code.co_cellvars)
        self.self_name = code.co_varnames[0] if code.co_argcount else None
        self._closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))

    def value_of(self, node: ast.expr) -> Any:
        """Return the object an expression such as ``F.relu`` or ``self.act`` stands for, or ``UNKNOWN``."""
        if isinstance(node, ast.Name):
            return self.named(node.id)
        if isinstance(node, ast.Attribute):
            base = self.value_of(node.value)
            return UNKNOWN if base is UNKNOWN else attribute_of(base, node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            base = self.value_of(node.value)
            if type(base) in (list, tuple, dict, nn.ModuleList, nn.Sequential, nn.ModuleDict):
                try:
                    return base[node.slice.value]
                except (LookupError, TypeError):
                    return UNKNOWN
        return UNKNOWN

    def named(self, name: str) -> Any:
        """Return what a name stands for, or ``UNKNOWN``."""
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


def attribute_of(thing: Any, name: str) -> Any:
    """Return what an object, a class or a module of Python has under a name, without running or importing anything.

    A static method is its function, a class method is bound; a property, or what ``__getattr__`` makes, is ``UNKNOWN``.
    """
    kind = type(thing)  # isinstance would ask a lazy object for its class
    if issubclass(kind, types.ModuleType):
        return vars(thing).get(name, UNKNOWN)
    if issubclass(kind, type):
        value, owner = _in_classes(thing, name), thing
    else:
        is_module, owner = issubclass(kind, nn.Module), kind
        value = stored(thing, name) if is_module else _own_attributes(thing).get(name, UNKNOWN)
        if value is not UNKNOWN:
            return value
        value = _in_classes(kind, name)
        if isinstance(value, types.FunctionType):
            return types.MethodType(value, thing)
        if hasattr(type(value), "__get__") and not isinstance(
            value, staticmethod | classmethod | types.BuiltinFunctionType | types.ClassMethodDescriptorType
        ):
            return UNKNOWN
    if isinstance(value, staticmethod):
        return value.__func__
    if isinstance(value, types.ClassMethodDescriptorType):  # torch.autograd.Function.apply
        return value.__get__(None, owner)
    return types.MethodType(value.__func__, owner) if isinstance(value, classmethod) else value


def _own_attributes(thing: object) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = object.__getattribute__(thing, "__dict__")
    except (AttributeError, TypeError):  # slots, or a class
        return {}
    return found


def _in_classes(cls: type, name: str) -> Any:
    return next((vars(home)[name] for home in cls.__mro__ if name in vars(home)), UNKNOWN)


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


@remembered
def assigned(function: types.FunctionType) -> frozenset[str]:
    """Return the names that code assigns to."""
    tree = parse(function)
    nodes = ast.walk(tree) if tree is not None else ()
    return frozenset(each.id for each in nodes if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load))


@remembered
def call_nodes(function: types.FunctionType) -> tuple[tuple[ast.Call, bool], ...]:
    """Return a function's calls in order of evaluation, each with whether its result is dropped."""
    tree = parse(function)
    if tree is None:
        return ()
    dropped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = [node for statement in tree.body for node in in_evaluation_order(statement)]
    return tuple((node, id(node) in dropped) for node in nodes if isinstance(node, ast.Call))


@remembered
def names_in(code: types.CodeType) -> frozenset[str]:
    """Return the globals, attributes and closed-over names that code uses, functions defined in it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset((*code.co_names, *code.co_freevars)).union(*(names_in(each) for each in inner))
