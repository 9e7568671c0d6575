"""A function's syntax tree in, new code for it out: the chosen calls pass through the gates of the module at hand.

Branches, loops, randomness and mutation stay what they are. The new code begins by asking its module for ``Sites``. On
a module without, the function's own body follows; else the same body, in which ``F.gelu(x)`` has become
``_regimewrap.at(_regimewrap_self, key, F.gelu(x))``. Signature, free variables, mangled names and the line numbers in
tracebacks are the same. Before anything is built the unchanged source is compiled and compared with the code that runs,
so that a file that was edited meanwhile is noticed. Nothing is changed here.
"""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import functools
import hashlib
import types
from dataclasses import dataclass, fields

from regimewrap.gate.gate import SITES_ATTRIBUTE
from regimewrap.sites.read.calls import in_place_target
from regimewrap.sites.read.code import Scope, Span, assigned, body_of, code_of, names_in, parse, span_of

_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)

#: In new code: the sites of its module, and that module, whatever becomes of the name ``self``.
_SITES, _SELF = "_regimewrap", "_regimewrap_self"

_INCIDENTAL = {"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL"}


class NotRewritableError(Exception):
    """A function's code cannot be rewritten; the text says why. Stays inside ``rewrite`` and ``wrap``."""


@dataclass(frozen=True)
class Edits:
    """What changes in the code of one function, each by where it stands.

    Attributes:
        gated: calls whose result passes a gate.
        relus: those among them that may be one operation with their gate.
        kept: calls whose result the function drops because they work in place; it is assigned instead.
        copied: calls of plain functions that are called in a copy with gates.
        idle: names of attributes that allow torch's own fused kernels, which read False while a gate acts.
    """

    gated: frozenset[Span] = frozenset()
    relus: frozenset[Span] = frozenset()
    kept: frozenset[Span] = frozenset()
    copied: frozenset[Span] = frozenset()
    idle: frozenset[str] = frozenset()

    def __or__(self, other: Edits) -> Edits:
        return Edits(*(getattr(self, each.name) | getattr(other, each.name) for each in fields(self)))


def key_of(home: str, span: Span) -> str:
    """Return the key of a site, or of a function's copy, in new code: the same in every process."""
    return f"{home}:{'-'.join(map(str, span))}"


def digest_of(function: types.FunctionType) -> str:
    """Return a short hash of a function's source, by which a model that is read from a file notices a change."""
    tree = parse(function)
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16] if tree is not None else ""


def rewritten(function: types.FunctionType, owner: str, home: str, edits: Edits) -> types.CodeType:
    """Return new code for a function, which may take the place of its own.

    Args:
        function: as it was defined, below its decorators.
        owner: name of the class that defines it, for mangled names.
        home: what the keys of its sites begin with.
        edits: what changes.

    Raises:
        NotRewritableError: the source is not what runs, or it cannot be dealt with.
    """
    tree = _tree(function, owner)
    first = tree.args.posonlyargs + tree.args.args
    itself = first[0].arg if first else f"{tree.args.vararg.arg}[0]" if tree.args.vararg is not None else None
    if itself is None:
        raise NotRewritableError("it has no argument for the object")
    # torch.compile does not guard a lookup in self.__dict__ that finds nothing.
    sites, prologue = f"getattr({itself}, {SITES_ATTRIBUTE!r}, None)", f"if {_SITES} is None: return"
    if _shows_locals(function):  # new code must have no names of its own
        if not first or itself in assigned(function):
            raise NotRewritableError("it asks for locals(), which would show two more")
        body = _edited(tree, home, edits, f"{itself}.{SITES_ATTRIBUTE}", itself).body
        prologue = prologue.replace(_SITES, sites)
    else:
        body = _edited(tree, home, edits).body
        prologue = f"{_SITES}, {_SELF} = {sites}, {itself}\n{prologue}"
    documented = ast.get_docstring(tree, clean=False) is not None
    before = ast.parse(prologue).body
    for node in before:
        for each in ast.walk(node):
            ast.copy_location(each, tree)
    own, new = copy.deepcopy(tree), copy.deepcopy(tree)
    before[-1].body[:0] = own.body[documented:]  # type: ignore[attr-defined]
    new.body = [*own.body[:documented], *before, *(_Undeclared().visit(each) for each in body[documented:])]
    code = _compile(new, function, owner)
    if code.co_freevars != code_of(function).co_freevars:
        raise NotRewritableError("its free variables would be others")
    return code


def copied(function: types.FunctionType, home: str, edits: Edits) -> types.FunctionType:
    """Return a copy of a plain function, inside the same decorators, that takes sites and their module before all else.

    Raises:
        NotRewritableError: as ``rewritten``; or a decorator cannot be dealt with.
    """
    body = body_of(function)
    if _shows_locals(body):
        raise NotRewritableError("it asks for locals(), which would show two more")
    if "__class__" in code_of(body).co_freevars:
        raise NotRewritableError("it is a method that uses super(), of another class")
    edited = _edited(_tree(body, ""), home, edits)
    _require_passing_on(function)
    names = [ast.copy_location(ast.arg(name), edited) for name in (_SITES, _SELF)]
    edited.args.posonlyargs[:0] = names
    new = types.FunctionType(
        _compile(edited, body, ""), body.__globals__, body.__name__, body.__defaults__, body.__closure__
    )
    new.__kwdefaults__ = body.__kwdefaults__
    return _in_decorators(function, body, new)


