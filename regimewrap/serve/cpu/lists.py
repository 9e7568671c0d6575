"""Where arrays are not zero: counted, and listed for the products; flat float32 arrays, no torch in here.

numba keeps compiled kernels until the file that they stand in changes: after a change here, save ``kernels.py`` too.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numba
import numpy as np

from regimewrap.serve.cpu.vectors import lowest, nonzero_mask, ones

if getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("numba's compiler is switched off by NUMBA_DISABLE_JIT")

int64: Any = np.int64
uint64: Any = np.uint64


def compiled(function: Any, **more: Any) -> Any:
    """Let numba compile a function, with more options than usual, and keep the result on disk where it can."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", **more}
    with contextlib.suppress(RuntimeError):  # nowhere to keep the result: compile in each process
        return numba.njit(cache=True, **options)(function)
    return numba.njit(**options)(function)


@compiled
def count(x: Any) -> Any:
    """Return how many elements of a flat array are not zero."""
    found, place = int64(0), int64(0)
    while place + 64 <= x.size:
        found += ones(nonzero_mask(x, place))
        place += 64
    while place < x.size:
        found += x[place] != 0
        place += 1
    return found


@compiled
def list_pixels(
    x: Any, first: Any, pixels: Any, width: Any, channels: Any, units: Any, values: Any, starts: Any
) -> None:
    """List what is not zero of an image whose channels lie together.

    Pixel ``p`` has the entries ``starts[p]`` to ``starts[p + 1]``; a unit is a place in its row of the image, counted
    as (width, channels), so that neighbours in a row are one list.
    """
    k = int64(0)
    for pixel in range(pixels):
        start, left = first + pixel * channels, pixel % width * channels
        starts[pixel], channel = k, int64(0)
        while channel + 64 <= channels:
            mask = nonzero_mask(x, start + channel)
            while mask != uint64(0):
                c = channel + lowest(mask)
                units[k], values[k] = left + c, x[start + c]
                k += 1
                mask &= mask - uint64(1)
            channel += 64
        while channel < channels:
            if x[start + channel] != 0:
                units[k], values[k] = left + channel, x[start + channel]
                k += 1
            channel += 1
    starts[pixels] = k


@compiled
def list_planes(
    x: Any, first: Any, pixels: Any, width: Any, channels: Any, units: Any, values: Any, starts: Any
) -> None:
    """List the same of an image whose pixels lie together: count first, then put each in its place."""
    starts[: pixels + 1] = 0
    for channel in range(channels):
        start, pixel = first + channel * pixels, int64(0)
        while pixel + 64 <= pixels:
            mask = nonzero_mask(x, start + pixel)
            while mask != uint64(0):
                starts[pixel + lowest(mask)] += 1
                mask &= mask - uint64(1)
            pixel += 64
        while pixel < pixels:
            starts[pixel] += x[start + pixel] != 0
            pixel += 1
    k = int64(0)
    for pixel in range(pixels + 1):
        k, starts[pixel] = k + starts[pixel], k
    for channel in range(channels):
        start, pixel = first + channel * pixels, int64(0)
        while pixel < pixels:
            if pixel + 64 <= pixels:
                mask, step = nonzero_mask(x, start + pixel), int64(64)
            else:
                mask, step = uint64(x[start + pixel] != 0), int64(1)
            while mask != uint64(0):
                p = pixel + lowest(mask)
                k = starts[p]
                units[k], values[k] = p % width * channels + channel, x[start + p]
                starts[p] = k + 1
                mask &= mask - uint64(1)
            pixel += step
    for pixel in range(pixels, 0, -1):  # each now stands where the next one began
        starts[pixel] = starts[pixel - 1]
    starts[0] = 0


@compiled
def list_places(x: Any, places: Any) -> None:
    """Write where a flat array is not zero."""
    k, place = int64(0), int64(0)
    while place + 64 <= x.size:
        mask = nonzero_mask(x, place)
        while mask != uint64(0):
            places[k] = place + lowest(mask)
            k += 1
            mask &= mask - uint64(1)
        place += 64
    while place < x.size:
        if x[place] != 0:
            places[k] = place
            k += 1
        place += 1
