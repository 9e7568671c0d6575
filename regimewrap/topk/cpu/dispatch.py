"""The way to the compiled CPU kernels: which tensors they serve, how rows are shared among threads, what if they fail.

This file must be cheap to import and never import numba by itself: that takes half a second, and compiling a few more,
once per dtype and machine (numba keeps the result on disk). Where no kernel serves, the caller selects in plain torch.

Why numba: 16 rows of 65,536 float32 after a ReLU at keep ratio 0.2, one thread of an AMD EPYC with AVX-512 that other
work shared, torch 2.14.1, numba 0.68, nanoseconds per element: numba 0.6, the same search in C++ through
``torch.utils.cpp_extension`` 0.8, bisection in torch operations through Inductor 10, ``torch.topk`` 19. Numba is
installed as a wheel and compiles in 3 s; the other two took 53 s and 58 s and need a C++ compiler.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regimewrap.errors import to_install
from regimewrap.topk.loading import Kernels
from regimewrap.topk.selection import INTEGERS, Selection, is_outermost, memory_rows

if TYPE_CHECKING:
    from collections.abc import Callable

#: Elements below which a tensor does not make us load numba.
_WORTH_LOADING = 1 << 12
#: Elements that keep a thread busy for longer than it takes to wake it.
_GRAIN = 1 << 16
#: What copying an element takes, of the time that ranking one takes.
_COPY = 0.25
#: Units in a row that a kernel does not count.
_TOO_LONG = 1 << 31

_SCORES = {"magnitude": 0, "value": 1, "positive": 2}


def gate(
    x: Tensor, y: Tensor, bits: Tensor, ratio: float, selection: Selection, full: tuple[int, int] = (0, 0)
) -> bool:
    """Write the gated ``x`` to ``y``, and which units were kept to ``bits`` unless that is empty.

    Args:
        x: on the CPU, any strides, at least one element.
        y: ``torch.empty_like(x)``.
        bits: uint8, one bit for each element in the order of ``y``'s memory, or empty.
        ratio: effective keep ratio, in (0, 1).
        selection: what is ranked with what.
        full: the entries of the first dimension that keep all their units, and do not compete; not all of them.

    Returns:
        False if no kernel serves this tensor; ``y`` and ``bits`` are then undefined.
    """
    kernels = _kernels(x)
    blocks = memory_rows(y, selection)
    if kernels is None or blocks is None or (full[1] > full[0] and not is_outermost(y)):
        return False
    if blocks[1] >= _TOO_LONG:
        _tell_of_long_rows()
        return False
    outer, units, inner = blocks
    source, result, packed = _flat(_laid_like(x, y)), _flat(y), bits.numpy()
    active, exact = selection.relative_to == "active", selection.ties == "exact"
    how = ratio, active, exact, _SCORES[selection.score], *_limits(x.dtype)
    if selection.scope == "batch":
        whole = _scaled(full, source.size, y)
        return KERNELS.survive(lambda: kernels.gate_whole(source, result, packed, whole, how))
    # Rows that do not fill bytes are packed eight at a time.
    step = 1 if packed.size == 0 or units * inner % 8 == 0 else 8
    full = _scaled(full, outer, y)

    def run(start: int, stop: int) -> None:
        kernels.gate_blocks(source, result, packed, start, stop, full, units, inner, how)

    return _share(run, outer, step, x.numel(), full)


def _scaled(full: tuple[int, int], items: int, y: Tensor) -> tuple[int, int]:
    """Say which of the items that a tensor falls into, in the order of memory, these entries of dimension 0 are."""
    return (full[0] * items // y.shape[0], full[1] * items // y.shape[0]) if full[1] > full[0] else (0, 0)


def cut(x: Tensor, y: Tensor, bits: Tensor, threshold: Tensor, score: str, full: tuple[int, int] = (0, 0)) -> bool:
    """Write the units of ``x`` that reach a threshold to ``y``, and zero elsewhere.

    Args:
        x: on the CPU, any strides, at least one element.
        y: ``torch.empty_like(x)``.
        bits: as for ``gate``.
        threshold: 0-d, on the CPU; rounded to the dtype of ``x``.
        score: "magnitude", or "positive" for the magnitude after a ReLU, which is then applied.
        full: as for ``gate``.

    Returns:
        False if no kernel serves this tensor; ``y`` and ``bits`` are then undefined.
    """
    kernels = _kernels(x)
    if kernels is None or (full[1] > full[0] and not is_outermost(y)):
        return False
    source, result, packed = _flat(_laid_like(x, y)), _flat(y), bits.numpy()
    pivot = _flat(threshold.to(x.dtype))[0]
    settings = _scaled(full, source.size, y), pivot, (_SCORES[score], *_limits(x.dtype))

    def run(start: int, stop: int) -> None:
        kernels.cut(source, result, packed, start, stop, *settings)

    return _share(run, source.size, 8, source.size)


def count(x: Tensor, counts: Tensor, after_relu: bool, shift: int) -> bool:
    """Add the magnitudes of ``x`` to a histogram of the top bits of their floats.

    Args:
        x: float32, on the CPU, any strides, at least one element.
        counts: int64, one bin for each pattern of the top bits from zero to infinity. NaN is not counted.
        after_relu: count ``relu(x)`` instead.
        shift: low bits that a bin leaves open.

    Returns:
        False if no kernel serves this tensor; ``counts`` is then as it was.
    """
    kernels = _kernels(x)
    if kernels is None or x.numel() >= 1 << 32:  # more than a kernel counts
        return False
    source, parts = _flat(_laid_like(x, torch.empty_like(x))), []
    how = _SCORES["positive" if after_relu else "magnitude"], *_limits(x.dtype)

    def run(start: int, stop: int) -> None:
        parts.append(kernels.count(source, start, stop, how, shift))

    if not _share(run, source.size, 1, source.size):
        return False
    for part in parts:
        counts += torch.from_numpy(part)
    return True


def mask_gradient(grad: Tensor, bits: Tensor, out: Tensor) -> bool:
    """Write ``grad`` to ``out`` where a bit is set, and zero elsewhere.

    Args:
        grad: on the CPU, at least one element, strides of ``out``, no lazy negation.
        bits: as ``gate`` wrote them.
        out: fills its memory without gaps.

    Returns:
        False if no kernel serves this tensor; ``out`` is then undefined.
    """
    kernels = _kernels(grad)
    if kernels is None or grad.dtype not in INTEGERS:
        return False
    source, result, packed = _flat(grad), _flat(out), bits.numpy()

    def run(start: int, stop: int) -> None:
        kernels.mask_gradient(source, packed, result, start, stop)

    return _share(run, packed.size, 1, grad.numel())


@functools.cache
def _tell_of_long_rows() -> None:
    warnings.warn(
        f"regimewrap selects in plain torch among {_TOO_LONG} units or more: same results, 10 to 20 times slower.",
        RuntimeWarning,
        stacklevel=2,
    )


def _laid_like(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x``, or a copy of it, with the strides of ``y`` and its values in memory."""
    return torch.empty_like(y).copy_(x) if x.stride() != y.stride() or x.is_neg() else x


