"""What an activation is for: features that go on, or a weight that something else is multiplied with.

The inner activations of squeeze-excite, attention and gating branches are small and steer other units; gating them
would silence whole channels. Whether one is such is read off what it feeds: followed through layers, does every path
end in a sigmoid-like function whose result multiplies features, or start from features averaged over positions and
end where they multiply, or are added to, those that were averaged? What is computed from parameters and buffers alone
has no samples to select within. Where forward code cannot be followed, shapes say it, and names last.
"""

from __future__ import annotations

import ast
import functools
import operator
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from regimewrap.sites import catalog
from regimewrap.sites.finder import Activation, Method
from regimewrap.sites.flow.dataflow import Dataflow, is_layer, name_of, reads_shape, related
from regimewrap.sites.probe import Shapes
from regimewrap.sites.read.code import body_of, parse

_GATES = ("sigmoid", "tanh", "softmax")
_PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}
_SUMS = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub"}
# What attention does with its weights.
_MATRIX_PRODUCTS = {operator.matmul, torch.matmul, torch.bmm, torch.einsum, "matmul", "bmm"}
# What a value may pass on its way and still be the same branch; layers and activations besides.
_PASSING = {
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "expand_as", "expand", "contiguous",
    "mean", "sum", "float", "to", "type_as", "dropout", "conv1d", "conv2d", "conv3d", "linear", "interpolate",
    "getattr", "adaptive_avg_pool2d", "getitem", "unflatten", "clamp", "batch_norm", "layer_norm", "chunk", "split",
    "unbind", "repeat", "truediv", "div", "neg", "normalize",
}  # fmt: skip
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


