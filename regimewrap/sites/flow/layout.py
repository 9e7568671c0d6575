"""Which dimension of an activation holds the channels: 1 after a convolution, the last after a linear layer."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable

import torch.nn.functional as F
from torch import fx, nn

from regimewrap.sites import catalog
from regimewrap.sites.finder import Activation
from regimewrap.sites.flow.dataflow import Dataflow, is_layer, name_of
from regimewrap.sites.read.code import UNKNOWN, Scope, body_of, own_methods
from regimewrap.sites.read.values import SPLITTING, argument_at, called_with, made_by

_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
_FIRST_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.instance_norm, F.group_norm)
_LAST_FUNCTIONS = (F.linear, F.bilinear, F.embedding, F.layer_norm, F.rms_norm)
_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def channel_dim_of(model: nn.Module, activation: Activation) -> int | None:
    """Return the channel dimension of an activation, or ``None`` if nothing tells.

    For a call the code that makes its argument is asked first: ``F.silu(F.conv1d(...))``, in the method or in the plain
    functions by way of which it is made.
    """
    if activation.call is not None and activation.method is not None:
        function = vars(activation.method.owner)[activation.method.name]
        frames = [function, *(each.function for each in activation.through)]
        argument = argument_at(frames[-1], activation.call.span)
        if argument is not None:
            dim = _of_value(model.get_submodule(activation.module), activation, frames, argument)
            if dim is not None:
                return dim
    return channel_dim(model, activation.module)


def _of_value(
    module: nn.Module, activation: Activation, frames: list[types.FunctionType], value: ast.expr
) -> int | None:
    """Follow a value to the layer that makes it: in the last of some functions, and on in those that call it."""
    function = body_of(frames[-1])
    value = made_by(function, value)
    if isinstance(value, ast.Name) and len(frames) > 1:
        helper = activation.through[len(frames) - 2]
        given = [argument_at(frames[-2], span, helper.function, value.id) for span in helper.spans]
        dims = {None if each is None else _of_value(module, activation, frames[:-1], each) for each in given}
        return dims.pop() if len(dims) == 1 else None
    if not isinstance(value, ast.Call):
        return None
    callee = Scope(function, module if len(frames) == 1 else None).value_of(value.func)
    if callee is UNKNOWN and isinstance(value.func, ast.Attribute) and value.func.attr in SPLITTING:
        # What is split into features is split along the channels.
        along = [each.value for each in value.keywords if each.arg == "dim"] or value.args[1:2]
        return ast.literal_eval(along[0]) if along and ast.unparse(along[0]) in ("1", "-1") else None
    if isinstance(callee, nn.Module):
        return _of(callee)
    return (
        1
        if any(callee is each for each in _FIRST_FUNCTIONS)
        else (-1 if any(callee is each for each in _LAST_FUNCTIONS) else None)
    )


def channel_dim(model: nn.Module, path: str) -> int | None:
    """Return the channel dimension of what the activation at or in ``path`` returns, or ``None`` if nothing tells.

    Decided by the layer from which the value comes, through transpositions and the like; else by the layer whose result
    it is called with, as in ``self.act(self.linear(x))``; else by the nearest layer with weights before it in its
    block, else after it, else around the block.

    Args:
        model: the model.
        path: dotted name of the activation module, or of the module whose method calls one.
    """
    own = {dim for module in model.get_submodule(path).modules() if (dim := _of(module)) is not None}
    if own:
        # A method calls it among layers; if they disagree, nothing tells.
        return own.pop() if len(own) == 1 else None
    followed = _Followed(model).dim(path) if path else None
    if followed is not None:
        return followed
    direct = _of_argument(model, path)
    if direct is not None:
        return direct
    parts = path.split(".") if path else []
    for length in range(len(parts) - 1, -1, -1):
        children = list(model.get_submodule(".".join(parts[:length])).named_children())
        place = [name for name, _ in children].index(parts[length])
        before = [module for _, child in reversed(children[:place]) for module in reversed(list(child.modules()))]
        after = [module for _, child in children[place + 1 :] for module in child.modules()]
        found = next((dim for module in (*before, *after) if (dim := _of(module)) is not None), None)
        if found is not None:
            return found
    return None


def _of_argument(model: nn.Module, path: str) -> int | None:
    """Return what the layers say whose results an activation module is called with directly, if they agree."""
    if not path:
        return None
    parent, activation = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    arguments = (each for _, _, function in own_methods(parent) for each in called_with(function, parent, activation))
    dims = {dim for layer in arguments if (dim := _of(layer)) is not None}
    return dims.pop() if len(dims) == 1 else None


#: How many operations back the layer is looked for.
_BACK = 16
_SAME = {
    "float", "half", "to", "type_as", "contiguous", "clone", "dropout", "chunk", "split", "getitem", "add", "sub",
    "mul", "truediv", "div", "neg", "iadd", "imul", "clamp", "unbind", "where", "pad",
}  # fmt: skip
_Dims = tuple[int | None, int | None]


class _Followed:
    """Follows values back to the layers that make them, and keeps account of the channel dimension and the rank."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._flow = Dataflow(model)

    def dim(self, path: str) -> int | None:
        """Return the channel dimension of what the module at ``path`` is called with, if all calls agree."""
        found = {self._dims(caller, call, 0)[0] for caller, call in self._flow.calls(path)}
        return found.pop() if len(found) == 1 else None

    def _dims(self, path: str, node: fx.Node, depth: int) -> _Dims:
        """Return the channel dimension and the rank of a value, each ``None`` if it cannot be told."""
        if depth > _BACK:
            return None, None
        if node.op == "placeholder":
            given = self._flow.given(path, node)
            return self._agreed(given, depth + 1)
        if node.op == "call_module":
            inner = f"{path}.{node.target}" if path else str(node.target)
            child = self._model.get_submodule(inner)
            before = [(path, each) for each in node.all_input_nodes[:1]]
            dim = _of(child)
            if dim is not None:
                rank = _RANKS.get(type(child).__name__[-2:]) or self._agreed(before, depth + 1)[1]
                return dim, rank
            graph = None if is_layer(child) or catalog.kind_of_module(child) else self._flow.graph(inner)
            if graph is not None:
                return self._agreed([(inner, each) for each in graph.output_node().all_input_nodes], depth + 1)
            return self._agreed(before, depth + 1) if _keeps(child) else (None, None)
        if node.op not in ("call_function", "call_method"):
            return None, None
        tensors = [(path, each) for each in node.all_input_nodes]
        if name_of(node) in _SAME or catalog.kind_of_node(node) is not None:
            if name_of(node) == "getitem" and not _slices(node.args[1]):
                return None, None
            return self._agreed(tensors, depth + 1)
        if name_of(node) in ("reshape_as", "view_as"):
            return self._agreed(tensors[1:], depth + 1)
        return _moved(node, *self._agreed(tensors[:1], depth + 1))

    def _agreed(self, values: Iterable[tuple[str, fx.Node]], depth: int) -> _Dims:
        """Return what all values agree on, those of which nothing is known apart."""
        found = {self._dims(path, node, depth) for path, node in values if node.op != "get_attr"} - {(None, None)}
        dims, ranks = {dim for dim, _ in found}, {rank for _, rank in found if rank is not None}
        return dims.pop() if len(dims) == 1 else None, ranks.pop() if len(ranks) == 1 else None


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


def _of(module: nn.Module) -> int | None:
    name = type(module).__name__
    if getattr(module, "data_format", None) == "channels_first":  # Hugging Face's LayerNorm over images
        return 1
    if isinstance(module, _FIRST) or name.endswith(("Norm2d", "Conv2d")) or "NormAct2d" in name:
        return 1
    # Hugging Face's Conv1D is a linear layer.
    if isinstance(module, _LAST) or name.endswith(("Linear", "LayerNorm", "RMSNorm")) or name == "Conv1D":
        return -1
    return None
