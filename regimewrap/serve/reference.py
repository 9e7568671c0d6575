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
