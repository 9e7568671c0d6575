"""What a layer returns that skips the zeros of its input: slow and obvious. The kernels are compared with it."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Add up, for each row, one row of the transposed weight for each input that is not zero.

    Args:
        x: shape (rows, inputs).
        weight_t: shape (inputs, outputs).
        bias: shape (outputs,), or ``None``.

    Returns:
        Shape (rows, outputs), in the dtype of ``x``; sums are float64.
    """
    out = torch.zeros(len(x), weight_t.shape[1], dtype=torch.float64)
    for row in range(len(x)):
        for unit in x[row].nonzero().flatten().tolist():
            out[row] += x[row, unit].double() * weight_t[unit].double()
    if bias is not None:
        out += bias.double()
    return out.to(x.dtype)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, window: tuple[int, ...]) -> Tensor:
    """Add up, for each input that is not zero, what it gives to each output pixel whose window it is in.

    Args:
        x: shape (images, channels, height, width).
        weight: shape (outputs, channels, height, width).
        bias: shape (outputs,), or ``None``.
        window: height, width; then stride, padding and dilation, two each.

    Returns:
        Shape (images, outputs, height, width), in the dtype of ``x``; sums are float64.
    """
    tall, wide, *steps = window
    stride, padding, dilation = steps[:2], steps[2:4], steps[4:]
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (window[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    out = torch.zeros(len(x), weight.shape[0], *size, dtype=torch.float64)
    for image, channel, y, xx in x.nonzero().tolist():
        for tap_y in range(tall):
            for tap_x in range(wide):
                down, down_left = divmod(y + padding[0] - tap_y * dilation[0], stride[0])
                along, along_left = divmod(xx + padding[1] - tap_x * dilation[1], stride[1])
                if down_left or along_left or not 0 <= down < size[0] or not 0 <= along < size[1]:
                    continue
                value = x[image, channel, y, xx].double()
                out[image, :, down, along] += value * weight[:, channel, tap_y, tap_x].double()
    if bias is not None:
        out += bias.double().view(-1, 1, 1)
    return out.to(x.dtype)
