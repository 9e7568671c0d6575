"""What an activation is for: features that go on, or a weight that something else is multiplied with.

The inner activations of squeeze-excite, attention and gating branches are small and steer other units; gating them
would silence whole channels. Whether one is such is read off what it feeds: followed through layers, does every path
end in a sigmoid-like function whose result multiplies features, or start from features averaged over positions and
end where they multiply, or are added to, those that were averaged? What is summed up to one number is a loss; what the
network returns through a narrow last layer is its output; what is computed from parameters and buffers alone has no
samples to select within. Where forward code cannot be followed, shapes say it, and names last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from regimewrap.sites import catalog
from regimewrap.sites.finder import Activation
from regimewrap.sites.flow.dataflow import Dataflow, is_layer, related
from regimewrap.sites.flow.operators import (
    GATES,
    MATRIX_PRODUCTS,
    PRODUCTS,
    SUMS,
    name_of,
    passes,
    reads_shape,
    totals,
)
from regimewrap.sites.flow.writing import Frame
from regimewrap.sites.probe import Shapes

# Class names of blocks that compute a gate, in lower case, for code that cannot be followed.
_NAMES = (
    "squeezeexc",
    "semodule",
    "selayer",
    "seblock",
    "channelattn",
    "spatialattn",
    "ecamodule",
    "cbam",
    "gatherexcite",
)

#: How far a value is followed, in modules and operations; a branch that computes a gate is short.
_LIMIT = 40
#: How far from an activation a sum with other values may be the one of a loss.
_NEAR = 12


#: The reason for each end, if all paths of an activation end so.
_REASONS = {
    "gate": "all it feeds is a gate in {}",
    "steers": "all it feeds is a gate in {}: pooled features that scale or shift the others",
    "scores": "all it feeds is a gate in {}: scores that a softmax makes weights of",
    "loss": "it only reaches a sum or an average in {}, as a part of a loss",
    "output": "an output of the network, through a last layer that is narrower than what it is given",
}


@dataclass(frozen=True)
class _Way:
    """What a value is on its way: pooled features, only reshaped or masked so far, summed up to one number."""

    pooled: bool
    direct: bool = True
    total: bool = False
    depth: int = 0

    def on(self, **changes: bool) -> _Way:
        return replace(self, depth=self.depth + 1, **changes)


class Purpose:
    """Answers, for one model, what its activations are for.

    Args:
        flow: where its values go.
        shapes: what modules took and returned, if a forward pass was watched.
    """

    def __init__(self, flow: Dataflow, shapes: Shapes | None = None) -> None:
        self.flow = flow
        self._model = flow.model
        self._shapes = shapes or Shapes()
        self._goes_on: set[str] = set()  # names of activations that are known to make features, and no output

    def left_alone(self, activation: Activation) -> str | None:
        """Return why an activation is to be left alone, in words, or ``None`` if it makes hidden features."""
        if activation.call is not None and activation.call.factor:
            return "it scales something, by an argument that may be left out"
        if ".parametrizations." in f".{activation.module}.":
            return "does not see the batch: it computes a parameter"
        calls = self.calls(activation)
        if calls:
            origins = [self.flow.origin(path, node) for path, node in calls]
            if set(origins) == {"constant"}:
                return "does not see the batch: computed from parameters and buffers alone"
            ends: set[str] = set()
            for (path, node), origin in zip(calls, origins, strict=True):
                for end in self._ends(path, node, _Way(origin == "pooled")):
                    if end == "features":
                        if origin != "pooled":
                            self._goes_on.add(activation.name)
                        return None
                    ends.add(end if end != "output" or self._narrows(path, node) else "hidden output")
            if "hidden output" in ends:
                return None
            known = [end for end in ("loss", "output", "scores", "steers", "gate") if end in ends]
            if known and ends <= _REASONS.keys():
                return _REASONS[known[0]].format(calls[0][0] or type(self._model).__name__)
            if len({path for path, _ in calls}) > 1:
                return None  # one object for several places: its names say little
        return self._by_shape(activation) or self._by_name(activation)

    def note(self, activation: Activation) -> str:
        """Return a remark on a gated activation, which follows the reason."""
        shape = self._shapes.outputs.get(activation.module) if activation.name == activation.module else None
        batch = self._shapes.batch
        if shape and batch is not None and shape[0] != batch:
            return f"; of shape {shape} for a batch of {batch}: what scope='sample' takes for a sample is a part of one"
        if activation.name in self._goes_on:
            return ""
        calls = self.calls(activation)
        if calls and all(end == "output" for path, node in calls for end in self._ends(path, node, _Way(pooled=False))):
            return "; an output of the network: exclude it if its values are what you train on (density, depth)"
        return ""

    def calls(self, activation: Activation) -> list[tuple[str, fx.Node]]:
        """Return where the activation is computed, each with the dotted name of the module that does it."""
        path = activation.module
        if path not in self.flow.modules:
            return []  # made during the forward pass
        module = self.flow.module(path)
        if isinstance(module, fx.GraphModule) and activation.method is None:
            name = activation.node or activation.name
            return [(path, node) for node in module.graph.nodes if node.name == name and node.op != "call_module"]
        if activation.name == path:
            return self.flow.calls(path)
        code = activation.code
        if activation.call is None or activation.method is None or code is None:
            return []
        frames: tuple[Frame, ...] = ((code, activation.call.span),)
        return [(path, node) for node in self.flow.computed(path, activation.method.name, frames)]

    def _narrows(self, path: str, node: fx.Node) -> bool:
        """Say whether the layer before has few outputs: as the last layer of a network, and unlike a hidden one."""
        for _ in range(4):
            before = node.all_input_nodes
            if len(before) != 1:
                return False
            (node,) = before
            if node.op == "call_module":
                layer = self.flow.module(f"{path}.{node.target}" if path else str(node.target))
                given = getattr(layer, "in_features", getattr(layer, "in_channels", 0))
                made = getattr(layer, "out_features", getattr(layer, "out_channels", 0))
                if isinstance(given, int) and isinstance(made, int) and given and made:
                    return made == 1 or (made <= 3 and made < given) or 4 * made <= given
        return False

    def _by_shape(self, activation: Activation) -> str | None:
        """Judge by shapes: is this one position, in a block that takes and returns features at several positions?"""
        shape = self._shapes.outputs.get(activation.module, ())
        if activation.name != activation.module or _positions(shape) != 1:
            return None
        path = activation.module
        while path:
            path = path.rpartition(".")[0]
            taken, returned = self._shapes.inputs.get(path, ()), self._shapes.outputs.get(path, ())
            if _positions(taken) > 1 and _positions(returned) != 1:
                same = path and taken == returned
                return f"a gate in {path}: one position, in a block from features to features" if same else None
        return None

    def _by_name(self, activation: Activation) -> str | None:
        if activation.module not in self.flow.modules:
            return None  # made during the forward pass
        parts = activation.module.split(".") if activation.module else []
        for length in range(len(parts) + 1):
            name = type(self._model.get_submodule(".".join(parts[:length]))).__name__
            if name.replace("_", "").lower().startswith(_NAMES):
                return f"{name} computes a gate, not features"
        return None

    def _ends(self, path: str, node: fx.Node, way: _Way) -> Iterator[str]:
        """Yield where a value of the module at ``path`` ends up.

        ``gate`` behind a sigmoid or the like, ``scores`` in a softmax, ``steers`` where pooled features meet those they
        were pooled from, ``loss`` summed up to one number, ``output`` as what the network returns, ``features``
        anywhere else, ``unknown`` in code that cannot be followed.
        """
        if way.depth > _LIMIT:
            yield "unknown"
            return
        for user in node.users:
            kind = catalog.kind_of_node(user, self.flow.module(path))
            name = name_of(user)
            if user.op == "output":
                yield from self._after(path, way)
            elif reads_shape(user) or name.startswith("_assert") or name in _TESTS:
                continue
            elif totals(user) and not way.pooled:
                yield from self._ends(path, user, way.on(total=True))
            elif kind in GATES:
                if kind == "softmax" and way.direct and not self._is_returned(path, user):
                    yield "scores"
                else:
                    yield "gate" if self._multiplies(path, user, way.depth) else "features"
            elif name in PRODUCTS or name in SUMS:
                yield from self._meets(path, node, user, way)
            elif kind is not None or passes(user):
                layer = name in ("linear", "conv1d", "conv2d", "conv3d") or kind is not None
                yield from self._ends(path, user, way.on(direct=way.direct and not layer))
            elif user.op == "call_module":
                yield from self._through(path, node, user, way)
            else:
                yield "loss" if way.total and name in ("backward", "log", "item") else "features"

    def _meets(self, path: str, node: fx.Node, user: fx.Node, way: _Way) -> Iterator[str]:
        """Judge a product or sum with other values."""
        others = [each for each in user.all_input_nodes if each is not node]
        origins = {self.flow.origin(path, each) for each in others}
        if way.total or origins <= {"constant"} or (way.pooled and "features" not in origins):
            yield from self._ends(path, user, way.on())
        elif way.pooled and any(related(node, each) for each in others):
            yield "steers"
        else:
            # A loss adds and multiplies several such values; what becomes of the result tells.
            ends = (
                self._ends(path, user, way.on(direct=False))
                if way.direct and way.depth < _NEAR
                else iter(("features",))
            )
            yield "features" if any(end != "loss" for end in ends) else "loss"

    def _after(self, path: str, way: _Way) -> Iterator[str]:
        """Go on where the module at ``path`` returns the value to."""
        if not path:
            yield "loss" if way.total else "output" if way.direct else "features"
            return
        calls = self.flow.calls(path)
        if not calls:
            yield "loss" if way.total else "unknown"
        for caller, call in calls:
            yield from self._ends(caller, call, way.on())

    def _through(self, path: str, node: fx.Node, call: fx.Node, way: _Way) -> Iterator[str]:
        """Go on inside the child that is called with the value."""
        inner = f"{path}.{call.target}" if path else str(call.target)
        child = self.flow.module(inner)
        if is_layer(child) or type(child).__name__ in ("Rearrange", "Reduce"):
            if type(child).__module__ == "torch.nn.modules.loss":
                way = way.on(total=True)
            yield from self._ends(path, call, way.on(direct=way.direct and next(child.parameters(), None) is None))
            return
        entries = self.flow.entries(inner, call, node)
        if entries is None:
            yield "unknown"
        for entry in entries or ():
            yield from self._ends(inner, entry, way.on())

    def _is_returned(self, path: str, node: fx.Node) -> bool:
        """Say whether a value is what the network returns."""
        return not path and any(user.op == "output" for user in node.users)

    def _multiplies(self, path: str, node: fx.Node, depth: int) -> bool:
        """Say whether a sigmoid's value, reshaped or scaled perhaps, multiplies something that the batch decides."""
        if depth > _LIMIT:
            return False
        for user in node.users:
            name = name_of(user)
            if name in MATRIX_PRODUCTS:
                return True
            if name in PRODUCTS or name in SUMS:
                others = [each for each in user.all_input_nodes if each is not node]
                if all(self.flow.origin(path, each) == "constant" for each in others):
                    if self._multiplies(path, user, depth + 1):
                        return True
                elif name in PRODUCTS:
                    return True
            elif passes(user) or (user.op == "call_module" and self._drops_out(path, user)):
                if self._multiplies(path, user, depth + 1):
                    return True
            elif user.op == "output" and any(
                self._multiplies(caller, call, depth + 1) for caller, call in self.flow.calls(path)
            ):
                return True
        return False

    def _drops_out(self, path: str, call: fx.Node) -> bool:
        return next(self.flow.module(path).get_submodule(str(call.target)).parameters(), None) is None


#: Functions that only look at values.
_TESTS = frozenset(["eq", "ne", "lt", "le", "gt", "ge", "is_grad_enabled", "print"])


def _positions(shape: tuple[int, ...]) -> int:
    """Return the number of positions in a shape, channels first or last; 0 if it has none."""
    if len(shape) < 4:
        return 0
    first, last = torch.Size(shape[2:]).numel(), torch.Size(shape[1:-1]).numel()
    return min(first, last)
