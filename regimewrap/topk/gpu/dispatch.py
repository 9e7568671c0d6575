"""The way to the compiled GPU kernels: which tensors they serve, in what tiles, what if they fail.

Cheap to import: Triton is imported when the first tensor on a GPU comes. No kernel waits for the device, and none holds
on to a keep ratio: it comes from the host with each call. Where no kernel serves, the caller selects in plain torch.
"""

from __future__ import annotations

import functools
import struct
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regimewrap.topk.loading import Kernels
from regimewrap.topk.plain import pack_bits
from regimewrap.topk.selection import INTEGERS, Selection, is_outermost, memory_rows, units_kept, without

#: Bytes of keys that a multiprocessor holds in registers while it looks for a threshold.
_ON_CHIP = 1 << 17
#: Units of a long row that are drawn to bound its threshold, by the row's length.
_SAMPLES = ((1 << 18, 1 << 14), (1 << 12, 1 << 12))
#: Units of a long row that are looked at together.
_BLOCK = 1 << 13
#: Rows so few and long that one program for each would leave the device idle.
_FEW, _LONG = 16, 1 << 20
#: Units in a row that a kernel does not count.
_TOO_LONG = 1 << 30
#: Programs in a grid.
_MOST_PROGRAMS = (1 << 31) - 1

_SCORES = ("magnitude", "value", "positive")


def gate(
    x: Tensor, y: Tensor, bits: Tensor, ratio: float, selection: Selection, full: tuple[int, int] = (0, 0)
) -> bool:
    """Write the gated ``x``, which is on a GPU, to ``y``; all else is as for the CPU's ``gate``."""
    if full[1] > full[0]:
        return _gate_others(x, y, bits, ratio, selection, full)
    kernels = KERNELS.get()
    launch = _launch(y.shape, y.stride(), y.dtype, bits.numel() > 0, selection) if kernels is not None else None
    if launch is None:
        return False
    if x.stride() != y.stride() or x.is_neg():
        x = torch.empty_like(y).copy_(x)
    integer, _ = INTEGERS[x.dtype]
    written = bits.new_empty(x.numel()) if launch.as_bytes else bits
    operands = [x.view(integer), y.view(integer), written]
    if launch.capacity:
        operands.append(bits.new_empty(launch.capacity, dtype=torch.int64 if x.element_size() == 8 else torch.int32))
    share = units_kept(launch.units, ratio), struct.unpack("<q", struct.pack("<d", ratio))[0]

    def work() -> None:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            getattr(kernels, launch.kernel)[launch.grid](*operands, *launch.sizes, *share, **launch.constants)

    if not KERNELS.survive(work):
        return False
    if launch.as_bytes:
        bits.copy_(pack_bits(written))
    return True


