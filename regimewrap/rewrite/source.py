"""The third mechanism: call sites rewritten in a method's syntax tree, where a trace would freeze something.

Branches, loops, randomness and mutation stay what they are: of the whole method only ``F.gelu(x)`` becomes
``self._regimewrap_gate(F.gelu(x), 0)``, and ``F.relu(x)`` ``self._regimewrap_relu(F.relu, x, 0)``. Closures,
``super()``, decorators, defaults, mangled names and the line numbers in tracebacks are kept. Before a method is touched
its unchanged source is compiled and compared with the code that runs, so that a file that was edited meanwhile is
noticed. A plain function that a method calls gets the same treatment in a copy, which the method calls instead.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import functools
import types
from dataclasses import dataclass
from typing import Any

from regimewrap.rewrite.rebind import COPY_METHOD, GATE_METHOD, RELU_METHOD
from regimewrap.sites.read.calls import in_place_target
from regimewrap.sites.read.code import Scope, Span, body_of, parse, span_of

_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)

#: In the copy of a plain function: the module whose gates it calls, and functions with their copies.
_SELF = "_regimewrap_self"
_COPY = "_regimewrap_copy_{}"

_INCIDENTAL = {"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL"}


class NotRewritableError(Exception):
    """A method's source cannot be rewritten; the text says why. Stays inside ``rewrite`` and ``wrap``."""


@dataclass(frozen=True)
class Redirect:
    """A plain function of which a method calls a copy with gates in it; the function itself stays as it is.

    Attributes:
        function: the function, at the top level of a module, so that a file can name it.
        spans: where it is called.
        recipe: what becomes of its own code. The copy takes the module whose gates it calls before all arguments.
    """

    function: types.FunctionType
    spans: tuple[Span, ...]
    recipe: SourceRecipe


@dataclass(frozen=True)
class SourceRecipe:
    """Which calls of a method, or of a plain function, go through the gate.

    Attributes:
        owner: name of the class that defines the method, for mangled names; empty for a plain function.
        gated: where each call stands, with the index of its site gate.
        kept: where calls stand whose result the method drops because they work in place; it is assigned instead.
        relus: where calls stand, among ``gated``, of a ReLU that may be one operation with its gate.
        redirects: the plain functions that are called in a copy with gates.
    """

    owner: str
    gated: tuple[tuple[Span, int], ...]
    kept: tuple[Span, ...] = ()
    relus: tuple[Span, ...] = ()
    redirects: tuple[Redirect, ...] = ()

    def build(self, original: types.FunctionType) -> types.FunctionType:
        """Return the rewritten function, inside the same decorators.

        Raises:
            NotRewritableError: the source is not what runs, or it or a decorator cannot be dealt with.
        """
        function = body_of(original)
        tree = parse(function)
        if tree is None:
            raise NotRewritableError("it has no readable source")
        if not _same(_compile(tree, function, self.owner), function.__code__):
            raise NotRewritableError("its source is not the code that runs (was the file edited after the import?)")
        rewriter = _Rewriter(self, function.__code__.co_varnames[0] if self.owner else _SELF)
        edited = rewriter.visit(copy.deepcopy(tree))
        if rewriter.gated or rewriter.kept or rewriter.redirected:
            raise NotRewritableError("its source has changed since the plan was made")
        if not self.owner:
            _require_passing_on(original)
            edited.args.posonlyargs.insert(0, ast.copy_location(ast.arg(_SELF), edited))
        copies = {
            _COPY.format(place): types.CellType((each.function, rewritten(each.recipe, each.function)))
            for place, each in enumerate(self.redirects)
        }
        code = _compile(edited, function, self.owner, tuple(copies))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)) | copies
        closure = tuple(cells[name] for name in code.co_freevars)
        new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        new.__kwdefaults__ = function.__kwdefaults__
        return _in_decorators(original, function, new)


@functools.lru_cache(maxsize=1024)
def rewritten(recipe: SourceRecipe, original: types.FunctionType) -> types.FunctionType:
    """Return what ``recipe.build(original)`` gave the first time, to be called and traced but not changed."""
    return recipe.build(original)


