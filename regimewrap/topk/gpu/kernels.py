"""The selection on GPUs, compiled by Triton; imported only when a tensor on a GPU asks for it.

As on the CPU, scores become integers that order alike, and a threshold is found by counting. A row that fits on a
multiprocessor is read once and written once. A longer one is read twice, by one program: a sample gives two bounds that
the threshold lies between (all but surely, and where it does not, a slow loop finds it), one pass counts what is above
them and collects what is between, the threshold is found among these few, and a second pass writes.

Everything here works on integer views of dense memory and waits for nothing. It must keep exactly what ``reference.py``
keeps, whatever the data: no buffer may overflow into a wrong answer.
"""

# Triton wants constants in upper case, the else after a return, and no annotations but its own.
# ruff: noqa: N803, RET505
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

# How a unit is scored, and how what was kept is written down; ``gpu.py`` translates.
MAGNITUDE, VALUE, POSITIVE = 0, 1, 2
NOTHING, ALONG_UNITS, ALONG_POSITIONS, BYTES = 0, 1, 2, 3

_VALUE = tl.constexpr(VALUE)
_MAGNITUDE = tl.constexpr(MAGNITUDE)
_POSITIVE = tl.constexpr(POSITIVE)
_ALONG_UNITS = tl.constexpr(ALONG_UNITS)
_ALONG_POSITIONS = tl.constexpr(ALONG_POSITIONS)
_BYTES = tl.constexpr(BYTES)


@triton.jit
def _key(b, SCORE: tl.constexpr, INFINITY: tl.constexpr):
    """Map the bits of floats to integers that order like their scores; every NaN is one above infinity."""
    if b.dtype.primitive_bitwidth == 64:
        magnitude = b & 0x7FFFFFFFFFFFFFFF
    elif b.dtype.primitive_bitwidth == 32:
        magnitude = b & 0x7FFFFFFF
    else:
        b = b.to(tl.int32)
        magnitude = b & 0x7FFF
    if SCORE == _MAGNITUDE:
        key = magnitude
    elif SCORE == _VALUE:
        key = tl.where(b < 0, -magnitude, magnitude)
    else:
        key = tl.where(b < 0, magnitude * 0, magnitude)
    return tl.where(magnitude > INFINITY, magnitude * 0 + (INFINITY + 1), key)


@triton.jit
def _lowest(SCORE: tl.constexpr, INFINITY: tl.constexpr):
    """Return a key that is as low as any unit's."""
    if SCORE == _VALUE:
        return -INFINITY - 1
    else:
        return 0


@triton.jit
def _middle(low, high):
    return (low >> 1) + (high >> 1) + (low & high & 1)  # their sum may not fit


@triton.jit
def _share(n, ratio_bits):
    """Return k of n active units; the ratio comes as bits, as kernels take no double."""
    ratio = ratio_bits.to(tl.int64).to(tl.float64, bitcast=True)
    return tl.maximum((n.to(tl.float64) * ratio).to(tl.int32), 1)


@triton.jit
def _kept_bits(b, kept, SCORE: tl.constexpr, INFINITY: tl.constexpr):
    """Return the bits of the gated units."""
    if SCORE == _POSITIVE:
        kept = kept & ((b >= 0) | (_key(b, SCORE, INFINITY) > INFINITY))
    return tl.where(kept, b, b * 0)


