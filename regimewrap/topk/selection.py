"""What a selection may be asked for: the words, the count ``k``, and how a tensor falls into rows.

Everything that selects, slow or fast, checks its arguments here, so all of them refuse the same input with the same
words. Nothing here looks at a tensor's values.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from regimewrap.errors import SelectionError
from regimewrap.files import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SCOPES = ("sample", "position", "batch")
SCORES = ("magnitude", "value")
RELATIVE_TO = ("all", "active")
TIES = ("keep", "exact")
GRADIENTS = ("masked", "straight_through")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: For each dtype the integers that its bits are, and infinity among them: kernels rank these.
INTEGERS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0 << 48),
}


class Selection(NamedTuple):
    """What is ranked with what; the fields mean what :func:`regimewrap.topk.op.topk_gate` says."""

    scope: str = "sample"
    channel_dim: int = 1
    score: str = "magnitude"
    relative_to: str = "all"
    ties: str = "keep"


def check_selection(x: Tensor, selection: Selection, multiplier: float) -> None:
    """Refuse what no selection can work with.

    Raises:
        SelectionError: ``x`` is not a dense floating tensor of 16, 32 or 64 bits, a word is unknown, ``channel_dim`` is
            no dimension of ``x`` (scope "position" only) or ``multiplier`` is not a positive number.
    """
    if x.dtype not in DTYPES:
        raise SelectionError(
            f"a gate ranks float16, bfloat16, float32 or float64 values; got a tensor of {x.dtype}. "
            "Exclude this site, or convert its output first."
        )
    if x.layout is not torch.strided or x.is_nested:
        raise SelectionError(
            f"a gate needs a dense tensor; got layout {x.layout}{' (nested)' if x.is_nested else ''}. "
            "Call .to_dense() or .to_padded_tensor() first."
        )
    _require_word("scope", selection.scope, SCOPES)
    _require_word("score", selection.score, SCORES)
    _require_word("relative_to", selection.relative_to, RELATIVE_TO)
    _require_word("ties", selection.ties, TIES)
    if selection.scope == "position" and not -x.dim() <= selection.channel_dim < x.dim():
        raise SelectionError(
            f"channel_dim must name a dimension of the tensor; got {selection.channel_dim} for shape {tuple(x.shape)}. "
            'Set channel_dim, or use scope="sample".'
        )
    if not 0.0 < multiplier < math.inf:
        raise SelectionError(f"multiplier must be a positive number; got {multiplier!r}.")


def check_gradient(gradient: str) -> None:
    """Refuse an unknown way of passing the gradient.

    Raises:
        SelectionError: ``gradient`` is neither "masked" nor "straight_through".
    """
    _require_word("gradient", gradient, GRADIENTS)


def effective_ratio(keep_ratio: float, multiplier: float) -> float:
    """Return the share of units to keep, in (0, 1]; 1.0 means that nothing is cut, whatever is counted.

    Raises:
        SelectionError: ``keep_ratio`` is not a positive number.
    """
    if not keep_ratio > 0.0:
        raise SelectionError(f"keep_ratio must be a fraction in (0, 1]; got {keep_ratio!r}.")
    # Full budget is the unwrapped model at every site, also where a multiplier below 1 would cut.
    return 1.0 if keep_ratio >= 1.0 else min(1.0, keep_ratio * multiplier)


def units_kept(n: int, ratio: float) -> int:
    """Return k, the number of units kept out of ``n``; at least one."""
    return max(1, int(n * ratio))


def row_shape(shape: Sequence[int], selection: Selection) -> tuple[int, int]:
    """Return (rows, units in a row) of a tensor of this shape.

    A tensor without a second dimension has one unit per sample, which a gate always keeps; so has a 0-d tensor.
    """
    total = math.prod(shape)
    if selection.scope == "batch":
        return 1, total
    if selection.scope == "position":
        units = shape[selection.channel_dim]
        rest = list(shape)
        del rest[selection.channel_dim]
        return math.prod(rest), units
    return (shape[0] if len(shape) else 1), math.prod(shape[1:])


def full_rows(shape: Sequence[int], selection: Selection, full_share: float, update: int) -> tuple[int, int]:
    """Return (start, stop): the entries of the first dimension that keep all their units in this update.

    Of n entries these are m = floor((update + 1) * n * full_share) - floor(update * n * full_share), so that over many
    updates their share is ``full_share`` also where n is 1; the leading ones where ``update`` is even, the trailing
    ones where it is odd. Where the first dimension itself competes (scope "position"), or where there is none, the
    tensor counts as one entry.

    Args:
        shape: of the tensor.
        selection: what is ranked with what.
        full_share: in [0, 1).
        update: optimizer updates before this one; exact as long as its product with n stays below 2^53.
    """
    competes = not shape or (selection.scope == "position" and selection.channel_dim % len(shape) == 0)
    n = 1 if competes else shape[0]
    m = min(n, math.floor((update + 1) * n * full_share) - math.floor(update * n * full_share))
    if competes:
        return (0, shape[0] if shape else 1) if m else (0, 0)
    return (0, m) if update % 2 == 0 else (n - m, n)


def without(x: Tensor, start: int, stop: int) -> Tensor:
    """Return a view of ``x`` without the entries ``start`` to ``stop``, one end of its first dimension."""
    return x.narrow(0, stop, x.shape[0] - stop) if start == 0 else x.narrow(0, 0, start)


def is_outermost(y: Tensor) -> bool:
    """Whether the entries of the first dimension of a tensor without gaps lie one after the other in memory."""
    return all(y.shape[d] < 2 or y.stride(d) < y.stride(0) for d in range(1, y.dim()))


def memory_rows(y: Tensor, selection: Selection) -> tuple[int, int, int] | None:
    """Say where the rows of a tensor lie that fills its memory without gaps.

    Returns:
        How many blocks there are, how many units a row has, and how far apart these lie. A block of memory holds one
        row if they lie together, and as many rows as that distance otherwise. ``None`` where rows are scattered in
        another way, or where ties that are cut by index could not be cut by place.
    """
    return _memory_rows(y.shape, y.stride(), selection)


@functools.lru_cache(maxsize=256)
def _memory_rows(shape: Sequence[int], stride: Sequence[int], selection: Selection) -> tuple[int, int, int] | None:
    rows, units = row_shape(shape, selection)
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=stride.__getitem__, reverse=True)
    if selection.scope == "position":
        place = selection.channel_dim % len(shape)
        if units == 1 or order[-1] == place:
            return rows, units, 1
        return rows // stride[place], units, stride[place]
    if selection.scope == "sample" and 0 in order and order[0] != 0:
        return None
    if selection.ties == "exact" and order != sorted(order):
        return None
    return rows, units, 1


def _require_word(name: str, value: str, words: Sequence[str]) -> None:
    if value in words:
        return
    raise SelectionError(f"{name} must be one of {', '.join(words)}; got {value!r}.{nearest(value, words)}")
