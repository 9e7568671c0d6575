"""Decides how each selected activation is reached, and builds the new code; changes no model.

The least invasive mechanism wins: a hook on a module, a node in a graph, else other code for the method around a call.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from regimewrap.rewrite.exchange import Copied, Part, copies_of
from regimewrap.rewrite.source import Edits, NotRewritableError, digest_of, key_of
from regimewrap.sites.finder import Activation, Method
from regimewrap.sites.plan import Mechanism
from regimewrap.sites.read.calls import find_calls
from regimewrap.sites.read.code import Span, body_of, code_of, names_in, parse, span_of
from regimewrap.sites.read.helpers import Helper

#: Attributes by which torch's own modules allow kernels that compute the activation inside. Unless they read False the
#: gate would be bypassed in eval mode under no_grad, or be handed nested tensors.
FUSED_PATHS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


@dataclass
class Change:
    """What becomes of one module.

    Attributes:
        sites: keys of calls in its code to names of sites.
        parts: its methods whose code is exchanged.
        nodes: for a ``GraphModule``, names of nodes to names of sites.
    """

    sites: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    nodes: dict[str, str] = field(default_factory=dict)


@dataclass
class Prepared:
    """How to reach the selected activations.

    Attributes:
        mechanisms: by activation name; those that cannot be reached are missing.
        problems: by activation name, why not.
        changes: by dotted module name.
    """

    mechanisms: dict[str, Mechanism] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=lambda: defaultdict(Change))


@dataclass
class _Work:
    """What has to change in one method."""

    called: list[Activation] = field(default_factory=list)
    kept: list[Span] = field(default_factory=list)


def prepare(model: nn.Module, selected: Sequence[Activation]) -> Prepared:
    """Choose mechanisms and build new code.

    Args:
        model: the model, read only.
        selected: the activations to gate.
    """
    prepared, known = Prepared(), _Known()
    work: dict[str, dict[Method, _Work]] = defaultdict(lambda: defaultdict(_Work))
    for activation in selected:
        if activation.problem is not None:
            prepared.problems[activation.name] = activation.problem
        elif activation.node is not None:
            prepared.changes[activation.module].nodes[activation.node] = activation.name
            prepared.mechanisms[activation.name] = "graph"
        elif activation.method is not None:
            work[activation.module][activation.method].called.append(activation)
        else:
            prepared.mechanisms[activation.name] = "hook"
            _join_forward(model.get_submodule(activation.module), activation, prepared, known)
            for method, span in activation.dropped:
                work[method.module][method].kept.append(span)
    for path, methods in work.items():
        for method, each in methods.items():
            _change_method(path, method, each, prepared, known)
    _guard_fused_paths(model, prepared, known)
    return prepared


class _Known:
    """The parts that this plan has tried: equal modules share them."""

    def __init__(self) -> None:
        self._tried: dict[object, Part | str] = {}

    def part(self, owner: type, name: str, edits: Edits, copies: tuple[Copied, ...] = ()) -> Part:
        """Return a part whose code can be built.

        Raises:
            NotRewritableError: it cannot.
        """
        key = owner, name, edits, copies
        if key not in self._tried:
            function = body_of(vars(owner)[name])
            part = Part(owner, name, edits, copies, digest_of(function))
            try:
                part.build(edits)
                self._tried[key] = part
            except NotRewritableError as error:
                self._tried[key] = str(error)
        found = self._tried[key]
        if isinstance(found, str):
            raise NotRewritableError(found)
        return found


def _join_forward(module: nn.Module, activation: Activation, prepared: Prepared, known: _Known) -> None:
    """Make a ReLU and its gate one operation, if the module's ``forward`` is nothing but that one call."""
    cls: Any = type(module)  # mypy takes nn.Module's __hash__ for that of the class
    owner = next(each for each in cls.__mro__ if "forward" in vars(each))
    function = vars(owner)["forward"]
    tree = parse(body_of(function)) if callable(function) and body_of(function) is function else None
    if tree is None or "forward" in module.__dict__:
        return
    *documented, last = tree.body
    calls = [each for each in find_calls(function, module) if each.relu]
    only = isinstance(last, ast.Return) and last.value is not None and [span_of(last.value)] == [e.span for e in calls]
    if not only or len(documented) > (ast.get_docstring(tree) is not None):
        return
    spans = frozenset(each.span for each in calls)
    try:
        part = known.part(owner, "forward", Edits(spans, spans))
    except NotRewritableError:
        return  # the hook is enough
    prepared.changes[activation.module] = Change({key_of(part.home, calls[0].span): activation.name}, (part,))


