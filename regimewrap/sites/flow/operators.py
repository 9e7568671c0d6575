"""The one table of operators: what each does to a value that is followed, by its name.

``passes``: the result is the same branch of the network, reshaped, mixed or scaled. ``keeps``: every dimension stays at
its place. ``pools``: one value is left for all positions. ``reads``: a size or a type is read, no values.
"""

from __future__ import annotations

from typing import Any

from torch import fx

GATES = ("sigmoid", "tanh", "softmax")

_PASSES = """
flatten reshape view permute transpose swapaxes squeeze unsqueeze expand_as expand contiguous mean sum float to
type_as dropout dropout1d dropout2d conv1d conv2d conv3d linear interpolate getattr getitem unflatten clamp
batch_norm layer_norm chunk split unbind repeat truediv div neg normalize rearrange reduce where masked_fill
masked_fill_ movedim T mT clone view_as reshape_as alpha_dropout feature_dropout nan_to_num setitem tile either
half bfloat16 double masked_softmax index_select gather data pad"""
_KEEPS = """
float half double bfloat16 to type_as contiguous clone dropout dropout1d dropout2d chunk split getitem add sub
mul truediv div neg iadd isub imul itruediv clamp unbind where pad masked_fill masked_fill_ either detach sqrt
rsqrt abs exp log square pow normalize interpolate roll flip cat concat lerp maximum minimum tensor_split
batch_norm layer_norm data"""
PRODUCTS = frozenset(["mul", "imul", "mul_", "multiply"])
SUMS = frozenset(["add", "iadd", "sub", "isub", "add_", "sub_"])
MATRIX_PRODUCTS = frozenset(["matmul", "imatmul", "bmm", "einsum", "mm"])
#: Reductions to one number, where no dimension is named.
TOTALS = frozenset(["mean", "sum", "norm", "nanmean", "nansum"])
_LOSSES = """
mse_loss l1_loss smooth_l1_loss huber_loss cross_entropy binary_cross_entropy nll_loss kl_div
binary_cross_entropy_with_logits poisson_nll_loss"""
_REDUCES = """
mean amax amin max std var std_mean var_mean nanmean median logsumexp"""
_WINDOWS = frozenset(["avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d"])
_SIZES = """
shape device dtype ndim size dim numel is_cuda requires_grad __len__ len get_device full_like zeros_like
ones_like empty_like new_zeros new_ones new_full new_empty new_tensor"""

PASSES, KEEPS, LOSSES = (frozenset(words.split()) for words in (_PASSES, _KEEPS, _LOSSES))
_REDUCTIONS, _READS = frozenset(_REDUCES.split()), frozenset(_SIZES.split())


def name_of(node: fx.Node) -> str:
    """Return the name of the function, method or attribute that a node stands for."""
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1])
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def passes(node: fx.Node) -> bool:
    """Say whether a function's or method's result is the same branch of the network as what it is given."""
    return node.op in ("call_method", "call_function") and name_of(node) in PASSES


def reads_shape(node: fx.Node) -> bool:
    """Say whether a node reads a tensor's size or type, not its values."""
    return node.op in ("call_method", "call_function") and name_of(node) in _READS


def totals(node: fx.Node) -> bool:
    """Say whether a function or method leaves one number of all values, as a loss does."""
    name, rest = name_of(node), [*node.args[1:], *node.kwargs.values()]
    return (
        name in LOSSES
        or (name in TOTALS and not rest)
        or (name == "norm" and len(rest) < 2 and "dim" not in node.kwargs)
    )


def pools(node: fx.Node) -> bool:
    """Say whether a function or method call leaves one value for all positions."""
    name = name_of(node)
    rest = [*node.args[1:], *node.kwargs.values()]
    if name in _REDUCTIONS:
        # Over dimension 0 it averages the entries of a list; with a second tensor, max is the larger of two.
        return rest[:1] not in ([0], [(0,)]) and not any(isinstance(each, fx.Node) for each in rest)
    if name == "sum":
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
        axes = dims if isinstance(dims, tuple | list) else (dims,)
        return bool(axes) and all(isinstance(axis, int) and axis not in (0, 1) for axis in axes)
    if name == "reduce":  # einops: 'b c h w -> b c'
        return len(node.args) > 2 and node.args[2] in ("mean", "max", "min")
    if name.startswith("adaptive_"):
        return is_one(node.kwargs.get("output_size", rest[0] if rest else None))
    if name in _WINDOWS:
        return any(isinstance(each, fx.Node) or _has_node(each) for each in rest[:1])  # a window as large as the input
    if name in ("view", "reshape"):
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
        return len(shape) > 3 and tuple(shape[-2:]) == (1, 1)
    return False


def is_one(size: object) -> bool:
    """Say whether a size of an adaptive pool means one position."""
    return all(each == 1 for each in size) if isinstance(size, tuple | list) else size == 1


def _has_node(argument: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return bool(found)