def _gate_others(x: Tensor, y: Tensor, bits: Tensor, ratio: float, selection: Selection, full: tuple[int, int]) -> bool:
    """Copy what is kept in full, and gate the others, which is a tensor of its own: an end of memory was left out."""
    start, stop = full
    size = y.numel() // y.shape[0]  # elements in an entry of dimension 0
    border = (stop if start == 0 else start) * size
    if not is_outermost(y) or (bits.numel() and border % 8):
        return False
    inside, outside = (
        (bits[: border // 8], bits[border // 8 :]) if start == 0 else (bits[border // 8 :], bits[: border // 8])
    )
    if not gate(without(x, *full), without(y, *full), outside, ratio, selection):
        return False
    copied = x[start:stop]
    if selection.score == "positive":
        torch.clamp_min(copied, 0, out=y[start:stop])  # as torch.relu does
    else:
        y[start:stop] = copied
    inside.fill_(0xFF)
    return True


class _Launch(NamedTuple):
    """How one kernel is called for tensors of one kind.

    Attributes:
        kernel: its name.
        grid: programs.
        units: of a row.
        sizes: its whole numbers, before k.
        constants: what it is compiled for.
        as_bytes: whether it writes what it kept as bytes, which are yet to be packed.
        capacity: elements of scratch memory.
    """

    kernel: str
    grid: tuple[int]
    units: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    as_bytes: bool
    capacity: int = 0


@functools.lru_cache(maxsize=4096)
def _launch(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, saves: bool, selection: Selection
) -> _Launch | None:
    """Say how a dense tensor like this is gated; ``None`` if no kernel serves it."""
    rows = memory_rows(torch.empty_strided(shape, stride, dtype=dtype, device="meta"), selection)
    if rows is None:
        return None
    if rows[1] >= _TOO_LONG:
        _tell_of_long_rows()
        return None
    outer, units, inner = rows
    kernels: Any = KERNELS.module
    saved = kernels.NOTHING
    if saves:
        packed = kernels.ALONG_UNITS if inner == 1 else kernels.ALONG_POSITIONS
        saved = packed if (units if inner == 1 else inner) % 8 == 0 else kernels.BYTES
    constants = {
        "SCORE": _SCORES.index(selection.score),
        "ACTIVE": selection.relative_to == "active",
        "EXACT": selection.ties == "exact",
        "SAVED": saved,
        "INFINITY": INTEGERS[dtype][1],
    }
    tile = _tile(units, inner, max(4, dtype.itemsize))
    if tile is not None:
        programs = -(-outer // tile[0]) if inner == 1 else outer * -(-inner // tile[0])
        warps = min(32, max(4, tile[0] * tile[1] // 512))
        constants |= {"TOGETHER": inner == 1, "ROWS": tile[0], "BLOCK": tile[1], "num_warps": warps}
        launch = _Launch("gate_tile", (programs,), units, (outer, units, inner), constants, saved == kernels.BYTES)
    else:
        sample = next((sample for least, sample in _SAMPLES if units >= least), 0)
        if inner > 1 or not sample or (outer < _FEW and units >= _LONG):
            return None
        programs, capacity = outer, max(2 * sample, units // 16)
        constants |= {"SAMPLE": sample, "BLOCK": _BLOCK, "num_warps": 16}
        launch = _Launch(
            "gate_long_row",
            (programs,),
            units,
            (units, capacity),
            constants,
            saved == kernels.BYTES,
            outer * capacity,
        )
    return launch if programs <= _MOST_PROGRAMS else None


def _tile(units: int, inner: int, size: int) -> tuple[int, int] | None:
    """Return (rows, units) of what one program holds on chip, in keys of ``size`` bytes; ``None`` for longer rows."""
    block = max(8, 1 << (units - 1).bit_length())
    # Neighbours in memory are neighbouring rows if ``inner`` > 1: a few of them fill a transaction.
    rows = max(1, 2048 // block) if inner == 1 else max(8, min(64, 8192 // block))
    return (rows, block) if rows * block * size <= _ON_CHIP and units * inner < 1 << 31 else None


def mask_gradient(grad: Tensor, bits: Tensor, out: Tensor) -> bool:
    """Write ``grad``, which is on a GPU, to ``out`` where a bit is set; all else is as on the CPU."""
    kernels = KERNELS.get()
    programs = -(-grad.numel() // 1024)
    if kernels is None or grad.dtype not in INTEGERS or programs > _MOST_PROGRAMS:
        return False
    integer, _ = INTEGERS[grad.dtype]

    def work() -> None:
        with torch.cuda.device_of(grad):  # type: ignore[no-untyped-call]
            kernels.mask_gradient[(programs,)](grad.view(integer), bits, out.view(integer), grad.numel(), BLOCK=1024)

    return KERNELS.survive(work)


def _import() -> ModuleType:
    from regimewrap.topk.gpu import kernels as triton_kernels

    return triton_kernels


KERNELS = Kernels(
    _import,
    "triton",
    "run `pip install triton`",
    "selects on the GPU in plain torch: same results, several times slower",
)


@functools.cache
def _tell_of_long_rows() -> None:
    warnings.warn(
        f"regimewrap selects on the GPU in plain torch among {_TOO_LONG} units or more: same results, slower.",
        RuntimeWarning,
        stacklevel=2,
    )
