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

__all__ = ["count", "cut", "gate_blocks", "gate_whole", "mask_gradient"]

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
def _gate_positions(x: Any, y: Any, mask: Any, how: Any, inner: int, room: Any) -> None:
    """Gate ``inner`` rows whose units lie that far apart, as channels of an image do; ``mask`` as in ``_gate_row``."""
    keys, thresholds, ends, sample = room
    _, _, exact, score, infinity, top = how
    units, tile = x.size // inner, thresholds.size
    for i in range(x.size):
        y[i] = key(x[i], score, infinity, top)
    for left in range(0, inner, tile):
        width = min(tile, inner - left)
        for unit in range(units):
            line = y[unit * inner + left : unit * inner + left + width]
            for j in range(width):
                keys[j, unit] = line[j]
        for j in range(width):
            threshold, ends[j] = _pivot(keys[j, :units], how, sample)
            thresholds[j] = threshold
        for unit in range(units):
            here = slice(unit * inner + left, unit * inner + left + width)
            if mask.size:
                _write_each_with_mask(x[here], y[here], thresholds, mask[here])
            else:
                _write_each(x[here], y[here], thresholds)
            if exact:
                for j in range(width):
                    if ends[j] == unit + 1 < units:
                        thresholds[j] += 1


@compiled
def gate_blocks(x: Any, y: Any, bits: Any, start: int, stop: int, full: Any, units: int, inner: int, how: Any) -> None:
    """Gate blocks ``start`` to ``stop``: each is one row (``inner`` is 1), or as many rows, whose units take turns.

    Args:
        x: bits of the input, flat.
        y: bits of the output, flat; same dtype.
        bits: which units were kept, packed over the whole tensor; empty where nothing is to be noted.
        start: the first block; a multiple of 8 where bits are wanted and blocks do not fill bytes.
        stop: one past the last block.
        full: the first block that keeps all its units, and one past the last of these.
        units: in a row.
        inner: how far apart these lie.
        how: the effective keep ratio, in (0, 1); whether k is a share of the non-zero units only; whether ties are cut,
            lowest index first; MAGNITUDE, VALUE, or POSITIVE for the magnitude after a ReLU, which is then applied; the
            bits of infinity, and the largest integer of that dtype.
    """
    full_from, full_to = full
    _, _, _, score, infinity, top = how
    block = units * inner
    tile = max(16, min(64, (1 << 15) // units)) if inner > 1 else 0
    sample = np.empty(SAMPLE, x.dtype)
    # Rows one cache line longer than they need be: at a power of two they would all compete for the same lines.
    room = np.empty((tile, units + 16), x.dtype), np.empty(tile, x.dtype), np.empty(tile, np.int64), sample
    together = 1 if block % 8 == 0 else 8  # blocks that are packed together
    mask = np.zeros((together * block + 7) // 8 * 8 if bits.size else 0, np.uint8)
    for first in range(start, stop, together):
        last = min(first + together, stop)
        for number in range(first, last):
            source, result = x[number * block : (number + 1) * block], y[number * block : (number + 1) * block]
            noted = mask[(number - first) * block : (number - first + 1) * block]
            if full_from <= number < full_to:
                keep_all(source, result, noted, score, infinity, top)
            elif inner == 1:
                _gate_row(source, result, noted, how, sample)
            else:
                _gate_positions(source, result, noted, how, inner, room)
        if bits.size:
            mask[(last - first) * block :] = 0
            pack(mask, bits[first * block // 8 : (last * block + 7) // 8])


@compiled
def gate_whole(x: Any, y: Any, bits: Any, full: Any, how: Any) -> None:
    """Gate all elements as one row, apart from those in ``full``, an end of it that is kept; see ``gate_blocks``."""
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