def _change_method(path: str, method: Method, work: _Work, prepared: Prepared, known: _Known) -> None:
    reached = _without_lost(work.called, prepared.problems)
    copies = tuple(_copied(each, inside, 0) for each, inside in _by_helper(reached, 0).items())
    edits = _edits(reached, 0, copies) | Edits(kept=frozenset(work.kept))
    if edits == Edits():
        return
    try:
        part = known.part(method.owner, method.name, edits, copies)
    except NotRewritableError as error:
        for each in reached:
            prepared.problems[each.name] = f"{method.name} cannot be rewritten: {error}"
        return
    change = prepared.changes[path]
    change.parts += (part,)
    for each in reached:
        change.sites[_key(part, each)] = each.name
        prepared.mechanisms[each.name] = "source"


def _key(part: Part, activation: Activation) -> str:
    home, copies = part.home, part.copies
    for helper in activation.through:
        (twin,) = (each for each in copies if each.function is helper.function)
        home, copies = twin.home(home), twin.inside
    if activation.call is None:
        raise TypeError(f"{activation.name} is not a call")
    return key_of(home, activation.call.span)


def _without_lost(called: Sequence[Activation], problems: dict[str, str]) -> list[Activation]:
    """Leave out the activations in plain functions that cannot be rewritten, and note why."""
    lost: set[str] = set()
    for helper, inside in _by_helper(called, 0).items():
        try:
            copies_of("", [_copied(helper, inside, 0)])
        except NotRewritableError as error:
            why = f"it is in the function {helper.function.__name__}, which cannot be rewritten: {error}"
            problems.update({each.name: why for each in inside})
            lost.update(each.name for each in inside)
    return [each for each in called if each.name not in lost]


def _by_helper(called: Iterable[Activation], depth: int) -> dict[Helper, list[Activation]]:
    groups: dict[Helper, list[Activation]] = defaultdict(list)
    for each in called:
        if len(each.through) > depth:
            groups[each.through[depth]].append(each)
    return groups


def _copied(helper: Helper, called: Sequence[Activation], depth: int) -> Copied:
    function = helper.function
    home: object = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        home = getattr(home, name, None)
    if home is not function:
        raise NotRewritableError(f"{function.__qualname__} is not at the top level of a module")
    inside = tuple(_copied(each, below, depth + 1) for each, below in _by_helper(called, depth + 1).items())
    edits = _edits(called, depth + 1, inside)
    return Copied(function, helper.spans, edits, inside, digest_of(body_of(function)))


def _edits(called: Iterable[Activation], depth: int, copies: Iterable[Copied]) -> Edits:
    """Return what changes in a method, or in the plain function that is called by way of ``depth`` of them."""
    calls = [each.call for each in called if each.call is not None and len(each.through) == depth]
    return Edits(
        gated=frozenset(call.span for call in calls),
        relus=frozenset(call.span for call in calls if call.relu),
        kept=frozenset(call.span for call in calls if call.target is not None),
        copied=frozenset(span for each in copies for span in each.spans),
    )


def _guard_fused_paths(model: nn.Module, prepared: Prepared, known: _Known) -> None:
    """Keep torch's encoders off their fused kernels while a gate inside acts."""
    inside = {path: change for path, change in prepared.changes.items() if change.parts and change.sites}
    for path, module in model.named_modules():
        attribute = next((name for cls, name in FUSED_PATHS.items() if isinstance(module, cls)), None)
        below = [change for other, change in inside.items() if f"{other}.".startswith(f"{path}." if path else "")]
        if attribute is None or not below:
            continue
        change = prepared.changes[path]
        change.sites.setdefault("", next(iter(below[0].sites.values())))
        cls: Any = type(module)
        for owner in cls.__mro__:
            for name, function in vars(owner).items():
                code = getattr(body_of(function), "__code__", None)
                if name != "__init__" and code is not None and attribute in names_in(code_of(body_of(function))):
                    change.parts += (known.part(owner, name, Edits(idle=frozenset((attribute,)))),)
