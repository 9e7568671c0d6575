"""The selection on CPUs, compiled by numba; imported only when a large enough tensor asks for it.

Floats of one sign order like the integers of the same bits. So each row becomes integers that order like its scores,
written into the output, which serves as scratch; a threshold is found by counting how many are at least as large as a
guess; and the output is overwritten with what is kept. Counting is one vector instruction or two for each 64 bytes, so
that a dozen passes over a row in cache cost less than one pass that builds a histogram.

Everything here works on flat integer views and knows nothing of torch. It must keep exactly what ``reference.py``
keeps. Types are numba's to infer, from the dtype of the arrays; to the type checker they are ``Any``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

if getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("numba's compiler is switched off by NUMBA_DISABLE_JIT")

int32: Any = np.int32
int64: Any = np.int64
uint32: Any = np.uint32
uint64: Any = np.uint64
float64: Any = np.float64

# How a unit is scored; ``cpu`` translates the words.
MAGNITUDE, VALUE, POSITIVE = 0, 1, 2

#: Rows at least this long are probed by a sample before they are counted in full.
_SAMPLED_FROM = 4096
_SAMPLE = 1024
#: Elements whose bins are noted before they are counted, for the same reason as the next.
_NOTED = 1024
#: Bytes of a mask unpacked at once, so that they stay in the nearest cache.
_BLOCK = 512


def _compiled(function: Any) -> Any:
    # Without nogil the threads that share the rows would wait for each other.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep the result: compile in each process
        return numba.njit(**options)(function)


@_compiled
def _key(b: Any, score: int, infinity: Any, top: Any) -> Any:
    """Map the bits of a float to an integer that orders like its score; every NaN is one above infinity."""
    magnitude = b & top
    if magnitude > infinity:
        return infinity + 1
    if score == MAGNITUDE or b >= 0:
        return magnitude
    return -magnitude if score == VALUE else b & 0


@_compiled
def _count(keys: Any, pivot: Any) -> Any:
    """Count the keys that are at least ``pivot``."""
    # 32-bit counters fill vectors twice as densely as 64-bit ones; longer rows than they count do not come here.
    count = int32(0)
    for i in range(keys.size):
        count = int32(count + int32(keys[i] >= pivot))
    return int64(count)


@_compiled
def _survey(keys: Any) -> Any:
    """Return the smallest key, the largest, and how many are positive."""
    least, most = keys[0], keys[0]
    positive = int32(0)
    for i in range(keys.size):
        least, most = min(least, keys[i]), max(most, keys[i])
        positive = int32(positive + int32(keys[i] > 0))
    return int64(least), int64(most), int64(positive)


@_compiled
def _nearest(keys: Any, low: Any, high: Any) -> Any:
    """Return the smallest key that is at least ``low`` and the largest below ``high``."""
    above, below = high, low
    for i in range(keys.size):
        key = keys[i]
        above = min(above, key if key >= low else high)
        below = max(below, key if key < high else low)
    return above, below


@_compiled
def _narrow(keys: Any, k: Any, low: Any, at_low: Any, high: Any, at_high: Any, guess: Any, density: float) -> Any:
    """Find a threshold that k keys reach, or the one key that ties across the k-th place.

    Args:
        keys: the scores, as integers.
        k: how many to keep.
        low: a pivot that ``at_low`` >= k keys reach.
        at_low: that count.
        high: a pivot above it that ``at_high`` < k keys reach.
        at_high: that count.
        guess: the first pivot to try, between the two.
        density: keys per unit of pivot near the guess; 0 where it is not known.

    Returns:
        The threshold, how many keys reach it, and how many exceed it (meaningful only where more than k reach it).
    """
    as_key = keys.dtype.type
    pivot, last, at_last = guess, int64(0), int64(-1)
    tries = 0
    while at_low != k and high - low > 1:
        tries += 1
        if tries % 5 == 0:
            # Ties can leave a wide gap without a key; and halving bounds the number of passes on any data.
            above, below = _nearest(keys, as_key(low), as_key(high))
            low, high = int64(above), int64(below) + 1
            if high - low <= 1:
                break
            pivot = low + (high - low) // 2
        count = _count(keys, as_key(pivot))
        if count >= k:
            low, at_low = pivot, count
        else:
            high, at_high = pivot, count
        if at_last >= 0 and count != at_last:
            density = float64(at_last - count) / float64(pivot - last)
        last, at_last = pivot, count
        following = low
        if density > 0.0:
            following = pivot + int64((count - k) / density)
        if not low < following < high:
            share = (at_low - k + 0.5) / (at_low - at_high)
            following = min(max(low + int64((high - low) * share), low + 1), high - 1)
        pivot = following
    return low, at_low, at_high


@_compiled
def _threshold(keys: Any, ratio: float, active: bool, signed: bool, sample: Any) -> Any:
    """Return k, the threshold of one row, how many keys reach it, and how many exceed it."""
    n = keys.size
    as_key = keys.dtype.type
    least, most, positive = _survey(keys)
    total = n
    if active:
        total = positive + n - _count(keys, as_key(0)) if signed else positive
    k = max(1, int64(float64(total) * ratio))
    if k <= positive:
        low, at_low, high, at_high = max(least, 1), positive, most + 1, 0
    elif signed:
        low, at_low, high, at_high = least, n, 1, positive
    else:
        return k, 0, n, positive
    if at_low == k or high - low <= 1:
        return k, low, at_low, at_high
    share = (at_low - k + 0.5) / (at_low - at_high)
    guess = min(max(low + int64((high - low) * share), low + 1), high - 1)
    density = 0.0
    if n >= _SAMPLED_FROM:
        sample = sample[: min(n // 32, sample.size)]
        # An odd stride, lest all of the sample lie in one channel.
        step = n // sample.size | 1
        place = 0
        for i in range(sample.size):
            sample[i] = keys[place]
            place += step
            if place >= n:
                place -= n
        scale = float64(sample.size) / float64(n)
        rank = int64(k * scale) + 1
        spread = int64(2.0 * np.sqrt(rank * (1.0 - k / n))) + 1
        left, at_left, at_high_left = low, _count(sample, as_key(low)), _count(sample, as_key(high))
        if rank - spread > at_high_left and rank < at_left:
            if rank + spread < at_left:
                left, at_left, _ = _narrow(sample, rank + spread, low, at_left, high, at_high_left, guess, 0.0)
            right, at_right, _ = _narrow(sample, rank - spread, left, at_left, high, at_high_left, left + 1, 0.0)
            if right > left:
                density = float64(at_left - at_right) / scale / float64(right - left)
                guess = min(max(left + (right - left) // 2, low + 1), high - 1)
    low, at_low, at_high = _narrow(keys, k, low, at_low, high, at_high, guess, density)
    return k, low, at_low, at_high


@_compiled
def _last_tie(keys: Any, threshold: Any, room: Any) -> Any:
    """Return the index of the last of the ``room`` first keys that equal the threshold."""
    for i in range(keys.size):
        if keys[i] == threshold:
            room -= 1
            if room == 0:
                return i
    return keys.size


@_compiled
def _write(x: Any, y: Any, threshold: Any) -> None:
    """Overwrite the keys in ``y`` with the units of ``x`` that reach the threshold, and zero."""
    for i in range(x.size):
        y[i] = x[i] if y[i] >= threshold else 0


@_compiled
def _write_with_mask(x: Any, y: Any, threshold: Any, mask: Any) -> None:
    """Do the same, and note what was kept."""
    for i in range(x.size):
        kept = y[i] >= threshold
        y[i] = x[i] if kept else 0
        mask[i] = kept


@_compiled
def _write_each(x: Any, y: Any, thresholds: Any) -> None:
    """Like ``_write``, with a threshold for each unit."""
    for i in range(x.size):
        y[i] = x[i] if y[i] >= thresholds[i] else 0


@_compiled
def _write_each_with_mask(x: Any, y: Any, thresholds: Any, mask: Any) -> None:
    """Like ``_write_with_mask``, with a threshold for each unit."""
    for i in range(x.size):
        kept = y[i] >= thresholds[i]
        y[i] = x[i] if kept else 0
        mask[i] = kept


@_compiled
def _pack(mask: Any, bits: Any) -> None:
    """Pack bytes of 0 and 1 into bits, lowest first."""
    words = mask.view(np.uint64)
    for i in range(bits.size):
        # The product gathers the lowest bit of each byte in the highest byte.
        bits[i] = (words[i] * uint64(0x0102040810204080)) >> uint64(56)


@_compiled
def _unpack(bits: Any, mask: Any) -> None:
    """Undo ``_pack``, except that what is set may be any byte but 0."""
    words = mask.view(np.uint64)
    for i in range(bits.size):
        # Eight copies, each with one bit left; adding carries that bit, wherever it is, into the highest place.
        each = uint64(bits[i]) * uint64(0x0101010101010101) & uint64(0x8040201008040201)
        words[i] = (each + uint64(0x00406070787C7E7F)) & uint64(0x8080808080808080)


@_compiled
def gate_rows(
    x: Any,
    y: Any,
    bits: Any,
    start: int,
    stop: int,
    units: int,
    ratio: float,
    active: bool,
    exact: bool,
    score: int,
    infinity: Any,
    top: Any,
) -> None:
    """Gate rows ``start`` to ``stop`` whose units are neighbours in memory.

    Args:
        x: bits of the input, flat.
        y: bits of the output, flat; same dtype.
        bits: which units were kept, packed over the whole tensor; empty where nobody asks.
        start: the first row; a multiple of 8 where bits are wanted and rows do not fill bytes.
        stop: one past the last row.
        units: in a row.
        ratio: effective keep ratio, in (0, 1).
        active: whether k is a share of the non-zero units only.
        exact: whether ties are cut, lowest index first.
        score: MAGNITUDE, VALUE, or POSITIVE for the magnitude after a ReLU, which is then applied.
        infinity: bits of infinity, in the dtype of ``x``.
        top: the largest integer of that dtype.
    """
    sample = np.empty(_SAMPLE, x.dtype)
    together = 1 if units % 8 == 0 else 8
    mask = np.zeros((together * units + 7) // 8 * 8 if bits.size else 0, np.uint8)
    for first in range(start, stop, together):
        last = min(first + together, stop)
        for row in range(first, last):
            source, keys = x[row * units : (row + 1) * units], y[row * units : (row + 1) * units]
            for i in range(units):
                keys[i] = _key(source[i], score, infinity, top)
            k, threshold, reached, exceeded = _threshold(keys, ratio, active, score == VALUE, sample)
            if score == POSITIVE:
                threshold = max(threshold, 1)
            end = units
            if exact and reached > k and threshold <= infinity:
                end = _last_tie(keys, threshold, k - exceeded) + 1
            pivot = x.dtype.type(threshold)
            if bits.size:
                noted = mask[(row - first) * units : (row - first + 1) * units]
                _write_with_mask(source[:end], keys[:end], pivot, noted[:end])
                if end < units:
                    _write_with_mask(source[end:], keys[end:], x.dtype.type(threshold + 1), noted[end:])
            else:
                _write(source[:end], keys[:end], pivot)
                if end < units:
                    _write(source[end:], keys[end:], x.dtype.type(threshold + 1))
        if bits.size:
            mask[(last - first) * units :] = 0
            _pack(mask, bits[first * units // 8 : (last * units + 7) // 8])


@_compiled
def gate_positions(
    x: Any,
    y: Any,
    bits: Any,
    start: int,
    stop: int,
    units: int,
    ratio: float,
    active: bool,
    exact: bool,
    score: int,
    infinity: Any,
    top: Any,
    inner: int,
) -> None:
    """Gate positions whose units lie ``inner`` elements apart, as channels of an image do; see ``gate_rows``.

    ``start`` and ``stop`` count blocks of ``units`` times ``inner`` elements.
    """
    block = units * inner
    tile = max(16, min(64, (1 << 15) // units))
    # Rows one cache line longer than they need be: at a power of two they would all compete for the same lines.
    keys = np.empty((tile, units + 16), x.dtype)
    thresholds = np.empty(tile, x.dtype)
    ends = np.empty(tile, np.int64)
    sample = np.empty(_SAMPLE, x.dtype)
    together = 1 if block % 8 == 0 else 8
    mask = np.zeros((together * block + 7) // 8 * 8 if bits.size else 0, np.uint8)
    for first in range(start, stop, together):
        last = min(first + together, stop)
        for outer in range(first, last):
            source, result = x[outer * block : (outer + 1) * block], y[outer * block : (outer + 1) * block]
            noted = mask[(outer - first) * block : (outer - first + 1) * block]
            for i in range(block):
                result[i] = _key(source[i], score, infinity, top)
            for left in range(0, inner, tile):
                width = min(tile, inner - left)
                for unit in range(units):
                    line = result[unit * inner + left : unit * inner + left + width]
                    for j in range(width):
                        keys[j, unit] = line[j]
                for j in range(width):
                    row = keys[j, :units]
                    k, threshold, reached, exceeded = _threshold(row, ratio, active, score == VALUE, sample)
                    if score == POSITIVE:
                        threshold = max(threshold, 1)
                    ends[j] = units
                    if exact and reached > k and threshold <= infinity:
                        ends[j] = _last_tie(row, threshold, k - exceeded) + 1
                    thresholds[j] = threshold
                for unit in range(units):
                    line = slice(unit * inner + left, unit * inner + left + width)
                    if bits.size:
                        _write_each_with_mask(source[line], result[line], thresholds, noted[line])
                    else:
                        _write_each(source[line], result[line], thresholds)
                    if exact:
                        for j in range(width):
                            if ends[j] == unit + 1 < units:
                                thresholds[j] += 1
        if bits.size:
            mask[(last - first) * block :] = 0
            _pack(mask, bits[first * block // 8 : (last * block + 7) // 8])


@_compiled
def cut(x: Any, y: Any, bits: Any, start: int, stop: int, pivot: Any, score: int, infinity: Any, top: Any) -> None:
    """Copy the elements of ``x`` whose key reaches ``pivot``, and zero the others.

    Args:
        x: bits of the input, flat.
        y: bits of the output, flat; same dtype.
        bits: which elements were kept, packed; empty where nobody asks.
        start: the first element; a multiple of 8.
        stop: one past the last; a multiple of 8, or the end.
        pivot: bits of the threshold, at most infinity's.
        score: MAGNITUDE, or POSITIVE for the magnitude after a ReLU, which is then applied.
        infinity: bits of infinity, in the dtype of ``x``.
        top: the largest integer of that dtype.
    """
    if score == POSITIVE:
        pivot = max(pivot, x.dtype.type(1))
    mask = np.zeros(8 * _BLOCK if bits.size else 0, np.uint8)
    for first in range(start, stop, 8 * _BLOCK):
        last = min(first + 8 * _BLOCK, stop)
        source, result = x[first:last], y[first:last]
        if bits.size:
            mask[last - first :] = 0
            for i in range(source.size):
                kept = _key(source[i], score, infinity, top) >= pivot
                result[i] = source[i] if kept else 0
                mask[i] = kept
            _pack(mask, bits[first // 8 : (last + 7) // 8])
        else:
            for i in range(source.size):
                result[i] = source[i] if _key(source[i], score, infinity, top) >= pivot else 0


@_compiled
def count(x: Any, start: int, stop: int, score: int, infinity: Any, top: Any, shift: int) -> Any:
    """Return how many elements, NaN apart, have which top bits.

    Args:
        x: bits of float32 numbers, flat.
        start: the first element.
        stop: one past the last; fewer than 2^32 on.
        score: MAGNITUDE, or POSITIVE for the magnitude after a ReLU.
        infinity: bits of infinity.
        top: the largest integer of that dtype.
        shift: low bits that are not looked at.
    """
    bins = (infinity >> shift) + 1
    # Four histograms, so that equal neighbours (zeros, often) do not wait for each other's sum.
    counts = np.zeros((4, bins + 1), np.uint32)
    first, second, third, fourth = counts[0], counts[1], counts[2], counts[3]
    places = np.empty(_NOTED, np.uint16)
    for begin in range(start, stop, _NOTED):
        source = x[begin : min(begin + _NOTED, stop)]
        for i in range(source.size):
            key = _key(source[i], score, infinity, top)
            places[i] = (key >> shift) + int32(key > infinity)  # NaN has a place of its own
        even = source.size // 4 * 4
        for i in range(0, even, 4):
            first[places[i]] += uint32(1)
            second[places[i + 1]] += uint32(1)
            third[places[i + 2]] += uint32(1)
            fourth[places[i + 3]] += uint32(1)
        for i in range(even, source.size):
            first[places[i]] += uint32(1)
    return counts.sum(0)[:bins].astype(np.int64)


@_compiled
def mask_gradient(grad: Any, bits: Any, out: Any, start: int, stop: int) -> None:
    """Copy the elements of ``grad`` whose bit is set, and zero the others, for the bytes ``start`` to ``stop``."""
    mask = np.empty(8 * _BLOCK, np.uint8)
    for first in range(start, stop, _BLOCK):
        last = min(first + _BLOCK, stop)
        _unpack(bits[first:last], mask)
        source, result = grad[8 * first : 8 * last], out[8 * first : 8 * last]
        for i in range(source.size):
            result[i] = source[i] if mask[i] else 0
