"""Convolutions and linear layers that skip the zeros of their input, on flat float32 arrays; no torch in here.

For each pixel the inputs that are not zero are listed. Then tiles of output pixels are computed, some outputs at a time
with their sums in registers, and some taps at a time, so that their weights stay in the nearest cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from regimewrap.serve.cpu.lists import compiled, count, list_pixels, list_places, list_planes
from regimewrap.serve.cpu.vectors import (
    LANES,
    add_rows_1,
    add_rows_2,
    add_rows_4,
    add_rows_8,
    prefetch,
    transpose_16,
)

__all__ = ["OUTPUTS", "TILE", "convolve", "count", "linear", "list_places", "some_rows"]

int64: Any = np.int64

TILE, OUTPUTS = 64, 128  # output pixels of a tile, and outputs that are summed at once
_CACHE = 1 << 17  # bytes of weights that are used at once, a pixel after the other
_KEPT = 1 << 20  # bytes of weights that stay in the second cache from one tile to the next


@numba.njit(inline="always", error_model="numpy")
def _copy(x: Any, begin: Any, out: Any, to: Any, n: Any) -> None:
    # Slices, in which no index can count from the end: only such a loop is made of vectors.
    source, target = x[begin : begin + n], out[to : to + n]
    for i in range(n):
        target[i] = source[i]


@numba.njit(inline="always", error_model="numpy")  # a call costs as much as what it does
def _add(
    width: Any, lists: Any, n: Any, units: Any, values: Any, pitch: Any, weight: Any, at: Any, out: Any, to: Any
) -> None:
    """Add up rows for a block of 16, 32, 64 or 128 outputs."""
    if width == 128:
        add_rows_8(lists, n, units, values, pitch, weight, at, out, to)
    elif width == 64:
        add_rows_4(lists, n, units, values, pitch, weight, at, out, to)
    elif width == 32:
        add_rows_2(lists, n, units, values, pitch, weight, at, out, to)
    else:
        add_rows_1(lists, n, units, values, pitch, weight, at, out, to)


@compiled
def convolve(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    begin: int,
    end: int,
    shape: Any,
    window: Any,
    x_planes: Any,
    out_planes: Any,
    whole_rows: Any,
) -> None:
    """Compute some tiles of a batch of convolved images.

    Args:
        x: the images, flat.
        weight: flat; for each block of outputs (taps, channels, outputs of the block). Outputs are filled up to a
            multiple of 16, and a block has 128 of them, or at the end 64, 32 and 16.
        bias: one for each output, filled up as well.
        out: flat; every element of the tiles is written.
        begin: the first tile, counted through all images.
        end: one past the last.
        shape: height, width, channels; height, width and outputs of the result.
        window: height, width; then stride, padding and dilation, two each.
        x_planes: whether the pixels of a channel lie together (NCHW), or the channels of a pixel.
        out_planes: the same of the result.
        whole_rows: whether the weight is one block of (channels, outputs), as ``linear`` has it; for a window of one.
    """
    height, width, channels, out_height, out_width, outputs = shape
    window_height, window_width, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x = window
    pixels, out_pixels, step, taps = height * width, out_height * out_width, bias.size, window_height * window_width
    tiles = (out_pixels + TILE - 1) // TILE
    units, values = np.empty(pixels * channels + 1, np.uint32), np.empty(pixels * channels + 1, np.float32)
    starts, lists = np.empty(pixels + 1, np.int64), np.empty((taps, 3), np.int64)
    sums = np.empty((TILE + LANES) * OUTPUTS, np.float32)
    listed, direct = int64(-1), not out_planes and outputs == step
    for tile in range(begin, end):
        image, first = tile // tiles, tile % tiles * TILE
        last = min(first + TILE, out_pixels)
        # Where the window of the first pixel begins, and where that of a pixel beyond the last column would.
        top, left = first // out_width * stride_y - pad_y, first % out_width * stride_x - pad_x
        right = out_width * stride_x - pad_x
        if image != listed:
            if x_planes:
                list_planes(x, image * pixels * channels, pixels, width, channels, units, values, starts)
            else:
                list_pixels(x, image * pixels * channels, pixels, width, channels, units, values, starts)
            listed = image
        column = int64(0)
        while column < step:
            block = int64(OUTPUTS)
            while block > step - column:
                block //= 2
            # Where nothing has to be turned or cut off, sums are made where they belong.
            place = (image * out_pixels + first) * outputs + column
            target, origin, gap = (out, place, outputs) if direct else (sums, int64(0), block)
            for pixel in range(last - first):
                _copy(bias, column, target, origin + pixel * gap, block)
            pitch = step if whole_rows else block
            base, tap = column if whole_rows else taps * channels * column, channels * pitch
            # So many taps at once that their weights stay near: some rows of the window, or a part of one.
            across = max(min(_CACHE // (4 * tap), window_width), 1)
            down = max(min(_CACHE // (4 * tap * window_width), window_height), 1)
            for tap_top in range(0, window_height, down):
                tap_bottom = min(tap_top + down, window_height)
                for tap_first in range(0, window_width, across):
                    tap_last = min(tap_first + across, window_width)
                    # Weights that come next are fetched while these are used, a part with each pixel.
                    ahead = base + ((tap_bottom - 1) * window_width + tap_last) * tap
                    part = (across * down * tap // LANES // (last - first) + 1) * LANES
                    if whole_rows or (tile > begin and 4 * taps * channels * step <= _KEPT):
                        part = int64(0)
                    row, corner = top, left
                    for pixel in range(last - first):
                        y_0, x_0 = row, corner
                        corner += stride_x
                        if corner == right:
                            row, corner = row + stride_y, -pad_x
                        for line in range(0, part, LANES):
                            prefetch(weight, ahead + pixel * part + line)
                        n = 0
                        for tap_y in range(tap_top, tap_bottom):
                            y = y_0 + tap_y * dilation_y
                            if y < 0 or y >= height:
                                continue
                            if dilation_x == 1:  # neighbours are one list, and their taps lie in the same order
                                begun, ended = max(x_0 + tap_first, 0), min(x_0 + tap_last, width)
                                if begun < ended:
                                    lists[n, 0] = starts[y * width + begun]
                                    lists[n, 1] = starts[y * width + ended] - lists[n, 0]
                                    lists[n, 2] = (tap_y * window_width - x_0) * tap
                                    n += 1
                                continue
                            for tap_x in range(tap_first, tap_last):
                                xx = x_0 + tap_x * dilation_x
                                if 0 <= xx < width:
                                    lists[n, 0] = starts[y * width + xx]
                                    lists[n, 1] = starts[y * width + xx + 1] - lists[n, 0]
                                    lists[n, 2] = (tap_y * window_width + tap_x - xx) * tap
                                    n += 1
                        if n:
                            _add(block, lists, n, units, values, pitch, weight, base, target, origin + pixel * gap)
            if not direct:
                _write(sums, out, image, first, last, column, block, out_pixels, outputs, out_planes)
            column += block


@compiled
def _write(
    sums: Any,
    out: Any,
    image: Any,
    first: Any,
    last: Any,
    column: Any,
    block: Any,
    pixels: Any,
    outputs: Any,
    planes: Any,
) -> None:
    """Copy the sums of a tile to their place in the result."""
    used = min(block, outputs - column)
    start = image * pixels * outputs
    if not planes:
        for pixel in range(last - first):
            _copy(sums, pixel * block, out, start + (first + pixel) * outputs + column, used)
        return
    pixel = int64(0)
    while pixel < last - first:
        output = int64(0)
        while output < used:
            place = start + (column + output) * pixels + first + pixel
            if pixel + LANES <= last - first and output + LANES <= used:
                transpose_16(sums, pixel * block + output, block, out, place, pixels)
            else:
                for i in range(min(LANES, used - output)):
                    for j in range(min(LANES, last - first - pixel)):
                        out[place + i * pixels + j] = sums[(pixel + j) * block + output + i]
            output += LANES
        pixel += LANES


def _linear(
    x: Any, weight: Any, bias: Any, out: Any, begin: int, end: int, rows: int, inputs: Any, outputs: Any
) -> None:
    """Compute some outputs of a linear layer for a few rows; the weight is far away, and little of it is read.

    Four inputs at a time, along all outputs: a processor fetches what follows by itself.

    Args:
        x: flat, from (rows, inputs).
        weight: flat, from (inputs, outputs); outputs are filled up to a multiple of 16, as in the bias.
        bias: filled up.
        out: flat, from (rows, outputs).
        begin: the first block of 128 outputs.
        end: one past the last.
        rows: how many there are.
        inputs: length of a row of ``x``.
        outputs: the same of ``out``.
    """
    units, values, starts = np.empty(inputs + 1, np.uint32), np.empty(inputs + 1, np.float32), np.empty(2, np.int64)
    first, pitch = begin * OUTPUTS, int64(bias.size)
    n = min(end * OUTPUTS, outputs) - first
    for row in range(rows):
        list_pixels(x, row * inputs, 1, 1, inputs, units, values, starts)
        _copy(bias, first, out, row * outputs + first, n)
        # Slices for the reason that ``_copy`` gives.
        sums, i = out[row * outputs + first : row * outputs + first + n], int64(0)
        while i + 4 <= starts[1]:
            place_0, place_1 = units[i] * pitch + first, units[i + 1] * pitch + first
            place_2, place_3 = units[i + 2] * pitch + first, units[i + 3] * pitch + first
            row_0, row_1 = weight[place_0 : place_0 + n], weight[place_1 : place_1 + n]
            row_2, row_3 = weight[place_2 : place_2 + n], weight[place_3 : place_3 + n]
            x_0, x_1, x_2, x_3 = values[i], values[i + 1], values[i + 2], values[i + 3]
            for j in range(n):
                sums[j] += (x_0 * row_0[j] + x_1 * row_1[j]) + (x_2 * row_2[j] + x_3 * row_3[j])
            i += 4
        while i < starts[1]:
            place_0, x_0 = units[i] * pitch + first, values[i]
            row_0 = weight[place_0 : place_0 + n]
            for j in range(n):
                sums[j] += x_0 * row_0[j]
            i += 1


def _some_rows(
    x: Any, weight: Any, bias: Any, places: Any, out: Any, begin: int, end: int, inputs: Any, outputs: Any
) -> None:
    """Compute the elements of a linear layer's output that ``places[begin:end]`` name, and no others.

    Args:
        x: flat, from (rows, inputs).
        weight: flat, from (outputs, inputs).
        bias: flat, or empty.
        places: places in ``out``.
        out: flat, from (rows, outputs).
        begin: the first that is computed.
        end: one past the last.
        inputs: length of a row of ``x``.
        outputs: the same of ``out``.
    """
    for i in range(begin, end):
        place = places[i]
        row, unit = place // outputs, place % outputs
        if i + 1 < end:  # the next row is somewhere else, where no processor expects it
            following = places[i + 1] % outputs * inputs
            for line in range(0, inputs, LANES):
                prefetch(weight, following + line)
        total, first, start = x.dtype.type(0), row * inputs, unit * inputs
        # Slices for the reason that ``_copy`` gives.
        left, right = x[first : first + inputs], weight[start : start + inputs]
        for j in range(inputs):
            total += left[j] * right[j]
        out[place] = total + bias[unit] if bias.size else total


# Sums may be made in any order; NaN and infinities stay what they are.
linear: Any = compiled(_linear, fastmath={"reassoc", "contract"})
some_rows: Any = compiled(_some_rows, fastmath={"reassoc", "contract"})
