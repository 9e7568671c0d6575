"""Traced methods that depend on plain attributes: one graph for each combination of values met, chosen at each call.

A graph is used only while the attributes that its method may read are what they were when it was traced. For anything
else there is the same method rewritten in its source, which is right whatever is read.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from regimewrap.rewrite.graph import NotTraceableError, trace_method
from regimewrap.rewrite.source import SourceRecipe, rewritten
from regimewrap.sites.flow.straight import Proof, is_plain, prove

#: A method with this many graphs gets no more at call time: an attribute that changes all the time is not worth them.
_MOST_GRAPHS = 64


@dataclass(frozen=True)
class GuardedRecipe:
    """A method as one graph for each combination of the plain attributes that it reads.

    The graphs are shared by all instances, and recipes, that are equal; they are not pickled but traced again.

    Attributes:
        owner: the class that defines the method.
        method: its name.
        source: the method without a graph.
        proof: what the method reads.
    """

    owner: type
    method: str
    source: SourceRecipe
    proof: Proof

    def build(self, original: types.FunctionType) -> types.FunctionType:
        """Return the function that reads the attributes and calls the graph for them."""
        gated = rewritten(self.source, original)
        names, graphs = self.proof.attributes, self._graphs

        def dispatch(self_: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            # A compiler makes its own graph and checks by itself what that depends on.
            if torch.compiler.is_compiling():
                return gated(self_, *args, **kwargs)
            values = tuple([getattr(self_, name, _MISSING) for name in names])
            if not is_plain(values):
                return gated(self_, *args, **kwargs)
            if repr(values) not in graphs and len(graphs) < _MOST_GRAPHS:
                # A compiler that gave up on this function would go on with the ones that it calls.
                torch.compiler.disable(self._meet)(self_, values)  # type: ignore[no-untyped-call]
            return (graphs.get(repr(values)) or gated)(self_, *args, **kwargs)

        return cast("types.FunctionType", dispatch)

    def prefill(self, module: nn.Module) -> bool:
        """Trace what ``module`` reads, in train and in eval mode; ``False`` if a combination cannot be traced."""
        now = {name: getattr(module, name) for name in self.proof.attributes}
        modes = [{**now, "training": mode} for mode in (True, False)] if "training" in now else [now]
        return all(self._meet(module, tuple(values.values())) for values in modes)

    def _meet(self, module: nn.Module, values: tuple[object, ...]) -> bool:
        """Trace one combination if it is new; ``False`` if it has no graph because it cannot be traced."""
        original: types.FunctionType = vars(self.owner)[self.method]
        graphs, key = self._graphs, repr(values)
        if key not in graphs:
            read = dict(zip(self.proof.attributes, values, strict=True))
            where = ", ".join(f"{name}={value!r}" for name, value in read.items())
            title = f"{self.owner.__name__}.{self.method} with {where}"
            try:
                if prove(original, module) != self.proof:
                    raise NotTraceableError("the object has changed since the plan was made")
                recipe = trace_method(module, title, rewritten(self.source, original), read)
                graphs[key] = recipe.build(original)
            except NotTraceableError:
                graphs[key] = None
        return graphs[key] is not None

    @property
    def _graphs(self) -> dict[str, types.FunctionType | None]:
        return _GRAPHS.setdefault(self, {})


_MISSING = object()
_GRAPHS: dict[GuardedRecipe, dict[str, types.FunctionType | None]] = {}
