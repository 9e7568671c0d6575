"""The selection in plain torch operations: any device, any dtype, no compiler.

What runs where no kernel does, and what a kernel falls back to. It must keep exactly what ``reference.py`` keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regimewrap.topk.selection import Selection, row_shape, units_kept, without


def kept(x: Tensor, ratio: float, selection: Selection, full: tuple[int, int] = (0, 0)) -> Tensor:
    """Return the mask of kept units.

    Args:
        x: floating point, at least one element.
        ratio: effective keep ratio, in (0, 1).
        selection: what is ranked with what.
        full: the entries of the first dimension that keep all their units, and do not compete; not all of them.

    Returns:
        Boolean, shape of ``x``; strides are unspecified.
    """
    start, stop = full
    if stop > start:
        mask = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        without(mask, start, stop).copy_(kept(without(x, start, stop), ratio, selection))
        return mask
    last = x.movedim(selection.channel_dim, -1) if selection.scope == "position" else x
    rows = last.reshape(row_shape(x.shape, selection))
    score = rows.abs() if selection.score == "magnitude" else rows
    threshold, k = _thresholds(score, ratio, selection)
    nan = score.isnan()
    if selection.ties == "keep":
        mask = (score >= threshold) | nan
    else:
        above = (score > threshold) | nan
        tied = score == threshold
        mask = above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    mask = mask.reshape(last.shape)
    return mask.movedim(-1, selection.channel_dim) if selection.scope == "position" else mask


def _thresholds(score: Tensor, ratio: float, selection: Selection) -> tuple[Tensor, Tensor | int]:
    """Return the k-th largest score of each row, shape (rows, 1), and k; NaN where k or more scores are NaN."""
    if selection.relative_to == "active":
        k = ((score != 0).sum(-1, keepdim=True).double() * ratio).long().clamp_min(1)
        return score.sort(dim=-1, descending=True).values.gather(-1, k - 1), k
    units = units_kept(score.shape[-1], ratio)
    # topk ranks NaN first. Unsorted, it took 0.85 of kthvalue's time on CPU, and kthvalue is refused on CUDA where
    # deterministic algorithms are demanded.
    largest = score.topk(units, dim=-1, sorted=False).values
    nan = largest.isnan()
    lowest = largest.masked_fill(nan, math.inf).amin(-1, keepdim=True)
    return lowest.masked_fill(nan.all(-1, keepdim=True), math.nan), units


def histogram(x: Tensor, after_relu: bool, shift: int, bins: int) -> Tensor:
    """Count magnitudes by the top bits of their floats.

    Args:
        x: float32, at least one element.
        after_relu: count ``relu(x)`` instead.
        shift: low bits that a bin leaves open.
        bins: from zero to infinity.

    Returns:
        Integers, shape (bins,). NaN is not counted.
    """
    bits = (torch.relu(x) if after_relu else x).view(torch.int32) & 0x7FFFFFFF
    places = torch.where(bits > 0x7F800000, bins, bits >> shift).flatten()
    if x.is_cuda:
        # bincount would fetch the largest place from the device first; histc leaves out what is beyond its range.
        return places.histc(bins, 0, bins - 1)
    return places.bincount(minlength=bins + 1)[:bins]


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a flat boolean tensor into bytes, lowest bit first; the last byte is filled up with zeros."""
    words = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(torch.int64)
    # The product gathers the lowest bit of each byte in the highest byte.
    return (words * 0x0102040810204080 >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """Return the first ``n`` bits as a flat boolean tensor."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).view(torch.bool).flatten()[:n]