@triton.jit(do_not_specialize=["k", "ratio_bits"])
def gate_tile(
    source,
    result,
    bits,
    outer,
    units,
    inner,
    k,
    ratio_bits,
    SCORE: tl.constexpr,
    ACTIVE: tl.constexpr,
    EXACT: tl.constexpr,
    SAVED: tl.constexpr,
    INFINITY: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gate rows that fit on chip: ROWS of them, of up to BLOCK units that lie together or ``inner`` apart."""
    # One wide offset for all: an offset of 64 bits for each unit would need more registers than the units.
    unit = tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    if TOGETHER:
        first = tl.program_id(0).to(tl.int64) * ROWS
        base = first * units
        offsets = row[:, None] * units + unit[None, :]
        here = row < outer - first
    else:
        parts = tl.cdiv(inner, ROWS)
        first = tl.program_id(0) % parts * ROWS
        base = (tl.program_id(0) // parts).to(tl.int64) * units * inner + first
        offsets = row[:, None] + unit[None, :] * inner
        here = row < inner - first
    inside = here[:, None] & (unit < units)[None, :]
    key = _key(tl.load(source + base + offsets, mask=inside, other=0), SCORE, INFINITY)
    lowest = _lowest(SCORE, INFINITY)
    key = tl.where(inside, key, key * 0 + (lowest - 1))  # never counted
    if ACTIVE:
        k = _share(tl.sum((inside & (key != 0)).to(tl.int32), axis=1), ratio_bits)

    low = tl.zeros([ROWS], tl.int64) + lowest  # at least k keys reach it
    high = tl.zeros([ROWS], tl.int64) + (INFINITY + 2)  # fewer do
    while tl.max((low + 1 < high).to(tl.int32), axis=0) > 0:
        middle = _middle(low, high)
        reached = tl.sum((key >= middle.to(key.dtype)[:, None]).to(tl.int32), axis=1)
        enough = reached >= k
        low = tl.where(enough, middle, low)
        # Where exactly k keys reach the pivot no better one is needed.
        high = tl.where(enough & (reached != k), high, tl.where(enough, middle + 1, middle))

    threshold = low.to(key.dtype)[:, None]
    if EXACT:
        above = key > threshold
        tied = key == threshold
        room = k - tl.sum(above.to(tl.int32), axis=1)
        fits = tl.cumsum(tied.to(tl.int32), axis=1) <= room[:, None]
        kept = above | (tied & (fits | (key > INFINITY)))
    else:
        kept = key >= threshold
    kept = kept & inside
    # Read once more, from the cache: held in registers all the while, there would be room for half as long rows.
    b = tl.load(source + base + offsets, mask=inside, other=0, volatile=True)
    tl.store(result + base + offsets, _kept_bits(b, kept, SCORE, INFINITY), mask=inside)
    places = tl.arange(0, 8)
    if SAVED == _ALONG_UNITS:
        packed = tl.sum(tl.reshape(kept.to(tl.int32), [ROWS, BLOCK // 8, 8]) << places[None, None, :], axis=2)
        byte = tl.arange(0, BLOCK // 8)
        tl.store(
            bits + base // 8 + row[:, None] * (units // 8) + byte[None, :],
            packed.to(tl.uint8),
            mask=here[:, None] & (byte < units // 8)[None, :],
        )
    if SAVED == _ALONG_POSITIONS:
        packed = tl.sum(tl.reshape(kept.to(tl.int32), [ROWS // 8, 8, BLOCK]) << places[None, :, None], axis=1)
        byte = tl.arange(0, ROWS // 8)
        tl.store(
            bits + base // 8 + byte[:, None] + unit[None, :] * (inner // 8),
            packed.to(tl.uint8),
            mask=(byte < (inner - first) // 8)[:, None] & (unit < units)[None, :],
        )
    if SAVED == _BYTES:
        tl.store(bits + base + offsets, kept.to(tl.uint8), mask=inside)


@triton.jit
def _search(key, rank, lowest, INFINITY: tl.constexpr):
    """Return a threshold that ``rank`` of the keys reach, or that the rank-th shares with others."""
    low = lowest
    high = lowest * 0 + (INFINITY + 2)
    while low + 1 < high:
        middle = _middle(low, high)
        reached = tl.sum((key >= middle.to(key.dtype)).to(tl.int32), axis=0)
        if reached >= rank:
            low = middle
            if reached == rank:
                high = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["k", "ratio_bits"])
def gate_long_row(
    source,
    result,
    bits,
    between,
    units,
    capacity,
    k,
    ratio_bits,
    SCORE: tl.constexpr,
    ACTIVE: tl.constexpr,
    EXACT: tl.constexpr,
    SAVED: tl.constexpr,
    INFINITY: tl.constexpr,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gate one row of SAMPLE units or more, which lie together; ``between`` has room for ``capacity`` keys of each."""
    source += tl.program_id(0).to(tl.int64) * units
    result += tl.program_id(0).to(tl.int64) * units
    between += tl.program_id(0).to(tl.int64) * capacity
    lane = tl.arange(0, BLOCK)

    # Two bounds by a sample: one unit from each stretch, at places without a pattern, as the columns of an image have.
    drawn = tl.arange(0, SAMPLE)
    stretch = units // SAMPLE
    shift = ((drawn.to(tl.uint32) * 2654435769) >> 8) % stretch.to(tl.uint32)
    seen = _key(tl.load(source + drawn * stretch + shift.to(tl.int32)), SCORE, INFINITY)
    if ACTIVE:
        ratio = ratio_bits.to(tl.int64).to(tl.float64, bitcast=True).to(tl.float32)
        rank = tl.sum((seen != 0).to(tl.int32), axis=0).to(tl.float32) * ratio
    else:
        rank = k.to(tl.float32) * SAMPLE / units
    # Six standard deviations of a binomial's count: one row in a billion misses.
    margin = 6 * tl.sqrt(tl.maximum(rank * (1 - rank / SAMPLE), 1.0)) + 2
    lowest = tl.zeros([], tl.int64) + _lowest(SCORE, INFINITY)
    highest = tl.zeros([], tl.int64) + (INFINITY + 2)
    low, high = lowest, highest
    if rank + margin < SAMPLE:
        low = _search(seen, (rank + margin).to(tl.int32) + 1, lowest, INFINITY)
    if rank - margin >= 1:
        high = _search(seen, (rank - margin).to(tl.int32), lowest, INFINITY) + 1

    # What does not fit is counted all the same. Ties with the lower bound, often zeros, need no room.
    above, at_low, number, active = 0, 0, 0, 0
    for start in range(0, units, BLOCK):
        inside = start + lane < units
        key = _key(tl.load(source + start + lane, mask=inside, other=0), SCORE, INFINITY)
        chosen = inside & (key > low.to(key.dtype)) & (key < high.to(key.dtype))
        place = number + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(between + place, key, mask=chosen & (place < capacity))
        number += tl.sum(chosen.to(tl.int32), axis=0)
        above += tl.sum((inside & (key >= high.to(key.dtype))).to(tl.int32), axis=0)
        at_low += tl.sum((inside & (key == low.to(key.dtype))).to(tl.int32), axis=0)
        if ACTIVE:
            active += tl.sum((inside & (key != 0)).to(tl.int32), axis=0)
    tl.debug_barrier()  # every thread sees what all have collected
    if ACTIVE:
        k = _share(active, ratio_bits)

    if (above >= k) | (above + number + at_low < k) | (number > capacity):
        # The sample misled us: count over the whole row.
        low, high = lowest, highest
        while low + 1 < high:
            middle = _middle(low, high)
            reached = 0
            for start in range(0, units, BLOCK):
                inside = start + lane < units
                key = _key(tl.load(source + start + lane, mask=inside, other=0), SCORE, INFINITY)
                reached += tl.sum((inside & (key >= middle.to(key.dtype))).to(tl.int32), axis=0)
            if reached >= k:
                low = middle
            else:
                high = middle
    elif above + number >= k:
        while low + 1 < high:
            middle = _middle(low, high)
            reached = above
            for start in range(0, number, BLOCK):
                inside = start + lane < number
                key = tl.load(between + start + lane, mask=inside, other=0)
                reached += tl.sum((inside & (key >= middle.to(key.dtype))).to(tl.int32), axis=0)
            if reached >= k:
                low = middle
                if reached == k:
                    high = middle + 1
            else:
                high = middle

    room = 0
    if EXACT:
        room += k
        for start in range(0, units, BLOCK):
            inside = start + lane < units
            key = _key(tl.load(source + start + lane, mask=inside, other=0), SCORE, INFINITY)
            room -= tl.sum((inside & (key > low.to(key.dtype))).to(tl.int32), axis=0)
    for start in range(0, units, BLOCK):
        inside = start + lane < units
        b = tl.load(source + start + lane, mask=inside, other=0)
        key = _key(b, SCORE, INFINITY)
        kept = inside & (key >= low.to(key.dtype))
        if EXACT:
            tied = inside & (key == low.to(key.dtype))
            fits = tl.cumsum(tied.to(tl.int32), axis=0) <= room
            kept = kept & ((key != low.to(key.dtype)) | fits | (key > INFINITY))
            room -= tl.sum(tied.to(tl.int32), axis=0)
        tl.store(result + start + lane, _kept_bits(b, kept, SCORE, INFINITY), mask=inside)
        if SAVED == _ALONG_UNITS:
            packed = tl.sum(tl.reshape(kept.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :], axis=1)
            byte = start // 8 + tl.arange(0, BLOCK // 8)
            row = tl.program_id(0).to(tl.int64) * (units // 8)
            tl.store(bits + row + byte, packed.to(tl.uint8), mask=byte < units // 8)
        if SAVED == _BYTES:
            row = tl.program_id(0).to(tl.int64) * units
            tl.store(bits + row + start + lane, kept.to(tl.uint8), mask=inside)


@triton.jit
def mask_gradient(gradient, bits, result, units, BLOCK: tl.constexpr):
    """Write the gradient where a bit is set, and zero elsewhere."""
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    kept = (tl.load(bits + unit // 8, mask=inside, other=0).to(tl.int32) >> (unit % 8).to(tl.int32)) & 1
    grad = tl.load(gradient + unit, mask=inside, other=0)
    tl.store(result + unit, tl.where(kept != 0, grad, grad * 0), mask=inside)
