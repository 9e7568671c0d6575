"""What the CPU's kernels do to each element by itself: keep, cut, count, and pack what was kept into bits.

Flat integer views as in ``kernels.py``, which holds what ranks elements with each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regimewrap.topk.cpu.search import POSITIVE, compiled, key

int32: Any = np.int32
int64: Any = np.int64
uint32: Any = np.uint32
uint64: Any = np.uint64

#: Elements whose bins are noted before they are counted, for the same reason as the next.
_NOTED = 1024
#: Bytes of a mask unpacked at once, so that they stay in the nearest cache.
_BLOCK = 512


@compiled
def keep_all(x: Any, y: Any, mask: Any, score: int, infinity: Any, top: Any) -> None:
    """Copy ``x``, or what ``torch.relu`` makes of it where ``score`` is POSITIVE, and note that all of it was kept."""
    if score == POSITIVE:
        for i in range(x.size):
            magnitude = x[i] & top
            # A negative zero stays, and NaN.
            y[i] = 0 if x[i] < 0 and magnitude > 0 and magnitude <= infinity else x[i]
    else:
        y[:] = x
    mask[:] = 1


@compiled
def pack(mask: Any, bits: Any) -> None:
    """Pack bytes of 0 and 1 into bits, lowest first."""
    words = mask.view(np.uint64)
    for i in range(bits.size):
        # The product gathers the lowest bit of each byte in the highest byte.
        bits[i] = (words[i] * uint64(0x0102040810204080)) >> uint64(56)


@compiled
def unpack(bits: Any, mask: Any) -> None:
    """Undo ``_pack``, except that what is set may be any byte but 0."""
    words = mask.view(np.uint64)
    for i in range(bits.size):
        # Eight copies, each with one bit left; adding carries that bit, wherever it is, into the highest place.
        each = uint64(bits[i]) * uint64(0x0101010101010101) & uint64(0x8040201008040201)
        words[i] = (each + uint64(0x00406070787C7E7F)) & uint64(0x8080808080808080)


@compiled
def _cut(x: Any, y: Any, mask: Any, pivot: Any, score: int, infinity: Any, top: Any) -> None:
    """Do what ``cut`` says; ``mask`` is a byte for each element, or empty."""
    if mask.size:
        for i in range(x.size):
            kept = key(x[i], score, infinity, top) >= pivot
            y[i] = x[i] if kept else 0
            mask[i] = kept
    else:
        for i in range(x.size):
            y[i] = x[i] if key(x[i], score, infinity, top) >= pivot else 0


@compiled
def cut(x: Any, y: Any, bits: Any, start: int, stop: int, full: Any, pivot: Any, how: Any) -> None:
    """Copy the elements of ``x`` whose key reaches ``pivot``, and zero the others.

    Args:
        x: bits of the input, flat.
        y: bits of the output, flat; same dtype.
        bits: which elements were kept, packed; empty where nothing is to be noted.
        start: the first element; a multiple of 8.
        stop: one past the last; a multiple of 8, or the end.
        full: the first element that is kept whatever its key, and one past the last of these.
        pivot: bits of the threshold, at most infinity's.
        how: MAGNITUDE, or POSITIVE for the magnitude after a ReLU, which is then applied; the bits of infinity, and the
            largest integer of that dtype.
    """
    full_from, full_to = full
    score, infinity, top = how
    if score == POSITIVE:
        pivot = max(pivot, x.dtype.type(1))
    mask = np.zeros(8 * _BLOCK if bits.size else 0, np.uint8)
    for first in range(start, stop, 8 * _BLOCK):
        last = min(first + 8 * _BLOCK, stop)
        source, result, noted = x[first:last], y[first:last], mask[: last - first]
        begin = min(max(full_from - first, 0), last - first)
        end = min(max(full_to - first, begin), last - first)
        _cut(source[:begin], result[:begin], noted[:begin], pivot, score, infinity, top)
        keep_all(source[begin:end], result[begin:end], noted[begin:end], score, infinity, top)
        _cut(source[end:], result[end:], noted[end:], pivot, score, infinity, top)
        if bits.size:
            mask[last - first :] = 0
            pack(mask, bits[first // 8 : (last + 7) // 8])


@compiled
def count(x: Any, start: int, stop: int, how: Any, shift: int) -> Any:
    """Return how many elements, NaN apart, have which top bits.

    Args:
        x: bits of float32 numbers, flat.
        start: the first element.
        stop: one past the last; fewer than 2^32 on.
        how: as for ``cut``.
        shift: low bits that are not looked at.
    """
    score, infinity, top = how
    bins = (infinity >> shift) + 1
    # Four histograms, so that equal neighbours (zeros, often) do not wait for each other's sum.
    counts = np.zeros((4, bins + 1), np.uint32)
    first, second, third, fourth = counts[0], counts[1], counts[2], counts[3]
    places = np.empty(_NOTED, np.uint16)
    for begin in range(start, stop, _NOTED):
        source = x[begin : min(begin + _NOTED, stop)]
        for i in range(source.size):
            magnitude = key(source[i], score, infinity, top)
            places[i] = (magnitude >> shift) + int32(magnitude > infinity)  # NaN has a place of its own
        even = source.size // 4 * 4
        for i in range(0, even, 4):
            first[places[i]] += uint32(1)
            second[places[i + 1]] += uint32(1)
            third[places[i + 2]] += uint32(1)
            fourth[places[i + 3]] += uint32(1)
        for i in range(even, source.size):
            first[places[i]] += uint32(1)
    return counts.sum(0)[:bins].astype(np.int64)


@compiled
def mask_gradient(grad: Any, bits: Any, out: Any, start: int, stop: int) -> None:
    """Copy the elements of ``grad`` whose bit is set, and zero the others, for the bytes ``start`` to ``stop``."""
    mask = np.empty(8 * _BLOCK, np.uint8)
    for first in range(start, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        unpack(bits[first:last], mask)
        source, result = grad[8 * first : 8 * last], out[8 * first : 8 * last]
        for i in range(source.size):
            result[i] = source[i] if mask[i] else 0