class _Rewriter(ast.NodeTransformer):
    def __init__(self, recipe: SourceRecipe, self_name: str) -> None:
        self.gated = dict(recipe.gated)
        self.kept = set(recipe.kept)
        self._relus = set(recipe.relus)
        self.redirected = {
            span: _COPY.format(place) for place, each in enumerate(recipe.redirects) for span in each.spans
        }
        self._self = self_name
        self._depth = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        span = span_of(node)
        index = self.gated.pop(span, None)
        name = self.redirected.pop(span, None)
        self.generic_visit(node)
        if name is not None:
            method = ast.Attribute(ast.Name(self._self, ast.Load()), COPY_METHOD, ast.Load())
            node.func = ast.copy_location(ast.Call(method, [node.func, ast.Name(name, ast.Load())], []), node.func)
            return ast.fix_missing_locations(node)
        if index is None:
            return node
        arguments: list[ast.expr] = [node]
        keywords: list[ast.keyword] = []
        if span in self._relus:
            # F.relu(x, inplace=False), or x.relu()
            of_tensor = not node.args and isinstance(node.func, ast.Attribute)
            arguments = [ast.Constant("torch.relu"), node.func.value] if of_tensor else [node.func, *node.args]  # type: ignore[attr-defined]
            keywords = node.keywords
        name = RELU_METHOD if span in self._relus else GATE_METHOD
        method = ast.Attribute(ast.Name(self._self, ast.Load()), name, ast.Load())
        gate = ast.Call(method, [*arguments, ast.Constant(index)], keywords)
        return ast.fix_missing_locations(ast.copy_location(gate, node))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        index = self.gated.pop(span_of(node), None)
        self.generic_visit(node)
        if index is None:
            return node
        method = ast.Attribute(ast.Name(self._self, ast.Load()), GATE_METHOD, ast.Load())
        return ast.fix_missing_locations(ast.copy_location(ast.Call(method, [node, ast.Constant(index)], []), node))

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        keep = isinstance(node.value, ast.Call) and span_of(node.value) in self.kept
        target = in_place_target(node.value) if keep and isinstance(node.value, ast.Call) else None
        if keep:
            self.kept.remove(span_of(node.value))
        self.generic_visit(node)
        if target is None:
            return node
        assign = ast.Assign([ast.Name(target, ast.Store())], node.value)
        return ast.fix_missing_locations(ast.copy_location(assign, node))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._function(node)

    def _function(self, node: Any) -> ast.AST:
        arguments = node.args
        names = {each.arg for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
        if self._depth and self._self in names:
            raise NotRewritableError(f"an inner function has an argument {self._self!r} of its own")
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        result: ast.AST = node
        return result


def _compile(
    tree: ast.FunctionDef, function: types.FunctionType, owner: str, more: tuple[str, ...] = ()
) -> types.CodeType:
    """Compile a tree in a place like its own: in a class, with the same free variables and some more, at its lines."""
    owner = owner or "_"  # in a class of this name nothing is mangled
    outer = ", ".join(name for name in (*function.__code__.co_freevars, *more) if name != "__class__")
    # The class must not be a variable of the factory, unless it is one where the method was defined.
    around = "pass" if owner in function.__code__.co_freevars else f"global {owner}"
    home = ast.parse(f"def factory({outer}):\n {around}\n class {owner}:\n  pass")
    method = copy.deepcopy(tree)
    method.decorator_list = []
    method.returns = None
    # Defaults and annotations belong to the function object, which keeps its own.
    arguments = method.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    ast.increment_lineno(method, function.__code__.co_firstlineno - 1)
    home.body[0].body[1].body = [method]  # type: ignore[attr-defined]
    flags = function.__code__.co_flags & _FUTURES
    code: types.CodeType = compile(home, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    for name in ("factory", owner, tree.name):
        code = next(each for each in code.co_consts if isinstance(each, types.CodeType) and each.co_name == name)
    return code.replace(co_qualname=function.__code__.co_qualname)


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    return _essence(a) == _essence(b)


def _essence(code: types.CodeType) -> list[object]:
    """What a function's code does, without what depends on the imports of its file (how methods are loaded)."""
    steps: list[object] = [code.co_varnames, code.co_freevars, code.co_cellvars]
    for step in dis.get_instructions(code):
        if step.opname in _INCIDENTAL:
            continue
        if isinstance(step.argval, types.CodeType):
            steps.append(_essence(step.argval))
        elif step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            steps.append(step.opname)
        else:
            steps.append((step.opname.replace("LOAD_METHOD", "LOAD_ATTR"), type(step.argval), step.argval))
    return steps


def _in_decorators(outer: types.FunctionType, inner: types.FunctionType, new: types.FunctionType) -> types.FunctionType:
    """Return a copy of a chain of decorated functions with ``inner`` replaced, without running the decorators again."""
    if outer is inner:
        return new
    below: types.FunctionType = outer.__wrapped__  # type: ignore[attr-defined]
    replaced = _in_decorators(below, inner, new)
    cells = [types.CellType(replaced) if _holds(cell, below) else cell for cell in outer.__closure__ or ()]
    if cells == list(outer.__closure__ or ()):
        raise NotRewritableError(f"a decorator ({outer.__code__.co_qualname}) hides it")
    copied = types.FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, tuple(cells))
    copied.__kwdefaults__ = outer.__kwdefaults__
    copied.__dict__.update(outer.__dict__, __wrapped__=replaced)
    return copied


def _require_passing_on(function: types.FunctionType) -> None:
    """Refuse decorators that could lose a further first argument, or call something else than the function below.

    Raises:
        NotRewritableError: not every decorator certainly calls what is below with all arguments that it gets.
    """
    while isinstance(below := getattr(function, "__wrapped__", None), types.FunctionType):
        if not _passes_on(function, below):
            raise NotRewritableError(
                f"a decorator ({function.__code__.co_qualname}) may call something else, such as a fused kernel"
            )
        function = below


def _passes_on(wrapper: types.FunctionType, below: types.FunctionType) -> bool:
    tree = parse(wrapper)
    if tree is None or tree.args.vararg is None or wrapper.__code__.co_argcount or wrapper.__code__.co_kwonlyargcount:
        return False
    stars, scope = tree.args.vararg.arg, Scope(wrapper)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _starred(node, stars)]
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == stars]
    return bool(calls) and len(uses) == len(calls) and all(scope.value_of(node.func) is below for node in calls)


def _starred(node: ast.Call, name: str) -> bool:
    first = node.args[0] if node.args else None
    return isinstance(first, ast.Starred) and isinstance(first.value, ast.Name) and first.value.id == name


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # not filled
        return False
