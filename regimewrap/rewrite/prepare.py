"""Decide how each selected activation is reached, and build the new methods that takes; changes nothing.

The least invasive mechanism that is sound wins: a hook, else a traced method, else a rewritten one. A method is traced
or rewritten once for all instances of its class that read alike.
"""

from __future__ import annotations

import ast
import functools
import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from regimewrap.rewrite.graph import GraphRecipe, NotTraceableError, trace_method
from regimewrap.rewrite.rebind import NewMethod, Recipe
from regimewrap.rewrite.source import NotRewritableError, SourceRecipe
from regimewrap.sites.calls import Call, Scope, Span, body_of, parse
from regimewrap.sites.finder import Activation, Method
from regimewrap.sites.plan import Mechanism
from regimewrap.sites.straight import why_not_straight


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


def prepare(model: nn.Module, selected: Sequence[Activation], found: Sequence[Activation]) -> Prepared:
    """Choose mechanisms and build new methods.

    Args:
        model: the model, read only.
        selected: the activations to gate.
        found: every activation of the model, in the order in which ``find`` gave them.
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
    calls: dict[Method, list[Call]] = defaultdict(list)
    for activation in found:
        if activation.method is not None and activation.call is not None:
            calls[activation.method].append(activation.call)
    for path, methods in edits.items():
        _prepare_module(model.get_submodule(path), path, methods, calls, prepared)
    return prepared


def _prepare_module(
    module: nn.Module, path: str, methods: dict[Method, _Edits], calls: dict[Method, list[Call]], prepared: Prepared
) -> None:
    built: list[NewMethod] = []
    sites: list[str] = []
    for method, edit in methods.items():
        indices = {each.call: len(sites) + place for place, each in enumerate(edit.called) if each.call is not None}
        try:
            mechanism, recipe = _recipe(module, method, calls[method], indices, tuple(edit.kept))
        except NotRewritableError as error:
            for each in edit.called:
                prepared.problems[each.name] = f"{method.name} cannot be rewritten: {error}"
            continue
        built.append(NewMethod(method.owner, method.name, recipe))
        for each in edit.called:
            sites.append(each.name)
            prepared.mechanisms[each.name] = mechanism
    if built:
        prepared.rebindings[path] = Rebinding(tuple(sites), tuple(built))


def _recipe(
    module: nn.Module, method: Method, calls: list[Call], indices: dict[Call, int], kept: tuple[Span, ...]
) -> tuple[Mechanism, Recipe]:
    function: types.FunctionType = vars(method.owner)[method.name]
    if not kept and getattr(type(module), method.name) is function and why_not_straight(function, module) is None:
        traced = _traced(module, method.name, function, tuple(calls), tuple(indices.get(call) for call in calls))
        if traced is not None:
            return "graph", traced
    kept += tuple(call.span for call in indices if call.target is not None)
    recipe = SourceRecipe(method.owner.__name__, tuple((call.span, index) for call, index in indices.items()), kept)
    _try(recipe, function)
    return "source", recipe


@functools.lru_cache(maxsize=1024)
def _try(recipe: SourceRecipe, function: types.FunctionType) -> None:
    recipe.build(function)


_TRACED: dict[object, GraphRecipe | None] = {}


def _traced(
    module: nn.Module,
    name: str,
    function: types.FunctionType,
    calls: tuple[Call, ...],
    indices: tuple[int | None, ...],
) -> GraphRecipe | None:
    """Trace a method, or return what the trace of an instance that reads alike gave; ``None`` if FX cannot."""
    key = (function, _readings(function, module), indices)
    if key not in _TRACED:
        try:
            _TRACED[key] = trace_method(module, name, calls, indices)
        except NotTraceableError:
            _TRACED[key] = None
    return _TRACED[key]


def _readings(function: types.FunctionType, module: nn.Module) -> tuple[tuple[str, str], ...]:
    """What a straight-line method reads from ``self``: each expression, and which child or tensor it is."""
    scope = Scope(body_of(function), module)
    names = {id(child): name for name, child in module.named_modules()}
    tree = parse(body_of(function))
    readings = []
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Attribute | ast.Subscript):
            value = scope.value_of(node)
            if isinstance(value, nn.Module):
                readings.append((ast.unparse(node), names.get(id(value), "")))
            elif isinstance(value, torch.Tensor):
                readings.append((ast.unparse(node), type(value).__name__))
    return tuple(readings)
