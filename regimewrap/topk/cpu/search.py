"""How the CPU's kernels find a row's threshold: scores as integers, and a search that counts.

Floats of one sign order like the integers of the same bits. So each row becomes integers that order like its scores,
and a threshold is found by counting how many are at least as large as a guess. Counting is one vector instruction or
two for each 64 bytes, so that a dozen passes over a row in cache cost less than one pass that builds a histogram.

Types are numba's to infer, from the dtype of the arrays; to the type checker they are ``Any``. numba keeps compiled
kernels until the file that they stand in changes: after a change here, save ``kernels.py`` and ``elements.py`` too.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

int32: Any = np.int32
int64: Any = np.int64
float64: Any = np.float64

# How a unit is scored; ``dispatch`` translates the words.
MAGNITUDE, VALUE, POSITIVE = 0, 1, 2

#: Rows at least this long are probed by a sample before they are counted in full.
_SAMPLED_FROM = 4096
#: Keys that such a sample has at most.
SAMPLE = 1024


def compiled(function: Any) -> Any:
    """Let numba compile a function, and keep the result on disk where it can."""
    # Without nogil the threads that share the rows would wait for each other.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to keep the result: compile in each process
        return numba.njit(**options)(function)


@compiled
def key(b: Any, score: int, infinity: Any, top: Any) -> Any:
    """Map the bits of a float to an integer that orders like its score; every NaN is one above infinity."""
    magnitude = b & top
    if magnitude > infinity:
        return infinity + 1
    if score == MAGNITUDE or b >= 0:
        return magnitude
    return -magnitude if score == VALUE else b & 0


@compiled
def _count(keys: Any, pivot: Any) -> Any:
    """Count the keys that are at least ``pivot``."""
    # 32-bit counters fill vectors twice as densely as 64-bit ones; longer rows than they count do not come here.
    count = int32(0)
    for i in range(keys.size):
        count = int32(count + int32(keys[i] >= pivot))
    return int64(count)


@compiled
def _survey(keys: Any) -> Any:
    """Return the smallest key, the largest, and how many are positive."""
    least, most = keys[0], keys[0]
    positive = int32(0)
    for i in range(keys.size):
        least, most = min(least, keys[i]), max(most, keys[i])
        positive = int32(positive + int32(keys[i] > 0))
    return int64(least), int64(most), int64(positive)


@compiled
def _nearest(keys: Any, low: Any, high: Any) -> Any:
    """Return the smallest key that is at least ``low`` and the largest below ``high``."""
    above, below = high, low
    for i in range(keys.size):
        key = keys[i]
        above = min(above, key if key >= low else high)
        below = max(below, key if key < high else low)
    return above, below


@compiled
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


@compiled
def find_threshold(keys: Any, ratio: float, active: bool, signed: bool, sample: Any) -> Any:
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


@compiled
def last_tie(keys: Any, threshold: Any, room: Any) -> Any:
    """Return the index of the last of the ``room`` first keys that equal the threshold."""
    for i in range(keys.size):
        if keys[i] == threshold:
            room -= 1
            if room == 0:
                return i
    return keys.size
