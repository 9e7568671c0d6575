"""The way to the compiled kernels that pack on GPUs; where they do not serve, the caller packs in plain torch.

Cheap to import: Triton is imported when the first tensor on a GPU comes. Nothing here waits for the device.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from regimewrap.topk.gpu import reason

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_state: dict[str, Any] = {"kernels": None, "usable": True}


def note_nonzero(flat: Tensor, bits: Tensor) -> Tensor | None:
    """Do what ``cpu.note_nonzero`` does, for memory on a GPU; counts are for blocks of ``triton_packing``."""
    kernels = _kernels()
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
    kernels = _kernels()
    if kernels is None:
        return False
    try:
        with torch.cuda.device_of(operands[0]):  # type: ignore[no-untyped-call]
            getattr(kernels, kernel)[(-(-n // kernels.BLOCK),)](*operands, n, BLOCK=kernels.BLOCK)
    except Exception as error:  # noqa: BLE001  a kernel that does not build must not end a training run
        _give_up(error)
        return False
    return True


def _kernels() -> ModuleType | None:
    if _state["usable"] and _state["kernels"] is None:
        try:
            from regimewrap.topk import triton_packing
        except Exception as error:  # noqa: BLE001  whatever a broken installation throws, training goes on
            _give_up(error)
        else:
            _state["kernels"] = triton_packing
    kernels: ModuleType | None = _state["kernels"] if _state["usable"] else None
    return kernels


def _give_up(error: Exception) -> None:
    """Pack in plain torch for the rest of the process, and say so once."""
    _state["usable"] = False
    warnings.warn(
        f"regimewrap packs activations on the GPU in plain torch: same results, slower ({reason(error)}).",
        RuntimeWarning,
        stacklevel=2,
    )
