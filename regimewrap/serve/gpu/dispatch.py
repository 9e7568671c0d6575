"""The way to the GPU's products: which rows they serve, in what tiles, what if a kernel fails.

Cheap to import: Triton is loaded when a layer on a GPU is first served.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regimewrap.topk.loading import Kernels

#: Rows for which reading a part of the weight for each beats reading all of it once.
MOST_ROWS = 4
#: Inputs that one program can list.
_LONGEST = 1 << 15
_UNITS, _OUTPUTS, _BLOCK = 32, 128, 256
#: Programs that keep a large device busy.
_PROGRAMS = 512
DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})


def _import() -> ModuleType:
    from regimewrap.serve.gpu import kernels

    return kernels


KERNELS = Kernels(_import, "triton", "run `pip install triton`", "serves layers on the GPU dense")


def serves(rows: int, units: int, dtype: torch.dtype) -> bool:
    """Say whether there are kernels for so many rows, of which so many units are listed."""
    return 0 < rows <= MOST_ROWS and 0 < units <= _LONGEST and dtype in DTYPES and KERNELS.get() is not None


def linear(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | int]:
    """Return what a linear layer makes of a few rows with zeros in them.

    Args:
        x: shape (rows, inputs), on a GPU, contiguous.
        weight_t: the transposed weight, shape (inputs, outputs), contiguous, dtype of ``x``.
        bias: shape (outputs,), or ``None``.

    Returns:
        Shape (rows, outputs), or ``None`` if no kernel serves this; and how many inputs of each row were not zero.
    """
    (rows, inputs), outputs = x.shape, weight_t.shape[1]
    if not serves(rows, inputs, x.dtype):
        return None, x.numel()
    columns = -(-outputs // _OUTPUTS)
    count = max(1, min(_PROGRAMS // (columns * rows), -(-inputs // _UNITS)))
    parts = x.new_empty(count, rows, outputs, dtype=torch.float32)
    out, counts = x.new_empty(rows, outputs), x.new_empty(rows, dtype=torch.int32)

    def work() -> None:
        kernels: Any = KERNELS.module
        units, values = _listed(x, counts)
        kernels.add_rows[columns, rows, count](
            units, values, counts, weight_t, parts, inputs, outputs, PARTS=count, UNITS=_UNITS, OUTPUTS=_OUTPUTS
        )
        kernels.add_parts[(-(-out.numel() // _BLOCK),)](
            parts, bias, out, out.numel(), outputs, BIAS=bias is not None, PARTS=count, BLOCK=_BLOCK
        )

    return (out if KERNELS.survive(work) else None), counts


def some_outputs(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor) -> tuple[Tensor | None, Tensor | int]:
    """Return the outputs of a linear layer where another tensor is not zero, and zero elsewhere.

    Args:
        x: shape (rows, inputs), on a GPU, contiguous.
        weight: shape (outputs, inputs), contiguous, dtype of ``x``.
        bias: shape (outputs,), or ``None``.
        active: shape (rows, outputs), contiguous.

    Returns:
        Shape (rows, outputs), or ``None`` if no kernel serves this; and how much of each row of ``active`` is not zero.
    """
    (rows, inputs), outputs = x.shape, len(weight)
    if not serves(rows, outputs, x.dtype):
        return None, active.numel()
    out, counts = x.new_zeros(rows, outputs), x.new_empty(rows, dtype=torch.int32)

    def work() -> None:
        kernels: Any = KERNELS.module
        units, _ = _listed(active, counts)
        kernels.some_outputs[-(-outputs // 4), rows](
            x, units, counts, weight, bias, out, inputs, outputs, BIAS=bias is not None, UNITS=4, BLOCK=1024
        )

    return (out if KERNELS.survive(work) else None), counts


def _listed(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the units of each row that are not zero and their values; write into ``counts`` how many they are."""
    kernels: Any = KERNELS.module
    units = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    values = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    block = 1 << (x.shape[1] - 1).bit_length()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernels.list_units[(len(x),)](x, units, values, counts, x.shape[1], BLOCK=block, num_warps=8)
    return units, values
