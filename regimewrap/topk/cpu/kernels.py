"""The selection on CPUs, compiled by numba; imported only when a large enough tensor asks for it.

Each row becomes keys (``search.py``), written into the output, which serves as scratch; a threshold is found among
them; and the output is overwritten with what is kept. Rows that are to be kept in full are copied in the same pass.

Everything here works on flat integer views and knows nothing of torch. It must keep exactly what ``reference.py``
keeps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regimewrap.topk.cpu.elements import count, cut, keep_all, mask_gradient, pack
from regimewrap.topk.cpu.search import POSITIVE, SAMPLE, VALUE, compiled, find_threshold, key, last_tie

__all__ = ["count", "cut", "gate_positions", "gate_rows", "gate_whole", "mask_gradient"]

int64: Any = np.int64


@compiled
def _write(x: Any, y: Any, threshold: Any) -> None:
    """Overwrite the keys in ``y`` with the units of ``x`` that reach the threshold, and zero."""
    for i in range(x.size):
        y[i] = x[i] if y[i] >= threshold else 0


@compiled
def _write_with_mask(x: Any, y: Any, threshold: Any, mask: Any) -> None:
    """Do the same, and note what was kept."""
    for i in range(x.size):
        kept = y[i] >= threshold
        y[i] = x[i] if kept else 0
        mask[i] = kept


@compiled
def _write_each(x: Any, y: Any, thresholds: Any) -> None:
    """Like ``_write``, with a threshold for each unit."""
    for i in range(x.size):
        y[i] = x[i] if y[i] >= thresholds[i] else 0


@compiled
def _write_each_with_mask(x: Any, y: Any, thresholds: Any, mask: Any) -> None:
    """Like ``_write_with_mask``, with a threshold for each unit."""
    for i in range(x.size):
        kept = y[i] >= thresholds[i]
        y[i] = x[i] if kept else 0
        mask[i] = kept


@compiled
def _pivot(keys: Any, how: Any, sample: Any) -> Any:
    """Return the least key that is kept, and the index from which on ties with it are not."""
    ratio, active, exact, score, infinity, _ = how
    k, threshold, reached, exceeded = find_threshold(keys, ratio, active, score == VALUE, sample)
    if score == POSITIVE:
        threshold = max(threshold, 1)
    end = keys.size
    if exact and reached > k and threshold <= infinity:
        end = last_tie(keys, threshold, k - exceeded) + 1
    return threshold, end


@compiled
def _gate_row(x: Any, y: Any, mask: Any, how: Any, sample: Any) -> None:
    """Gate one row; ``mask`` is a byte for each unit, or empty."""
    _, _, _, score, infinity, top = how
    for i in range(x.size):
        y[i] = key(x[i], score, infinity, top)
    threshold, end = _pivot(y, how, sample)
    pivot = x.dtype.type(threshold)
    if mask.size:
        _write_with_mask(x[:end], y[:end], pivot, mask[:end])
        if end < x.size:
            _write_with_mask(x[end:], y[end:], x.dtype.type(threshold + 1), mask[end:])
    else:
        _write(x[:end], y[:end], pivot)
        if end < x.size:
            _write(x[end:], y[end:], x.dtype.type(threshold + 1))


@compiled
def _room(units: Any, bits: Any) -> Any:
    """Return how many rows are packed together, and a byte for each of their units where bits are wanted."""
    together = 1 if units % 8 == 0 else 8
    return together, np.zeros((together * units + 7) // 8 * 8 if bits.size else 0, np.uint8)


@compiled
def gate_rows(x: Any, y: Any, bits: Any, start: int, stop: int, full: Any, units: int, how: Any) -> None:
    """Gate rows ``start`` to ``stop`` whose units are neighbours in memory.

    Args:
        x: bits of the input, flat.
        y: bits of the output, flat; same dtype.
        bits: which units were kept, packed over the whole tensor; empty where nobody asks.
        start: the first row; a multiple of 8 where bits are wanted and rows do not fill bytes.
        stop: one past the last row.
        full: the first row that keeps all its units, and one past the last of these.
        units: in a row.
        how: the effective keep ratio, in (0, 1); whether k is a share of the non-zero units only; whether ties are cut,
            lowest index first; MAGNITUDE, VALUE, or POSITIVE for the magnitude after a ReLU, which is then applied; the
            bits of infinity, and the largest integer of that dtype.
    """
    full_from, full_to = full
    _, _, _, score, infinity, top = how
    sample = np.empty(SAMPLE, x.dtype)
    together, mask = _room(units, bits)
    for first in range(start, stop, together):
        last = min(first + together, stop)
        for row in range(first, last):
            source, result = x[row * units : (row + 1) * units], y[row * units : (row + 1) * units]
            noted = mask[(row - first) * units : (row - first + 1) * units]
            if full_from <= row < full_to:
                keep_all(source, result, noted, score, infinity, top)
            else:
                _gate_row(source, result, noted, how, sample)
        if bits.size:
            mask[(last - first) * units :] = 0
            pack(mask, bits[first * units // 8 : (last * units + 7) // 8])


@compiled
def gate_whole(x: Any, y: Any, bits: Any, full: Any, how: Any) -> None:
    """Gate all elements as one row, apart from those in ``full``, an end of it that is kept; see ``gate_rows``."""
    full_from, full_to = full
    _, _, _, score, infinity, top = how
    begin, end = (full_to, x.size) if full_from == 0 else (0, full_from)
    mask = np.zeros((x.size + 7) // 8 * 8 if bits.size else 0, np.uint8)
    noted = mask[: x.size]
    sample = np.empty(SAMPLE, x.dtype)
    _gate_row(x[begin:end], y[begin:end], noted[begin:end], how, sample)
    source, result = x[full_from:full_to], y[full_from:full_to]
    keep_all(source, result, noted[full_from:full_to], score, infinity, top)
    if bits.size:
        pack(mask, bits)


@compiled
def gate_positions(
    x: Any, y: Any, bits: Any, start: int, stop: int, full: Any, units: int, how: Any, inner: int
) -> None:
    """Gate positions whose units lie ``inner`` elements apart, as channels of an image do; see ``gate_rows``.

    ``start``, ``stop`` and ``full`` count blocks of ``units`` times ``inner`` elements.
    """
    full_from, full_to = full
    _, _, exact, score, infinity, top = how
    block = units * inner
    tile = max(16, min(64, (1 << 15) // units))
    # Rows one cache line longer than they need be: at a power of two they would all compete for the same lines.
    keys = np.empty((tile, units + 16), x.dtype)
    thresholds = np.empty(tile, x.dtype)
    ends = np.empty(tile, np.int64)
    sample = np.empty(SAMPLE, x.dtype)
    together, mask = _room(block, bits)
    for first in range(start, stop, together):
        last = min(first + together, stop)
        for outer in range(first, last):
            source, result = x[outer * block : (outer + 1) * block], y[outer * block : (outer + 1) * block]
            noted = mask[(outer - first) * block : (outer - first + 1) * block]
            if full_from <= outer < full_to:
                keep_all(source, result, noted, score, infinity, top)
                continue
            for i in range(block):
                result[i] = key(source[i], score, infinity, top)
            for left in range(0, inner, tile):
                width = min(tile, inner - left)
                for unit in range(units):
                    line = result[unit * inner + left : unit * inner + left + width]
                    for j in range(width):
                        keys[j, unit] = line[j]
                for j in range(width):
                    threshold, ends[j] = _pivot(keys[j, :units], how, sample)
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
            pack(mask, bits[first * block // 8 : (last * block + 7) // 8])
