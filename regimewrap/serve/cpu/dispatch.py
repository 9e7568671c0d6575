"""The way to the compiled products: layouts, how tiles are shared among threads, what if a kernel fails.

Cheap to import: numba is loaded when a layer is first served.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regimewrap.errors import to_install
from regimewrap.topk.cpu.dispatch import in_threads
from regimewrap.topk.loading import Kernels

#: Elements of a result that keep a thread busy for longer than it takes to wake it.
_GRAIN = 1 << 12
#: Rows of a linear layer for which its weight is read once a row, and not kept in a cache for all.
_FEW = 8
#: The window of a linear layer: size, stride, padding and dilation, two each.
_ONE = (1, 1, 1, 1, 0, 0, 1, 1)


def _import() -> ModuleType:
    from regimewrap.serve.cpu import kernels

    return kernels


KERNELS = Kernels(
    _import,
    "numba",
    to_install("fast"),
    "serves convolutions dense, and linear layers in plain torch",
)


def laid_convolution(weight: Tensor) -> Tensor:
    """Return a weight (outputs, channels, height, width) as the kernel wants it.

    Returns:
        float32, flat: for each block of outputs (taps, channels, outputs of the block), filled up with zeros.
    """
    outputs, channels = weight.shape[:2]
    filled = weight.new_zeros(weight[0, 0].numel(), channels, -(-outputs // 16) * 16, dtype=torch.float32)
    filled[..., :outputs] = weight.flatten(2).permute(2, 1, 0)
    blocks, column, width = [], 0, 128
    while column < filled.shape[-1]:
        while width > filled.shape[-1] - column:
            width //= 2
        blocks.append(filled[..., column : column + width].flatten())
        column += width
    return torch.cat(blocks)


def laid_linear(weight: Tensor) -> Tensor:
    """Return a weight (inputs, outputs) as the kernel wants it: rows of a multiple of 16; itself if it is that."""
    inputs, outputs = weight.shape
    if outputs % 16 == 0:
        return weight.contiguous()
    laid = weight.new_zeros(inputs, -(-outputs // 16) * 16)
    laid[:, :outputs] = weight
    return laid


def convolve(
    x: Tensor,
    laid: Tensor,
    bias: Tensor | None,
    outputs: int,
    window: tuple[int, ...],
    most: float,
    whole_rows: bool = False,
) -> tuple[Tensor | None, int]:
    """Return what a convolution makes of images with zeros in them.

    Args:
        x: shape (images, channels, height, width), on the CPU, any strides.
        laid: as ``laid_convolution`` returns it.
        bias: shape (outputs,), or ``None``.
        outputs: channels of the result.
        window: height, width; then stride, padding and dilation, two each.
        most: inputs other than zero above which the answer is ``None``.
        whole_rows: whether ``laid`` is as ``laid_linear`` returns it; for a window of one.

    Returns:
        Shape (images, outputs, height, width), in the dtype and memory format of ``x``, or ``None``; and how many
        inputs were not zero.
    """
    kernels = KERNELS.get()
    if kernels is None:
        return None, x.numel()
    planes = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    format_ = torch.contiguous_format if planes else torch.channels_last
    flat = _flat(x.to(torch.float32).contiguous(memory_format=format_))
    found = int(kernels.count(flat))
    if found > most:
        return None, found
    shape, tiles = _plan(x.shape, outputs, window, kernels.TILE)
    out = torch.empty(shape, dtype=torch.float32, memory_format=format_)
    arrays = flat, _flat(laid), _filled(bias, outputs), _flat(out)
    numbers = (*x.shape[2:], x.shape[1], *shape[2:], outputs), window, planes, planes, whole_rows

    def run(begin: int, end: int) -> None:
        kernels.convolve(*arrays, begin, end, *numbers)

    return (out.to(x.dtype) if share(run, tiles, out.numel()) else None), found


@functools.lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, ...], outputs: int, window: tuple[int, ...], tile: int
) -> tuple[tuple[int, int, int, int], int]:
    """Return the shape of a convolution's result, and how many tiles it has."""
    down, across = (
        (full + 2 * window[4 + i] - window[6 + i] * (window[i] - 1) - 1) // window[2 + i] + 1
        for i, full in enumerate(shape[2:])
    )
    return (shape[0], outputs, down, across), shape[0] * -(-down * across // tile)


def linear(x: Tensor, laid: Tensor, bias: Tensor | None, outputs: int, most: float) -> tuple[Tensor | None, int]:
    """Return what a linear layer makes of rows with zeros in them.

    Args:
        x: shape (rows, inputs), float32.
        laid: as ``laid_linear`` returns it.
        bias: shape (outputs,), or ``None``.
        outputs: length of a row of the result.
        most: inputs other than zero above which the answer is ``None``.

    Returns:
        Shape (rows, outputs), or ``None``; and how many inputs were not zero.
    """
    rows, inputs = x.shape
    if rows > _FEW:
        y, found = convolve(x.t()[None, :, None], laid, bias, outputs, _ONE, most, True)
        return (None if y is None else y[0, :, 0].t()), found
    kernels = KERNELS.get()
    if kernels is None:
        return None, x.numel()
    flat = _flat(x.contiguous())
    found = int(kernels.count(flat))
    if found > most:
        return None, found
    out = torch.empty(rows, outputs)
    arrays = flat, _flat(laid), _filled(bias, outputs), _flat(out)

    def run(begin: int, end: int) -> None:
        kernels.linear(*arrays, begin, end, rows, inputs, outputs)

    return (out if share(run, -(-outputs // kernels.OUTPUTS), found * outputs // 16) else None), found


def some_rows(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, most: float) -> tuple[Tensor | None, int]:
    """Return the output of a linear layer where another tensor is not zero, and zero elsewhere.

    Args:
        x: shape (..., inputs).
        weight: shape (outputs, inputs), contiguous, dtype of ``x``.
        bias: shape (outputs,), or ``None``.
        active: shape (..., outputs).
        most: elements of ``active`` other than zero above which the answer is ``None``.

    Returns:
        Shape (..., outputs), or ``None``; and how many elements of ``active`` were not zero.
    """
    kernels = KERNELS.get()
    if kernels is None or x.dtype != torch.float32:
        return None, 0
    wanted = _flat(active.contiguous())
    found = int(kernels.count(wanted))
    if found > most:
        return None, found
    out = torch.zeros(active.shape, dtype=x.dtype)
    places = torch.empty(found, dtype=torch.int64).numpy()
    kernels.list_places(wanted, places)
    arrays = _flat(x.contiguous()), _flat(weight), _flat(weight.new_zeros(0) if bias is None else bias.detach()), places
    result, (outputs, inputs) = _flat(out), weight.shape

    def run(begin: int, end: int) -> None:
        kernels.some_rows(*arrays, result, begin, end, inputs, outputs)

    return (out if share(run, found, found * inputs) else None), found


def share(run: Any, items: int, elements: int) -> bool:
    """Call ``run`` on ranges that cover ``items``, in as many threads as torch uses; False if a kernel failed."""
    parts = min(torch.get_num_threads(), items, elements // _GRAIN)
    if parts <= 1:
        return KERNELS.survive(lambda: run(0, items))
    return in_threads(KERNELS, run, [items * part // parts for part in range(parts + 1)])


def _filled(bias: Tensor | None, outputs: int) -> Any:
    """Return a bias, or zeros, of a length that blocks of outputs fill."""
    if bias is None:
        return _zeros(-(-outputs // 16) * 16)
    if outputs % 16 == 0 and bias.dtype == torch.float32 and bias.is_contiguous():
        return bias.detach().numpy()
    filled = torch.zeros(-(-outputs // 16) * 16)
    filled[:outputs] = bias
    return filled.numpy()


@functools.lru_cache(maxsize=64)
def _zeros(length: int) -> Any:
    return torch.zeros(length).numpy()  # only ever read


def _flat(x: Tensor) -> Any:
    """View the memory of a tensor without gaps as a flat array."""
    x = x.detach() if x.requires_grad else x
    return x.numpy().reshape(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,)).numpy()
