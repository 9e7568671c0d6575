"""What the tracer writes: a graph of values, in which ``either`` joins branches and ``unknown`` follows nothing."""

from __future__ import annotations

import ast
import operator
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from regimewrap.sites.read.code import UNKNOWN, Span, code_of, span_of

#: A function, by its code, and a place in it: where a call stands. The last of a node's frames made it.
Frame = tuple[types.CodeType, Span]

BINARY: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.MatMult: operator.matmul,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}  # fmt: skip
COMPARE: dict[type, Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
UNARY: dict[type, Any] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
#: Types that the tracer computes with: their operators run no code of the user's.
PLAIN = (bool, int, float, str, bytes, type(None), range, slice)
CONTAINERS = (list, tuple, dict, set)
KNOWN = (*PLAIN, *CONTAINERS)
SAFE = {
    *(len, range, enumerate, zip, reversed, list, tuple, dict, set, int, float, bool, str, min, max, sum, abs),
    *(sorted, any, all, iter, next, round, divmod, isinstance, map, filter, getattr, hasattr, callable),
}
#: How deep functions are followed into each other, how many expressions are read, how often a loop is unrolled.
DEPTH, STEPS, TURNS = 12, 30_000, 64


def either(*values: Any) -> Any:
    """Stand, in a graph, for a value that is one of several: branches that meet."""
    return values[0]


def unknown(*values: Any) -> Any:
    """Stand, in a graph, for a call that cannot be followed."""
    return values


def attempt(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute with known values; ``UNKNOWN`` where that raises, as it would in the code that is read."""
    try:
        return function(*args, **kwargs)
    except Exception:  # noqa: BLE001  any error means that nothing is known
        return UNKNOWN


@dataclass(frozen=True)
class Bound:
    """A function that is defined in the code that is read, or a method, with its closure or its object."""

    function: Any
    owner: Any = None
    env: Any = None
    code: Any = None


@dataclass(frozen=True)
class Made:
    """A module that code makes while it runs."""

    cls: type


@dataclass(frozen=True)
class Super:
    """What ``super()`` gives: an object, seen from above one of its classes."""

    cls: Any
    owner: Any


@dataclass
class Trace:
    """What reading one method gave.

    Attributes:
        graph: children are called by their dotted names below the module.
        reads: what was looked up on the module and below, by dotted name and attribute: the graph holds for every
            module on which the same is found.
        callees: by place, what is called there.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    callees: dict[Frame, list[Any]] = field(default_factory=dict)


class TooLongError(Exception):
    """There is more code than is worth reading."""


class Env(dict[str, Any]):
    """The local names of a function, with the names around it."""

    def __init__(self, function: types.FunctionType, cells: Any = None, code: Any = None) -> None:
        super().__init__()
        self.function, self.cells, self.code = function, cells, code or code_of(function)

    def copy(self) -> Env:
        """Return the same names, to be changed by themselves."""
        twin = Env(self.function, self.cells, self.code)
        twin.update(self)
        return twin


@dataclass(frozen=True)
class Star:
    """A starred argument whose length is not known: ``f(*values)``."""

    value: Any


class Writer:
    """Keeps the trace of one method, and adds nodes to its graph."""

    def __init__(self, module: nn.Module, paths: dict[int, str]) -> None:
        self.trace = Trace()
        self._graph, self._paths, self._module = self.trace.graph, paths, module
        self._frames: tuple[Frame, ...] = ()
        self._running: list[Any] = []
        self._returned: list[list[Any]] = []
        self._steps = 0

    @contextmanager
    def _at(self, node: ast.expr, env: Env) -> Iterator[None]:
        """Give the nodes that are made in the block this place."""
        before, self._frames = self._frames, (*self._frames, (env.code, span_of(node)))
        try:
            yield
        finally:
            self._frames = before

    def _either(self, values: Sequence[Any]) -> Any:
        known: list[Any] = []
        for value in values:
            if value is not UNKNOWN and not any(each is value or _equal(each, value) for each in known):
                known.append(value)
        if not known:
            return UNKNOWN
        if len(known) == 1 and (isinstance(known[0], fx.Node) or len(values) == 1 or UNKNOWN not in values):
            return known[0]
        nodes = [each for each in known if isinstance(each, fx.Node) or _has_nodes(each)]
        return self._node("call_function", either, nodes) if nodes else UNKNOWN

    def _node(self, op: str, target: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> fx.Node:
        if not (isinstance(target, str) or callable(target)):
            target = unknown
        named = {name: self._plain(value) for name, value in (kwargs or {}).items()}
        node = self._graph.create_node(op, target, tuple(map(self._plain, args)), named, name=f"v{self._steps}")
        node.meta["frames"] = self._frames
        return node

    def _plain(self, value: Any) -> Any:
        """Return what a graph may hold: nodes and plain values; anything else is ``None``."""
        if isinstance(value, fx.Node) or type(value) in (bool, int, float, str, type(None)):
            return value
        if type(value) is Star:
            return self._plain(value.value)
        if type(value) in (list, tuple, set):
            return tuple(map(self._plain, value)) if type(value) is tuple else [self._plain(each) for each in value]
        if type(value) is dict:
            return {str(key): self._plain(each) for key, each in value.items()}
        if type(value) is slice:
            return slice(self._plain(value.start), self._plain(value.stop), self._plain(value.step))
        return None


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and type(a) in PLAIN and a == b


def _has_nodes(value: Any) -> bool:
    if type(value) in (list, tuple):
        return any(isinstance(each, fx.Node) or _has_nodes(each) for each in value)
    return type(value) is dict and any(isinstance(each, fx.Node) or _has_nodes(each) for each in value.values())