def _tree(function: types.FunctionType, owner: str) -> ast.FunctionDef:
    tree = parse(function)
    if tree is None:
        raise NotRewritableError("it has no readable source")
    if _essence(_compile(tree, function, owner)) != _essence(code_of(function)):
        raise NotRewritableError("its source is not the code that runs (was the file edited after the import?)")
    return tree


def _shows_locals(function: types.FunctionType) -> bool:
    return not names_in(code_of(function)).isdisjoint(("locals", "vars", "dir"))


def _edited(
    tree: ast.FunctionDef, home: str, edits: Edits, sites: str = _SITES, itself: str = _SELF
) -> ast.FunctionDef:
    """Return a tree with calls of gates; ``sites`` and ``itself`` are the names of these in the code."""
    rewriter = _Rewriter(home, edits, sites, itself)
    edited: ast.FunctionDef = rewriter.visit(copy.deepcopy(tree))
    if rewriter.done != edits.gated | edits.kept | edits.copied:
        raise NotRewritableError("its source has changed since the plan was made")
    return edited


class _Rewriter(ast.NodeTransformer):
    def __init__(self, home: str, edits: Edits, sites: str, itself: str) -> None:
        self.done: set[Span] = set()
        self._home, self._edits = home, edits
        self._sites, self._itself = sites, itself

    def _call(self, method: str, at: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword] = []) -> ast.Call:  # noqa: B006  read only
        """Return ``_regimewrap.method(_regimewrap_self, *arguments)``, at the place of a node."""
        call: ast.Call = ast.parse(f"{self._sites}.{method}({self._itself})", mode="eval").body  # type: ignore[assignment]
        call.args += arguments
        call.keywords = keywords
        for each in ast.walk(call.func):
            ast.copy_location(each, at)
        return ast.fix_missing_locations(ast.copy_location(call, at))

    def _keyed(self, method: str, at: ast.expr, *arguments: ast.expr, keywords: list[ast.keyword] = []) -> ast.Call:  # noqa: B006  read only
        self.done.add(span_of(at))
        return self._call(method, at, [ast.Constant(key_of(self._home, span_of(at))), *arguments], keywords)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        span = span_of(node)
        self.generic_visit(node)
        if span in self._edits.copied:
            node.func = self._keyed("copy", node, node.func)
        if span not in self._edits.gated:
            return node
        if span not in self._edits.relus:
            return self._keyed("at", node, node)
        # F.relu(x, inplace=False), or x.relu()
        of_tensor = not node.args and isinstance(node.func, ast.Attribute)
        arguments = [ast.Constant("relu"), node.func.value] if of_tensor else [node.func, *node.args]  # type: ignore[attr-defined]
        return self._keyed("relu", node, *arguments, keywords=node.keywords)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return self._keyed("at", node, node) if span_of(node) in self._edits.gated else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr not in self._edits.idle or not isinstance(node.ctx, ast.Load):
            return node
        return self._call("while_idle", node, [node])

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        span = span_of(node.value)
        target = in_place_target(node.value) if span in self._edits.kept and isinstance(node.value, ast.Call) else None
        self.generic_visit(node)
        if target is None:
            return node
        self.done.add(span)
        assign = ast.Assign([ast.Name(target, ast.Store())], node.value)
        return ast.fix_missing_locations(ast.copy_location(assign, node))


class _Undeclared(ast.NodeTransformer):
    """Drops a function's declarations, which stand in the first copy of its body and may not come after a use."""

    def visit_Global(self, node: ast.Global) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # a function inside keeps its own

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node


def _compile(tree: ast.FunctionDef, function: types.FunctionType, owner: str) -> types.CodeType:
    """Compile a tree in a place like its own: in a class, with the same free variables, at its lines."""
    owner = owner or "_"  # in a class of this name nothing is mangled
    original = code_of(function)
    outer = ", ".join(name for name in original.co_freevars if name.isidentifier() and name != "__class__")
    # The class must not be a variable of the factory, unless it is one where the method was defined.
    around = "pass" if owner in original.co_freevars else f"global {owner}"
    home = ast.parse(f"def factory({outer}):\n {around}\n class {owner}:\n  pass")
    method = copy.deepcopy(tree)  # with its decorators, whose first line is that of its code
    method.returns = None
    if hasattr(method, "type_params"):
        method.type_params = []  # where they are used they are free variables
    # Defaults and annotations belong to the function object, which keeps its own.
    arguments = method.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    ast.increment_lineno(method, original.co_firstlineno - 1)
    home.body[0].body[1].body = [method]  # type: ignore[attr-defined]
    flags = original.co_flags & _FUTURES
    code: types.CodeType = compile(home, original.co_filename, "exec", flags=flags, dont_inherit=True)
    for name in ("factory", owner, tree.name):
        code = next(each for each in code.co_consts if isinstance(each, types.CodeType) and each.co_name == name)
    return _renamed(code, code.co_qualname, original.co_qualname)


def _renamed(code: types.CodeType, old: str, new: str) -> types.CodeType:
    constants = (_renamed(each, old, new) if isinstance(each, types.CodeType) else each for each in code.co_consts)
    return code.replace(co_qualname=new + code.co_qualname.removeprefix(old), co_consts=tuple(constants))


def _essence(code: types.CodeType) -> list[object]:
    """Return what code does, without details that depend on the imports of its file (how methods are loaded)."""
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
    wrapper = types.FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, tuple(cells))
    wrapper.__kwdefaults__ = outer.__kwdefaults__
    wrapper.__dict__.update(outer.__dict__, __wrapped__=replaced)
    return wrapper


def _require_passing_on(function: types.FunctionType) -> None:
    """Refuse decorators that could lose two more leading arguments, or call another function than the one below.

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
