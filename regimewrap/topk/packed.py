"""Memory of mostly zeros, kept as one bit an element and the elements that are not zero; and back, bit for bit.

Zero is the bit pattern of +0.0 alone: -0.0 and NaN count as values and come back with the bits they had. Nothing here
knows of shapes or autograd: what is packed is flat memory.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import final

import torch
from torch import Tensor

from regimewrap.topk import cpu, gpu_packing, plain

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Last(threading.local):
    """The memory that this thread unpacked last."""

    packed: Callable[[], Packed | None] = staticmethod(lambda: None)


_last = _Last()


@final
class Packed:
    """Flat memory, packed if that makes it smaller.

    Args:
        flat: one dimension, contiguous, elements of 2, 4 or 8 bytes, at least one.

    How much there is to store is known only when the elements have been counted. On the CPU that is at once; elsewhere
    the count is on its way to the host while the device works on, and ``settle`` waits for it.
    """

    def __init__(self, flat: Tensor) -> None:
        self._flat: Tensor | None = flat
        self._version = flat._version
        self._n = flat.numel()
        self._bits = flat.new_empty((self._n + 7) // 8, dtype=torch.uint8)
        self._values = flat.new_empty(0)
        # Where each block's values begin, if the compiled kernels made them.
        self._starts: Tensor | None = None
        self._arrived: torch.Event | None = None
        # What was unpacked last stays until something else is: a ReLU and the layer behind it save one activation.
        self._unpacked: Tensor | None = None
        counts = _way(flat).note_nonzero(flat, self._bits) if flat.is_cpu or flat.is_cuda else None
        if counts is not None:
            self._starts = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
            count = self._starts[-1]
        else:
            mask = _as_integers(flat) != 0
            self._bits.copy_(plain.pack_bits(mask))
            count = mask.sum()
        self._count: Tensor | None = count.to("cpu", non_blocking=True)
        if flat.is_cuda:
            self._arrived = torch.Event(flat.device)
            self._arrived.record()

    def settle(self) -> None:
        """Pack, or let the memory be where packing would not make it smaller; waits for the count."""
        if self._flat is None or self._count is None or self._flat._version != self._version:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        flat, count = self._flat, int(self._count)
        self._count = None
        if self._bits.numel() + count * flat.element_size() >= self._n * flat.element_size():
            self._bits = self._bits.new_empty(0)
            self._starts = None
            return
        values = flat.new_empty(count)
        if self._starts is not None and not _way(flat).gather_nonzero(flat, values, self._starts):
            self._starts = None
        if self._starts is None:
            mask = plain.unpack_bits(self._bits, self._n)
            if flat.is_cpu:
                torch.masked_select(flat, mask, out=values)
            elif count:
                # Its size is known by now, and masked_select would wait for the device to find it out again.
                wanted = torch.arange(1, count + 1, dtype=_counter(self._n), device=flat.device)
                values = flat[torch.searchsorted(_ranks(mask), wanted)]
        self._values, self._flat = values, None

    def unpack(self) -> Tensor:
        """Return the memory as it was, not to be changed: the very one if it has not been packed.

        Raises:
            RuntimeError: it has not been packed, and was changed in place.
        """
        if self._flat is not None:
            require_unchanged(self._flat, self._version)
            return self._flat
        flat = self._unpacked
        if flat is None or flat._version:
            last = _last.packed()
            if last is not None:
                last._unpacked = None
            flat = self._unpacked = self._scatter()
            _last.packed = weakref.ref(self)
        return flat

    def _scatter(self) -> Tensor:
        if self._starts is not None:
            flat = self._values.new_empty(self._n)
            if _way(flat).scatter_nonzero(self._bits, self._values, self._starts, flat):
                return flat
        mask = plain.unpack_bits(self._bits, self._n)
        if self._values.is_cpu:
            return self._values.new_zeros(self._n).masked_scatter_(mask, self._values)
        if not self._values.numel():
            return self._values.new_zeros(self._n)
        places = _ranks(mask).sub_(1).clamp_min_(0)
        return self._values.index_select(0, places).masked_fill_(~mask, 0)


@final
class Signs:
    """Which elements of flat memory are above zero or NaN, one bit each.

    Args:
        flat: as for ``Packed``; nothing of it is kept.
    """

    def __init__(self, flat: Tensor) -> None:
        self._like, self._n = flat.new_empty(0), flat.numel()
        self._bits = flat.new_empty((self._n + 7) // 8, dtype=torch.uint8)
        positive = flat.clamp_min(0).add_(0.0)  # which makes +0.0 of -0.0 and leaves NaN
        if not flat.is_cpu or cpu.note_nonzero(positive, self._bits) is None:
            self._bits.copy_(plain.pack_bits(positive != 0))

    def unpack(self) -> Tensor:
        """Return 1 where the memory was above zero or NaN, and 0 elsewhere, in its dtype."""
        ones = self._like.new_ones(self._n)
        if ones.is_cpu:
            flat = torch.empty_like(ones)
            if cpu.mask_gradient(ones, self._bits, flat):
                return flat
        return ones.mul_(plain.unpack_bits(self._bits, self._n))


def require_unchanged(tensor: Tensor, version: int) -> None:
    """Raise what torch raises if a saved tensor was changed in place; it does not look where there are hooks.

    Raises:
        RuntimeError: the tensor's version is not ``version``.
    """
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; "
            f"expected version {version} instead."
        )


def _way(flat: Tensor) -> ModuleType:
    """Return where the compiled kernels for a CPU or a GPU are."""
    return cpu if flat.is_cpu else gpu_packing


def _as_integers(flat: Tensor) -> Tensor:
    return flat.view(_INTEGERS[flat.element_size()])


def _counter(n: int) -> torch.dtype:
    return torch.int32 if n < 1 << 31 else torch.int64


def _ranks(mask: Tensor) -> Tensor:
    """Return, for each element, how many are set up to and including it."""
    return mask.cumsum(0, dtype=_counter(mask.numel()))
