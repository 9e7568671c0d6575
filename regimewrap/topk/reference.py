"""Which units are kept, written to be read: one row at a time, in double precision, with a full sort.

The meaning of a gate is what this file says; every fast kernel is compared with it. It must stay slow and obvious, and
nothing but tests and doubt should call it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regimewrap.topk.selection import Selection, check_selection, effective_ratio, row_shape, units_kept


def kept(
    x: Tensor,
    keep_ratio: float,
    *,
    scope: str = "sample",
    channel_dim: int = 1,
    score: str = "magnitude",
    relative_to: str = "all",
    ties: str = "keep",
    multiplier: float = 1.0,
    full_share: float = 0.0,
    update: int = 0,
) -> Tensor:
    """Return which units of ``x`` a gate keeps.

    Args:
        x: floating point, any shape and memory format.
        keep_ratio: share of a row's units to keep, above 0; from 1 on everything is kept, whatever the multiplier.
        scope: what is ranked together. "sample": all units of one entry of the first dimension; a tensor of one
            dimension, or of none, has one unit per sample, and keeps it. "position": the channels of one position.
            "batch": the whole tensor.
        channel_dim: the dimension ranked by scope "position"; may be negative.
        score: rank by "magnitude" or by signed "value".
        relative_to: count ``n`` over "all" units of the row, or over its "active" (non-zero) ones.
        ties: units that equal the smallest kept score are all kept ("keep"), or only as many as fit, those with the
            lowest index in the row first ("exact").
        multiplier: of ``keep_ratio``, for this tensor only; the product is cut at 1.
        full_share: the share of the entries of the first dimension that keep all their units and do not compete, over
            many updates; see ``in_full``.
        update: optimizer updates before this one.

    Returns:
        Boolean mask, shape of ``x``. A row of n units keeps the k = max(1, int(n * keep_ratio)) largest. NaN ranks
        above every number and is kept always, also where there are more than k. Zeros rank like any other value, so a
        row with fewer than k non-zero units keeps all of them and (ties kept) all zeros.

    Raises:
        SelectionError: an argument is not one of the above.
    """
    selection = Selection(scope, channel_dim, score, relative_to, ties)
    check_selection(x, selection, multiplier)
    ratio = effective_ratio(keep_ratio, multiplier)
    if ratio == 1.0 or x.numel() == 0:
        return torch.ones_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
    if full_share > 0.0:
        # Where the first dimension itself competes, or there is none, the tensor is one entry.
        whole = x.dim() == 0 or (scope == "position" and channel_dim % x.dim() == 0)
        full = in_full(1 if whole else x.shape[0], full_share, update)
        if not any(full):
            return kept(x, keep_ratio, **selection._asdict(), multiplier=multiplier)
        mask = torch.ones_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
        if not all(full):
            others = torch.tensor([not each for each in full])
            mask[others] = kept(x[others], keep_ratio, **selection._asdict(), multiplier=multiplier)
        return mask
    last = x.detach().movedim(channel_dim, -1) if scope == "position" else x.detach()
    rows = last.reshape(row_shape(x.shape, selection))
    mask = torch.stack([_kept_in_row(row.double(), ratio, selection) for row in rows]).reshape(last.shape)
    return mask.movedim(-1, channel_dim) if scope == "position" else mask


def in_full(n: int, full_share: float, update: int) -> list[bool]:
    """Say of each of n entries whether it keeps all its units in this update.

    By the end of an update as many entries have been in full as the share of all entries so far comes to, rounded down.
    They are the first ones of the tensor in even updates (0, 2, ...), and the last ones in odd updates.
    """
    m = math.floor((update + 1) * n * full_share) - math.floor(update * n * full_share)
    return [place < m if update % 2 == 0 else place >= n - m for place in range(n)]


def reaches(x: Tensor, threshold: float, *, full_share: float = 0.0, update: int = 0) -> Tensor:
    """Return which units of ``x`` a shared threshold keeps: those whose magnitude reaches it, and NaN.

    Args:
        x: floating point, any shape and memory format.
        threshold: rounded to the dtype of ``x``.
        full_share: as for ``kept``.
        update: as for ``kept``.
    """
    rounded = float(torch.tensor(threshold, dtype=x.dtype))
    mask = (x.detach().double().abs() >= rounded) | x.detach().isnan()
    full = torch.tensor(in_full(x.shape[0] if x.dim() else 1, full_share, update), dtype=torch.bool)
    return mask | full.view(-1, *[1] * (x.dim() - 1)) if x.dim() else mask | full.any()


def histogram(x: Tensor) -> dict[float, int]:
    """Return how many units, NaN apart, have a magnitude in which bin, by the bin's lower end.

    An octave has 32 bins of equal width; zero and what is nearly zero share one.
    """
    counts: dict[float, int] = {}
    for value in x.detach().float().abs().flatten().tolist():
        if math.isnan(value):
            continue
        low = value
        if math.isfinite(value):
            exponent = max(math.frexp(value)[1], -125)  # below the smallest normal number bins grow no narrower
            width = math.ldexp(1, exponent - 6)
            low = math.floor(value / width) * width
        counts[low] = counts.get(low, 0) + 1
    return counts


def _kept_in_row(row: Tensor, ratio: float, selection: Selection) -> Tensor:
    n = int((row != 0).sum()) if selection.relative_to == "active" else row.numel()
    k = units_kept(n, ratio)
    score = row.abs() if selection.score == "magnitude" else row
    nan = score.isnan()
    room = k - int(nan.sum())
    if room <= 0:
        return nan
    threshold = score[~nan].sort(descending=True).values[room - 1]
    if selection.ties == "keep":
        return nan | (score >= threshold)
    tied = score == threshold
    free = room - int((score > threshold).sum())
    return nan | (score > threshold) | (tied & (tied.cumsum(0) <= free))
