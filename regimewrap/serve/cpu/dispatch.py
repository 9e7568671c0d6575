"""The way to the compiled products: layouts, how tiles are shared among threads, what if a kernel fails.

Cheap to import: numba is loaded when a layer is first served.
"""

from __future__ import annotations

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


def convolve(
    x: Tensor,
    laid: Tensor,
    bias: Tensor | None,
    outputs: int,
    window: tuple[int, ...],
    most: float,
) -> tuple[Tensor | None, int]:
    """Return what a convolution makes of images with zeros in them.

    Args:
        x: shape (images, channels, height, width), on the CPU, any strides.
        laid: as ``laid_convolution`` returns it.
        bias: shape (outputs,), or ``None``.
        outputs: channels of the result.
        window: height, width; then stride, padding and dilation, two each.
        most: inputs other than zero above which the answer is ``None``.

    Returns:
        Shape (images, outputs, height, width), in the dtype and memory format of ``x``, or ``None``; and how many
        inputs were not zero.
    """
    kernels = KERNELS.get()
    if kernels is None:
        return None, x.numel()
    planes = not x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()
    format_ = torch.contiguous_format if planes else torch.channels_last
    source = x.detach().to(torch.float32).contiguous(memory_format=format_)
    flat = _flat(source)
    found = int(kernels.count(flat))
    if found > most:
        return None, found
    images, channels, height, width = x.shape
    size = [
        (full + 2 * window[4 + i] - window[6 + i] * (window[i] - 1) - 1) // window[2 + i] + 1
        for i, full in enumerate((height, width))
    ]
    out = torch.empty((images, outputs, *size), dtype=torch.float32, memory_format=format_)
    settings = (
        flat, _flat(laid), _filled(bias, outputs), _flat(out),
        (height, width, channels, *size, outputs), window, planes, planes,
    )  # fmt: skip
    tiles = images * -(-size[0] * size[1] // kernels.TILE)
    if not share(lambda begin, end: kernels.convolve(*settings[:4], begin, end, *settings[4:]), tiles, out.numel()):
        return None, found
    return out.to(x.dtype), found


def linear(x: Tensor, laid: Tensor, bias: Tensor | None, outputs: int, most: float) -> tuple[Tensor | None, int]:
    """Return what a linear layer makes of rows with zeros in them.

    Args:
        x: shape (rows, inputs), float32.
        laid: as ``laid_convolution`` returns it, of the weight as a window of one.
        bias: shape (outputs,), or ``None``.
        outputs: length of a row of the result.
        most: inputs other than zero above which the answer is ``None``.

    Returns:
        Shape (rows, outputs), or ``None``; and how many inputs were not zero.
    """
    rows, inputs = x.shape
    if rows > _FEW:
        y, found = convolve(x.t()[None, :, None], laid, bias, outputs, (1, 1, 1, 1, 0, 0, 1, 1), most)
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
    parts = max(1, min(torch.get_num_threads(), items, elements // _GRAIN))
    return in_threads(KERNELS, run, [items * part // parts for part in range(parts + 1)])


def _filled(bias: Tensor | None, outputs: int) -> Any:
    filled = torch.zeros(-(-outputs // 16) * 16)
    if bias is not None:
        filled[:outputs] = bias
    return filled.numpy()


def _flat(x: Tensor) -> Any:
    return x.as_strided((x.numel(),), (1,)).numpy()
