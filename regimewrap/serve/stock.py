"""Skipping the zeros of a layer's input with torch alone.

``embedding_bag`` adds up weighted rows of a table, each sample its own rows, and reads no others: with the transposed
weight as the table that is a linear layer which skips the zeros of its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: What ``embedding_bag`` takes on a CPU.
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def rows(x: Tensor, weight_t: Tensor, bias: Tensor | None, most: float) -> tuple[Tensor | None, int]:
    """Return what a linear layer makes of rows with zeros in them.

    Args:
        x: shape (rows, inputs).
        weight_t: the transposed weight, shape (inputs, outputs), contiguous, dtype of ``x``.
        bias: shape (outputs,), or ``None``.
        most: inputs other than zero above which the answer is ``None``, for then the dense layer is faster.

    Returns:
        Shape (rows, outputs), or ``None``; and how many inputs were not zero.
    """
    count = len(x)
    places = x.nonzero()
    found = len(places)
    if found > most:
        return None, found
    if found == 0:
        y = x.new_zeros(count, weight_t.shape[1])
        return (y if bias is None else y + bias), found
    row, unit = places.unbind(1)
    if count == 1:
        # A bag is the work of one thread, so that one row is cut into as many bags as there are threads.
        bags = min(torch.get_num_threads(), found)
        offsets = torch.arange(bags) * (found // bags)
        values = x[0].index_select(0, unit)
    else:
        offsets = torch.searchsorted(row.contiguous(), torch.arange(count))
        values = x[row, unit]
    y = F.embedding_bag(unit, weight_t, offsets, mode="sum", per_sample_weights=values)
    if count == 1 and len(y) > 1:
        y = y.sum(0, keepdim=True)
    return (y if bias is None else y.add_(bias)), found
