"""Decide how each selected activation is reached, and build the new methods that takes; changes nothing.

The least invasive mechanism that is sound wins: a hook, else a traced method, else a rewritten one. A method is traced
or rewritten once for all instances of its class that read alike.
"""

from __future__ import annotations

import sys
import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from regimewrap.rewrite.graph import GraphRecipe, NotTraceableError, trace_method
from regimewrap.rewrite.guarded import GuardedRecipe
from regimewrap.rewrite.rebind import NewMethod, Recipe
from regimewrap.rewrite.source import NotRewritableError, Redirect, SourceRecipe, rewritten
from regimewrap.sites.finder import Activation, Method
from regimewrap.sites.flow.straight import prove
from regimewrap.sites.plan import Mechanism
from regimewrap.sites.read.code import Span
from regimewrap.sites.read.helpers import Helper


@dataclass(frozen=True)
class Rebinding:
    """What is to be rewritten of one module, and the names of the sites that its code will call by index.

    Attributes:
        sites: names of activations.
        methods: new methods, for a module with methods of its own.
        nodes: for a ``GraphModule``, name of a node to its index in ``sites``.
    """

    sites: tuple[str, ...]
    methods: tuple[NewMethod, ...] = ()
    nodes: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Prepared:
    """How to reach the selected activations.

    Attributes:
        mechanisms: by activation name; those that cannot be reached are missing.
        problems: by activation name, why not.
        rebindings: by dotted module name, the new methods.
    """

    mechanisms: dict[str, Mechanism] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    rebindings: dict[str, Rebinding] = field(default_factory=dict)


@dataclass
class _Edits:
    """What has to change in one method."""

    called: list[Activation] = field(default_factory=list)
    kept: list[Span] = field(default_factory=list)


def prepare(model: nn.Module, selected: Sequence[Activation]) -> Prepared:
    """Choose mechanisms and build new methods.

    Args:
        model: the model, read only.
        selected: the activations to gate.
    """
    prepared = Prepared()
    edits: dict[str, dict[Method, _Edits]] = defaultdict(lambda: defaultdict(_Edits))
    nodes: dict[str, list[Activation]] = defaultdict(list)
    for activation in selected:
        if activation.problem is not None:
            prepared.problems[activation.name] = activation.problem
        elif activation.node is not None:
            nodes[activation.module].append(activation)
            prepared.mechanisms[activation.name] = "graph"
        elif activation.method is not None:
            edits[activation.module][activation.method].called.append(activation)
        else:
            prepared.mechanisms[activation.name] = "hook"
            for method, span in activation.dropped:
                edits[method.module][method].kept.append(span)
    for path, activations in nodes.items():
        prepared.rebindings[path] = Rebinding(
            tuple(each.name for each in activations),
            nodes={each.node: place for place, each in enumerate(activations) if each.node is not None},
        )
    for path, methods in edits.items():
        _prepare_module(model.get_submodule(path), path, methods, prepared)
    return prepared


def _prepare_module(module: nn.Module, path: str, methods: dict[Method, _Edits], prepared: Prepared) -> None:
    built: list[NewMethod] = []
    sites: list[str] = []
    for method, edit in methods.items():
        reached = _without_lost(edit.called, prepared.problems)
        if not (reached or edit.kept):
            continue
        indices = {each.name: len(sites) + place for place, each in enumerate(reached)}
        try:
            mechanism, recipe = _recipe(module, method, reached, indices, tuple(edit.kept))
        except NotRewritableError as error:
            for each in reached:
                prepared.problems[each.name] = f"{method.name} cannot be rewritten: {error}"
            continue
        built.append(NewMethod(method.owner, method.name, recipe))
        for each in reached:
            sites.append(each.name)
            prepared.mechanisms[each.name] = mechanism
    if built:
        prepared.rebindings[path] = Rebinding(tuple(sites), tuple(built))


def _without_lost(called: Sequence[Activation], problems: dict[str, str]) -> list[Activation]:
    """Return what remains without the activations in plain functions that cannot be rewritten; note why for these."""
    lost: set[str] = set()
    anywhere = dict.fromkeys((each.name for each in called), 0)
    for helper, inside in _by_helper(called, 0).items():
        try:
            redirect = _redirect(helper, inside, anywhere, 0)
            rewritten(redirect.recipe, redirect.function)
        except NotRewritableError as error:
            why = f"it is in the function {helper.function.__name__}, which cannot be rewritten: {error}"
            problems.update({each.name: why for each in inside})
            lost.update(each.name for each in inside)
    return [each for each in called if each.name not in lost]


def _by_helper(called: Sequence[Activation], depth: int) -> dict[Helper, list[Activation]]:
    groups: dict[Helper, list[Activation]] = defaultdict(list)
    for each in called:
        if len(each.through) > depth:
            groups[each.through[depth]].append(each)
    return groups


def _redirect(helper: Helper, inside: Sequence[Activation], indices: Mapping[str, int], depth: int) -> Redirect:
    function = helper.function
    home: object = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        home = getattr(home, name, None)
    if home is not function:
        raise NotRewritableError(f"{function.__qualname__} is not at the top level of a module")
    return Redirect(function, helper.spans, _source("", inside, indices, (), depth + 1))


def _source(
    owner: str, called: Sequence[Activation], indices: Mapping[str, int], kept: tuple[Span, ...], depth: int
) -> SourceRecipe:
    """Return the recipe of a method, or of the plain function that is called by way of ``depth`` of them."""
    calls = {each.call: indices[each.name] for each in called if each.call is not None and len(each.through) == depth}
    spans = tuple((call.span, index) for call, index in calls.items())
    dropped = tuple(call.span for call in calls if call.target is not None)
    relus = tuple(call.span for call in calls if call.relu)
    redirects = (_redirect(each, inside, indices, depth) for each, inside in _by_helper(called, depth).items())
    return SourceRecipe(owner, spans, (*kept, *dropped), relus, tuple(redirects))


def _recipe(
    module: nn.Module,
    method: Method,
    called: Sequence[Activation],
    indices: Mapping[str, int],
    kept: tuple[Span, ...],
) -> tuple[Mechanism, Recipe]:
    function: types.FunctionType = vars(method.owner)[method.name]
    source = _source(method.owner.__name__, called, indices, kept, 0)
    rewritten(source, function)  # a trace starts from it, and the proof is worth nothing if it fails
    if not kept and not source.redirects and getattr(type(module), method.name) is function:
        traced = _traced(module, method, function, source)
        if traced is not None:
            return "graph", traced
    return "source", source


_TRACED: dict[object, GraphRecipe | None] = {}


def _traced(module: nn.Module, method: Method, function: types.FunctionType, source: SourceRecipe) -> Recipe | None:
    """Trace a method, or return what the trace of an instance that reads alike gave; ``None`` if that is not sound."""
    proof = prove(function, module)
    if proof.why_not is not None:
        return None
    if proof.attributes:
        guarded = GuardedRecipe(method.owner, method.name, source, proof)
        return guarded if guarded.prefill(module) else None
    key = (function, source, proof)
    if key not in _TRACED:
        try:
            title = f"{method.owner.__name__}.{method.name}"
            _TRACED[key] = trace_method(module, title, rewritten(source, function))
        except NotTraceableError:
            _TRACED[key] = None
    return _TRACED[key]