class Purpose:
    """Answers, for one model, what its activations are for.

    Args:
        model: read only; forward code is traced, not run.
        shapes: what modules took and returned, if a forward pass was watched.
    """

    def __init__(self, model: nn.Module, shapes: Shapes | None = None) -> None:
        self._model = model
        self._shapes = shapes or Shapes()
        self._flow = Dataflow(model)
        self._holding: dict[str, bool] = {}

    def left_alone(self, activation: Activation) -> str | None:
        """Return why an activation is to be left alone, in words, or ``None`` if it makes hidden features."""
        if activation.call is not None and activation.call.factor:
            return "it scales something, by an argument that may be left out"
        calls = self._calls(activation)
        if calls:
            origins = {self._flow.origin(path, node) for path, node in calls}
            owner = calls[0][0] or type(self._model).__name__
            if origins == {"constant"}:
                return "does not see the batch: computed from parameters and buffers alone"
            pooled = origins == {"pooled"}
            if not pooled and not any(self._near_gate(path) for path, _ in calls):
                return None
            ends = set()
            for path, node in calls:
                for end in self._ends(path, node, pooled, 0):
                    if end == "features":
                        return None
                    ends.add(end)
            if ends and ends <= {"gate", "steers"}:
                how = ": pooled features that scale or shift the others" if "steers" in ends else ""
                return f"all it feeds is a gate in {owner}{how}"
        return self._by_shape(activation) or self._by_name(activation)

    def note(self, activation: Activation) -> str:
        """Return what is worth knowing about the shape of a gated activation, to be put behind the reason."""
        shape = self._shapes.outputs.get(activation.module) if activation.name == activation.module else None
        batch = self._shapes.batch
        if not shape or batch is None or shape[0] == batch:
            return ""
        return f"; of shape {shape} for a batch of {batch}: what scope='sample' takes for a sample is a part of one"

    def _calls(self, activation: Activation) -> list[tuple[str, fx.Node]]:
        """Return where the activation is computed, each with the dotted name of the module that does it."""
        path = activation.module
        if path not in self._flow.modules:
            return []  # made during the forward pass
        module = self._flow.module(path)
        if isinstance(module, fx.GraphModule) and activation.method is None:
            name = activation.node or activation.name
            return [(path, node) for node in module.graph.nodes if node.name == name and node.op != "call_module"]
        if activation.name == path:
            return self._flow.calls(path)
        graph = self._flow.graph(path) if activation.call is not None else None
        if graph is None or activation.call is None:
            return []
        short, found = activation.call.short, [node for node in graph.nodes if name_of(node) == activation.call.short]
        if found and activation.method and not activation.through and len(found) == _count(activation.method, short):
            place = activation.name.rpartition(f".{short}_")[2]
            found = [found[int(place) - 1 if place.isdigit() else 0]]
        # Otherwise some branch was not taken, or a method runs twice: all calls of that name have to be alike.
        return [(path, node) for node in found]

    def _by_shape(self, activation: Activation) -> str | None:
        """Judge by shapes: one position inside a block that takes and returns the same features at several."""
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
        if activation.module not in self._flow.modules:
            return None  # made during the forward pass
        parts = activation.module.split(".") if activation.module else []
        for length in range(len(parts) + 1):
            name = type(self._model.get_submodule(".".join(parts[:length]))).__name__
            if name.replace("_", "").lower().startswith(_NAMES):
                return f"{name} computes a gate, not features"
        return None

    def _near_gate(self, path: str) -> bool:
        """Say whether anything sigmoid-like is in a block or in the one around it; a cheap first look."""
        return self._holds_gate(path) or self._holds_gate(path.rpartition(".")[0])

    def _holds_gate(self, path: str) -> bool:
        if path not in self._holding:
            inside = self._flow.module(path).modules() if path else (self._model, *self._model.children())
            self._holding[path] = any(_is_gate(module) for module in inside)
        return self._holding[path]

    def _ends(self, path: str, node: fx.Node, pooled: bool, depth: int) -> Iterator[str]:
        """Yield where a value of the module at ``path`` ends up.

        ``gate`` behind a sigmoid or the like, ``steers`` where pooled features meet those they were pooled from,
        ``features`` anywhere else, ``unknown`` in code that cannot be followed.
        """
        if depth > _LIMIT:
            yield "unknown"
            return
        for user in node.users:
            kind = catalog.kind_of_node(user, self._flow.module(path))
            if user.op == "output":
                yield from self._after(path, pooled, depth)
            elif reads_shape(user) or name_of(user).startswith("_assert"):
                continue
            elif kind in _GATES:
                yield "gate" if self._multiplies(path, user, depth) else "features"
            elif user.target in _PRODUCTS or user.target in _SUMS:
                yield from self._meets(path, node, user, pooled, depth)
            elif kind is not None or _passes(user):
                yield from self._ends(path, user, pooled, depth + 1)
            elif user.op == "call_module":
                yield from self._through(path, node, user, pooled, depth)
            else:
                yield "features"

    def _meets(self, path: str, node: fx.Node, user: fx.Node, pooled: bool, depth: int) -> Iterator[str]:
        """Judge a product or sum with other values."""
        others = [each for each in user.all_input_nodes if each is not node]
        origins = {self._flow.origin(path, each) for each in others}
        if origins <= {"constant"} or (pooled and "features" not in origins):
            yield from self._ends(path, user, pooled, depth + 1)
        else:
            yield "steers" if pooled and any(related(node, each) for each in others) else "features"

    def _after(self, path: str, pooled: bool, depth: int) -> Iterator[str]:
        """Go on where the module at ``path`` returns the value to."""
        if not path:
            yield "features"
            return
        calls = self._flow.calls(path)
        if not calls:
            yield "unknown"
        for caller, call in calls:
            yield from self._ends(caller, call, pooled, depth + 1)

    def _through(self, path: str, node: fx.Node, call: fx.Node, pooled: bool, depth: int) -> Iterator[str]:
        """Go on inside the child that is called with the value."""
        inner = f"{path}.{call.target}" if path else str(call.target)
        child = self._flow.module(inner)
        if is_layer(child):
            yield from self._ends(path, call, pooled, depth + 1)
            return
        entries = self._flow.entries(inner, call, node)
        if entries is None:
            yield "unknown"
        for entry in entries or ():
            yield from self._ends(inner, entry, pooled, depth + 1)

    def _multiplies(self, path: str, node: fx.Node, depth: int) -> bool:
        """Say whether a sigmoid's value, reshaped or scaled perhaps, multiplies something that the batch decides."""
        if depth > _LIMIT:
            return False
        for user in node.users:
            if user.target in _MATRIX_PRODUCTS:
                return True
            if user.target in _PRODUCTS or user.target in _SUMS:
                others = [each for each in user.all_input_nodes if each is not node]
                if all(self._flow.origin(path, each) == "constant" for each in others):
                    if self._multiplies(path, user, depth + 1):
                        return True
                elif user.target in _PRODUCTS:
                    return True
            elif _passes(user) or (user.op == "call_module" and self._drops_out(path, user)):
                if self._multiplies(path, user, depth + 1):
                    return True
            elif user.op == "output" and any(
                self._multiplies(caller, call, depth + 1) for caller, call in self._flow.calls(path)
            ):
                return True
        return False

    def _drops_out(self, path: str, call: fx.Node) -> bool:
        child = self._flow.module(path).get_submodule(str(call.target))
        return is_layer(child) and next(child.parameters(), None) is None


def _count(method: Method, short: str) -> int:
    tree = parse(body_of(vars(method.owner)[method.name]))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree is not None else []
    return sum(ast.unparse(func).rpartition(".")[2].partition("[")[0] == short for func in calls)


def _passes(node: fx.Node) -> bool:
    return node.op in ("call_method", "call_function") and name_of(node) in _PASSING


def _positions(shape: tuple[int, ...]) -> int:
    """Return at how many positions features of a shape stand, channels first or last; 0 if it has no positions."""
    if len(shape) < 4:
        return 0
    first, last = torch.Size(shape[2:]).numel(), torch.Size(shape[1:-1]).numel()
    return min(first, last)


def _is_gate(module: nn.Module) -> bool:
    cls: Any = type(module)
    return catalog.kind_of_module(module) in _GATES or calls_gate(cls)


@functools.lru_cache(maxsize=4096)
def calls_gate(cls: Any) -> bool:
    """Say whether a module class's own code names a function such as sigmoid."""
    return any(
        catalog.kind_of_name(name) in _GATES
        for home in cls.__mro__
        if not home.__module__.startswith("torch.nn")
        for value in vars(home).values()
        if isinstance(value, types.FunctionType)
        for name in body_of(value).__code__.co_names
    )
