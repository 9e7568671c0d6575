"""How often a gate cuts anything, counted by the operators themselves while a sample is taken.

Here, and not where a model calls its gate, because a compiled graph runs the operators only. A gate is known by the
memory of its keep ratio, which every call gets.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from regimewrap import torch_private


class GateSample(NamedTuple):
    """What was seen of a gate's calls.

    Attributes:
        calls: how many of them had a keep ratio below 1 and rows to cut.
        bound: in which share of these something that is not zero was cut; 0.0 without calls.
    """

    calls: int
    bound: float


#: By the address of a keep ratio, one 0-d boolean for each call, on the device of the call. Operators look whether it
#: is empty, and do nothing more if it is.
ON: dict[int, list[Tensor]] = {}
_PAUSED: dict[int, list[Tensor]] = {}
#: Ends the sample of a gate that is gone: the next gate may have its keep ratio in the same memory.
_OWNERS: dict[int, weakref.ref[Tensor]] = {}


def begin(keep_ratio: Tensor) -> None:
    """Note the calls with this keep ratio and with dense rows from now on."""
    address = keep_ratio.data_ptr()
    _OWNERS[address] = weakref.ref(keep_ratio, lambda _: _drop(address))
    ON[address] = []


def _drop(address: int) -> list[Tensor]:
    _OWNERS.pop(address, None)
    paused = _PAUSED.pop(address, [])
    return ON.pop(address, paused)


def end(keep_ratio: Tensor) -> GateSample:
    """Return what was noted, and note no more; waits for the devices that the calls were on."""
    seen = _drop(keep_ratio.data_ptr())
    bound = sum(bool(each) for each in seen)
    return GateSample(len(seen), bound / len(seen) if seen else 0.0)


def pause(keep_ratio: Tensor) -> None:
    """Note nothing until ``resume``."""
    seen = ON.pop(keep_ratio.data_ptr(), None)
    if seen is not None:
        _PAUSED[keep_ratio.data_ptr()] = seen


def resume(keep_ratio: Tensor) -> None:
    """Go on noting after a pause; nothing happens if there was none."""
    seen = _PAUSED.pop(keep_ratio.data_ptr(), None)
    if seen is not None:
        ON[keep_ratio.data_ptr()] = seen


def note(x: Tensor, y: Tensor, keep_ratio: Tensor, dense_rows: Tensor | None, score: str) -> None:
    """Note one call; waits for nothing.

    Args:
        x: what came.
        y: what was kept of it.
        keep_ratio: the gate's.
        dense_rows: the gate's; ``None`` in eval mode, which is not noted.
        score: "positive" where a ReLU is a part of the gate; what that cuts does not count.
    """
    seen = ON.get(keep_ratio.data_ptr())
    if seen is None or dense_rows is None or torch_private.in_backward():  # what is recomputed was noted before
        return
    before = torch.ops.aten.relu(x) if score == "positive" else x
    seen.append(torch.count_nonzero(before) != torch.count_nonzero(y))
