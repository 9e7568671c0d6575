"""The way to the compiled kernels that pack on GPUs; where they do not serve, the caller packs in plain torch.

Cheap to import: Triton is imported when the first tensor on a GPU comes. Nothing here waits for the device.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from regimewrap.topk.kernels import Kernels

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _import() -> ModuleType:
    from regimewrap.topk import triton_packing

    return triton_packing


KERNELS = Kernels(
    _import,
    "triton",
    "pip install triton",
    "packs activations on the GPU in plain torch: same results, slower",
)


def note_nonzero(flat: Tensor, bits: Tensor) -> Tensor | None:
    """Do what ``cpu.note_nonzero`` does, for memory on a GPU; counts are for blocks of ``triton_packing``."""
    kernels = KERNELS.get()
    if kernels is None:
        return None
    counts = flat.new_empty(-(-flat.numel() // kernels.BLOCK), dtype=torch.int64)
    return counts if _launch("note_nonzero", _integers(flat), bits, counts, n=flat.numel()) else None


def gather_nonzero(flat: Tensor, values: Tensor, starts: Tensor) -> bool:
    """Do what ``cpu.gather_nonzero`` does, for memory on a GPU."""
    return _launch("gather_nonzero", _integers(flat), _integers(values), starts, n=flat.numel())


def scatter_nonzero(bits: Tensor, values: Tensor, starts: Tensor, flat: Tensor) -> bool:
    """Do what ``cpu.scatter_nonzero`` does, for memory on a GPU."""
    return _launch("scatter_nonzero", bits, _integers(values), starts, _integers(flat), n=flat.numel())


def _integers(flat: Tensor) -> Tensor:
    return flat.view(_INTEGERS[flat.element_size()])


def _launch(kernel: str, *operands: Tensor, n: int) -> bool:
    kernels = KERNELS.get()
    if kernels is None:
        return False

    def work() -> None:
        with torch.cuda.device_of(operands[0]):  # type: ignore[no-untyped-call]
            getattr(kernels, kernel)[(-(-n // kernels.BLOCK),)](*operands, n, BLOCK=kernels.BLOCK)

    return KERNELS.survive(work)
