"""A threshold that many tensors share: a histogram of their scores, its quantile, and the gate that applies it.

The histogram has one bin for each 1/32 of an octave of float32, the top bits of the number: the bit patterns of
floats that are not negative order as integers, so no range has to be chosen, and any keep ratio can be asked of it
later. Counting and applying wait for no device. Whose scores are counted, and when, is not known here.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from regimewrap import torch_private
from regimewrap.topk import plain, sampling
from regimewrap.topk.cpu import dispatch as cpu
from regimewrap.topk.op import (
    _empty_bits,
    _full,
    _gate,
    _gate_backward,
    _gives_full_budget,
    _relu,
    _save_for_gate,
    _write,
    check_dense_rows,
    check_keep_ratio,
    how_to_save,
)
from regimewrap.topk.register import is_recorded, operator
from regimewrap.topk.selection import Selection, check_gradient, without

#: How many of float32's low bits a bin leaves open; 5 bits of the significand remain.
SHIFT = 18
_INFINITY = 0x7F800000
#: From zero (and what is nearly zero: below 4e-40) to infinity, which has the last bin for itself. NaN has none.
BINS = (_INFINITY >> SHIFT) + 1
#: Rows are entries of the first dimension here.
_ENTRIES = Selection()


def count_scores(x: Tensor, counts: Tensor, *, dense_rows: Tensor | None = None, after_relu: bool = False) -> None:
    """Add the magnitudes of a tensor to a histogram, in place.

    Args:
        x: float16, bfloat16, float32 or float64; any shape and memory format. NaN is not counted.
        counts: int64, shape (BINS,), on the device of ``x``.
        dense_rows: as for ``topk_gate``; the entries that are kept in full are not counted.
        after_relu: count ``relu(x)`` instead.

    Recorded by compilers as an operator that changes ``counts``; under vmap all entries are counted.
    """
    x = x.detach()
    if type(x) is not Tensor or x.is_meta or is_recorded() or torch_private.has_functorch_transforms():
        _count_operator(x, counts, dense_rows, after_relu)
    else:
        _count(x, counts, dense_rows, after_relu)


def threshold_at(counts: Tensor, keep_ratio: float, relative_to: str = "all") -> Tensor:
    """Return the score that a share of what was counted reaches.

    Args:
        counts: int64, shape (BINS,).
        keep_ratio: the share, in (0, 1].
        relative_to: a share of "all" units, or of the "active" ones (those outside the first bin).

    Returns:
        0-d float32 tensor on the device of ``counts``; computed without waiting for it. Inside its bin the threshold is
        interpolated, as if scores were spread evenly, unless the bin holds more units than all bins above it: then its
        scores are taken for ties (a saturated or binary activation), and it is the lower end of the bin, so that all
        are kept. It is 0, which keeps everything, where the share reaches down to the zeros or nothing was counted.
    """
    if counts.is_cpu:
        return torch.tensor(_threshold_at(counts, keep_ratio, relative_to), dtype=torch.float32)
    return _threshold_on_device(counts, keep_ratio, relative_to)


def _threshold_at(counts: Tensor, keep_ratio: float, relative_to: str) -> float:
    reached = counts.cumsum(0)  # from below
    units = int(reached[-1].item())
    total = units - int(counts[0].item()) if relative_to == "active" else units
    wanted = max(total * keep_ratio, 1.0)
    place = int(torch.searchsorted(reached, units - math.ceil(wanted), right=True).item())
    if place == 0:
        return 0.0
    below, up_to = reached[place - 1 : place + 1].tolist()
    here, above = up_to - below, units - up_to
    share = 1.0 if here > above else (wanted - above) / here
    bits = (place << SHIFT) + int((1 - share) * (1 << SHIFT))
    return float(struct.unpack("<f", struct.pack("<I", min(bits, _INFINITY)))[0])


def _threshold_on_device(counts: Tensor, keep_ratio: float, relative_to: str) -> Tensor:
    # mps has no float64; 24 bits of a count are enough.
    number = torch.float32 if counts.device.type == "mps" else torch.float64
    reached = counts.flip(0).cumsum(0).flip(0)
    total = reached[0] - counts[0] if relative_to == "active" else reached[0]
    wanted = (total.to(number) * keep_ratio).clamp_min(1)
    place = ((reached >= wanted).sum() - 1).clamp_min(0)
    # Indexing by a 0-d tensor would fetch it from the device; gathering does not.
    here = counts.gather(0, place.view(1)).squeeze(0)
    above = reached.gather(0, place.view(1)).squeeze(0) - here
    share = torch.where(here > above, 1.0, (wanted - above) / here)
    bits = (place << SHIFT) + ((1 - share) * (1 << SHIFT)).to(torch.int64)
    return torch.where(place > 0, bits.clamp_max(_INFINITY), 0).to(torch.int32).view(torch.float32)


def threshold_gate(
    x: Tensor,
    keep_ratio: Tensor,
    threshold: Tensor,
    known: Tensor,
    *,
    dense_rows: Tensor | None = None,
    relative_to: str = "all",
    gradient: str = "masked",
    after_relu: bool = False,
) -> Tensor:
    """Return ``x`` with all units below a threshold set to zero.

    Args:
        x: float16, bfloat16, float32 or float64; any shape, device and memory format.
        keep_ratio: 0-d float64 tensor on the CPU, above 0. From 1 on the result is ``x``, bit for bit.
        threshold: 0-d float32 tensor on the device of ``x``; it is rounded to the dtype of ``x``.
        known: 0-d boolean tensor on the CPU: whether there is a threshold yet. Until then the units of a sample
            compete among themselves, as in scope "sample".
        dense_rows: as for ``topk_gate``: entries of the first dimension that are kept in full.
        relative_to: what ``keep_ratio`` is a share of, until then.
        gradient: "masked" passes it to kept units only, "straight_through" to all.
        after_relu: as for ``topk_gate``.

    Returns:
        Shape, dtype, device and memory format of ``x``. Units whose magnitude reaches the threshold stay, and NaN. At
        full budget, outside compilation, ``x`` itself (or ``relu(x)``); otherwise a new tensor.

    Raises:
        SelectionError: ``keep_ratio`` or ``gradient`` is not one of the above.
    """
    check_gradient(gradient)
    check_keep_ratio(keep_ratio)
    check_dense_rows(dense_rows)
    if _gives_full_budget(keep_ratio):
        return torch.relu(x) if after_relu else x
    x, score, saved = how_to_save(x, "magnitude", gradient, after_relu)
    y: Tensor = _apply(x, keep_ratio, dense_rows, threshold, known, relative_to, score, saved)[0]
    return y


def _count(x: Tensor, counts: Tensor, dense_rows: Tensor | None, after_relu: bool) -> None:
    full = _full(x, dense_rows, _ENTRIES)
    if x.numel() == 0 or full is None:
        return
    x = (without(x, *full) if full[1] > full[0] else x).float()
    if not (x.is_cpu and cpu.count(x, counts, after_relu, SHIFT)):
        counts += plain.histogram(x, after_relu, SHIFT, BINS)


_count_operator: Any = torch.library.custom_op("regimewrap::count_scores", _count, mutates_args=("counts",))


@_count_operator.register_fake  # type: ignore[untyped-decorator]
def _fake_count(x: Tensor, counts: Tensor, dense_rows: Tensor | None, after_relu: bool) -> None:
    del x, counts, dense_rows, after_relu


def _count_mapped(
    info: Any, in_dims: Any, x: Tensor, counts: Tensor, dense_rows: Tensor | None, after_relu: bool
) -> tuple[None, None]:
    del info
    if in_dims[0] is None:
        count_scores(x, counts, dense_rows=dense_rows, after_relu=after_relu)
        return None, None
    for entry in x.unbind(in_dims[0]):  # the rows of each are those of a tensor of its own
        count_scores(entry, counts, dense_rows=dense_rows, after_relu=after_relu)
    return None, None


_count_operator.register_vmap(_count_mapped)


def _threshold_gate(
    x: Tensor,
    keep_ratio: Tensor,
    dense_rows: Tensor | None,
    threshold: Tensor,
    known: Tensor,
    relative_to: str,
    score: str,
    saved: str,
) -> tuple[Tensor, Tensor]:
    """Return the gated tensor and the mask; ``score`` and ``saved`` as for ``topk_gate``'s operator."""
    if not known.item():
        return _gate(x, keep_ratio, dense_rows, "sample", 1, score, relative_to, "keep", 1.0, saved)
    y, bits = torch.empty_like(x), _empty_bits(x, saved)
    full = _full(x, dense_rows, _ENTRIES)
    if keep_ratio.item() >= 1.0 or x.numel() == 0 or full is None:
        return _relu(x) if score == "positive" else y.copy_(x), bits.fill_(0xFF)
    if not (x.is_cpu and cpu.cut(x, y, bits, threshold, score, full)):
        ranked = _relu(x) if score == "positive" else x
        kept = ~(ranked.abs() < threshold.to(x.dtype))  # NaN is not below anything
        if full[1] > full[0]:
            kept[full[0] : full[1]] = True
        _write(ranked, y, bits, kept)
    if sampling.ON:
        sampling.note(x, y, keep_ratio, dense_rows, score)
    return y, bits


def _fake_threshold_gate(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _empty_bits(x, arguments[-1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (_gate_backward(ctx, grad, None)[0], *[None] * 7)


_apply = operator("threshold_gate", _threshold_gate, _fake_threshold_gate, _save_for_gate, _backward)