def _flat(x: Tensor) -> Any:
    """View the memory of a tensor without gaps as a flat numpy array of integers."""
    bits = x.view(INTEGERS[x.dtype][0])
    return bits.numpy().reshape(-1) if bits.is_contiguous() else bits.as_strided((x.numel(),), (1,)).numpy()


@functools.cache
def _limits(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the bits of infinity, and the largest integer as wide, in that integer's numpy type."""
    integer, infinity = INTEGERS[dtype]
    scalar = torch.empty(0, dtype=integer).numpy().dtype.type
    return scalar(infinity), scalar(torch.iinfo(integer).max)


def _import() -> ModuleType:
    import numba

    if getattr(numba.config, "DISABLE_JIT", False):
        raise ImportError("numba's compiler is switched off by NUMBA_DISABLE_JIT")
    from regimewrap.topk.cpu import kernels as numba_kernels

    return numba_kernels


KERNELS = Kernels(
    _import,
    "numba",
    to_install("fast"),
    "selects on the CPU in plain torch: same results, 10 to 20 times slower",
)


def _kernels(x: Tensor) -> ModuleType | None:
    if sys.byteorder != "little" or (KERNELS.module is None and x.numel() < _WORTH_LOADING):
        return None
    return KERNELS.get()


def _share(
    run: Callable[[int, int], None], items: int, step: int, elements: int, full: tuple[int, int] = (0, 0)
) -> bool:
    """Call ``run`` on ranges that cover ``items``, in as many threads as torch uses; False if a kernel failed."""
    parts = min(torch.get_num_threads(), elements // _GRAIN, items // step)
    return in_threads(KERNELS, run, _bounds(items, step, parts, full) if parts > 1 else [0, items])


def in_threads(kernels: Kernels, run: Callable[[int, int], None], bounds: list[int]) -> bool:
    """Call ``run`` on each range from one bound to the next, in threads of their own; False if a kernel failed."""
    parts = len(bounds) - 1
    if parts <= 1:
        return kernels.survive(lambda: run(*bounds))

    def work() -> None:
        pool = _pool(torch.get_num_threads())
        others = [pool.submit(run, *bounds[part : part + 2]) for part in range(1, parts)]
        try:
            run(*bounds[:2])
        finally:
            wait(others)  # no thread may write to the tensor once we have returned
        for other in others:
            other.result()

    return kernels.survive(work)


def _bounds(items: int, step: int, parts: int, full: tuple[int, int]) -> list[int]:
    """Divide items into ranges of equal work, at multiples of ``step``; those in ``full`` are only copied."""
    first, light = full[0], full[1] - full[0]
    bounds = []
    for part in range(parts):
        place = (items - light * (1 - _COPY)) * part / parts  # in items that are ranked
        if place > first + light * _COPY:
            place += light * (1 - _COPY)
        elif place > first:
            place = first + (place - first) / _COPY
        bounds.append(int(place) // step * step)
    return [*bounds, items]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Threads of our own: numba's would need a layer that is safe to fork and to enter from several threads at once,
    # and none on Linux is both.
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="regimewrap")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
