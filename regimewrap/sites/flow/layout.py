"""Which dimension of an activation holds the channels: 1 after a convolution, the last after a linear layer."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from regimewrap import torch_private
from regimewrap.sites import catalog
from regimewrap.sites.finder import Activation
from regimewrap.sites.flow.dataflow import Dataflow, is_layer
from regimewrap.sites.flow.operators import KEEPS, name_of

_FIRST = (torch_private.Convolution, torch_private.BatchOrInstanceNorm, nn.GroupNorm, nn.LocalResponseNorm)
_FIRST_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.instance_norm, F.group_norm)
_LAST_FUNCTIONS = (F.linear, F.bilinear, F.embedding, F.layer_norm, F.rms_norm)
_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def channel_dim_of(flow: Dataflow, activation: Activation, calls: Iterable[tuple[str, fx.Node]]) -> int | None:
    """Return the channel dimension of an activation, or ``None`` if nothing tells.

    Args:
        flow: where the model's values go.
        activation: the activation.
        calls: where it is computed; the values that it is given there are asked first.

    Raises:
        AmbiguousError: layers of its module say different things, and nothing tells which of them it follows.
    """
    if activation.call is not None:
        found = {_dims(flow, path, node, 0)[0] for path, node in calls} - {None}
        if len(found) == 1:
            return found.pop()
    return channel_dim(flow.model, activation.module, flow)


class AmbiguousError(Exception):
    """Layers disagree about where the channels are."""


def channel_dim(model: nn.Module, path: str, flow: Dataflow | None = None) -> int | None:
    """Return the channel dimension of what the activation at or in ``path`` returns, or ``None`` if nothing tells.

    Decided by the layer from which the value comes, through transpositions and the like; else by the nearest layer with
    weights before it in its block, else after it, else around the block.

    Args:
        model: the model.
        path: dotted name of the activation module, or of the module whose method calls one.
        flow: where the model's values go, if that is known.

    Raises:
        AmbiguousError: a method calls it among layers that say different things.
    """
    own = {dim for module in model.get_submodule(path).modules() if (dim := _of(module)) is not None}
    if len(own) > 1:
        raise AmbiguousError
    if own:
        return own.pop()
    flow = flow if flow is not None else Dataflow(model)
    followed = {_dims(flow, caller, call, 0)[0] for caller, call in flow.calls(path)} if path else {None}
    if len(followed) == 1 and followed != {None}:
        return followed.pop()
    parts = path.split(".") if path else []
    for length in range(len(parts) - 1, -1, -1):
        children = list(model.get_submodule(".".join(parts[:length])).named_children())
        place = next((place for place, (name, _) in enumerate(children) if name == parts[length]), 0)
        before = [module for _, child in reversed(children[:place]) for module in reversed(list(child.modules()))]
        after = [module for _, child in children[place + 1 :] for module in child.modules()]
        found = next((dim for module in (*before, *after) if (dim := _of(module)) is not None), None)
        if found is not None:
            return found
    return None


#: How many operations back the layer is looked for.
_BACK = 16
_Dims = tuple[int | None, int | None]
_NOTHING: _Dims = (None, None)


def _dims(flow: Dataflow, path: str, node: fx.Node, depth: int) -> _Dims:
    """Return the channel dimension and the rank of a value, each ``None`` if nothing tells."""
    if depth > _BACK or node.op in ("get_attr", "output"):
        return _NOTHING
    if node.op == "placeholder":
        return _agreed(flow, flow.given(path, node), depth + 1)
    inputs = [(path, each) for each in node.all_input_nodes]
    if node.op == "call_module":
        inner = f"{path}.{node.target}" if path else str(node.target)
        child = flow.module(inner)
        dim = _of(child, flow, inner)
        if dim is not None:
            return dim, _RANKS.get(type(child).__name__[-2:]) or _agreed(flow, inputs[:1], depth + 1)[1]
        graph = None if is_layer(child) or catalog.kind_of_module(child) else flow.graph(inner)
        if graph is not None:
            return _agreed(flow, [(inner, each) for each in graph.output_node().all_input_nodes], depth + 1)
        return _agreed(flow, inputs[:1], depth + 1) if _keeps(child) else _NOTHING
    name = name_of(node)
    if any(node.target is each for each in _FIRST_FUNCTIONS):
        return 1, _RANKS.get(name[-2:])
    if any(node.target is each for each in _LAST_FUNCTIONS):
        return -1, None
    if name in KEEPS or catalog.kind_of_node(node) is not None:
        if name == "getitem" and not _slices(node.args[1]):
            return _NOTHING
        found = _agreed(flow, inputs, depth + 1)
        # A tensor that is split into features is split along its channels.
        along: Any = node.kwargs.get("dim", (*node.args, None, None)[2])
        return (along, found[1]) if name in SPLITTING and found[0] is None and along in (1, -1) else found
    if name in ("reshape_as", "view_as"):
        return _agreed(flow, inputs[1:], depth + 1)
    return _moved(node, *_agreed(flow, inputs[:1], depth + 1))


def _agreed(flow: Dataflow, values: Iterable[tuple[str, fx.Node]], depth: int) -> _Dims:
    """Return what all values agree on; those of which nothing is known do not count."""
    found = {_dims(flow, path, node, depth) for path, node in values if node.op != "get_attr"} - {_NOTHING}
    dims, ranks = {dim for dim, _ in found}, {rank for _, rank in found if rank is not None}
    return dims.pop() if len(dims) == 1 else None, ranks.pop() if len(ranks) == 1 else None


#: Tensor methods that return parts along one dimension.
SPLITTING = ("chunk", "split", "tensor_split")
_RANKS = {"1d": 3, "2d": 4, "3d": 5}


def _moved(node: fx.Node, dim: int | None, rank: int | None) -> _Dims:
    """Return where the channels are after a transposition or the like."""
    name, rest = name_of(node), list(node.args[1:])
    if len(rest) == 1 and isinstance(rest[0], tuple | list):
        rest = list(rest[0])
    axes = [each for each in rest if isinstance(each, int)]
    if dim is None or node.kwargs or len(axes) < len(rest):
        return None, None
    if name == "permute" and axes:
        rank = len(axes)
        order = [axis % rank for axis in axes]
    elif name in ("transpose", "swapaxes") and len(axes) == 2:
        rank = rank or 3  # tokens, or a sequence
        order = list(range(rank))
        one, other = (axis % rank for axis in axes)
        order[one], order[other] = other, one
    elif name == "flatten" and axes == [2] and dim == 1:
        return 1, 3
    else:
        return None, None
    place = order.index(dim % rank)
    return -1 if place == rank - 1 else place, rank


def _slices(key: object) -> bool:
    """Say whether an index takes slices only, or picks a part of a tuple."""
    return isinstance(key, int | slice) or (isinstance(key, tuple) and all(isinstance(each, slice) for each in key))


def _keeps(child: nn.Module) -> bool:
    """Say whether a layer keeps every dimension at its place."""
    name = type(child).__name__
    return catalog.kind_of_module(child) is not None or name.startswith(("Dropout", "DropPath", "Identity", "Pad"))


def _of(module: nn.Module, flow: Dataflow | None = None, path: str = "") -> int | None:
    name = type(module).__name__
    if getattr(module, "data_format", None) == "channels_first":  # Hugging Face's LayerNorm over images
        return 1
    if isinstance(module, _FIRST) or name.endswith(("Norm2d", "Conv2d")) or "NormAct2d" in name:
        return 1
    if name.endswith(("LayerNorm", "RMSNorm")) and not isinstance(module, _LAST):  # a norm of the user's own
        return _of_norm(module, flow, path)
    # Hugging Face's Conv1D is a linear layer.
    return (
        -1
        if isinstance(module, _LAST) or name.endswith(("Linear", "LayerNorm", "RMSNorm")) or name == "Conv1D"
        else None
    )


def _of_norm(module: nn.Module, flow: Dataflow | None, path: str) -> int:
    """Read the dimension off the shape of the gain, or off how the code indexes it: ``weight[:, None, None]``."""
    for gain in module.parameters():
        if gain.dim() > 2 and gain.shape[-1] == 1 and sum(size > 1 for size in gain.shape) == 1:
            return 1
    graph = flow.graph(path) if flow is not None else None
    for node in graph.find_nodes(op="call_function", target=operator.getitem) if graph is not None else ():
        indexed, key = node.args
        if isinstance(indexed, fx.Node) and indexed.op == "get_attr" and isinstance(key, tuple) and key[-1:] == (None,):
            return 1
    return -1
