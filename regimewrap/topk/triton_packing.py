"""Packing on GPUs, compiled by Triton; imported only when a tensor there asks for it.

The same three steps as ``numba_kernels`` takes, on flat integer views, a block to a program. It knows nothing of torch.
"""

# Triton wants constants in upper case and no annotations but its own.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

#: Elements of a block.
BLOCK = 4096


@triton.jit
def note_nonzero(x, bits, counts, n, BLOCK: tl.constexpr):
    """Set the bits of the elements of ``x`` that are not zero, lowest first, and count them for each block."""
    block = tl.program_id(0).to(tl.int64)
    places = block * BLOCK + tl.arange(0, BLOCK)
    ones = (tl.load(x + places, mask=places < n, other=0) != 0).to(tl.int32)
    tl.store(counts + block, tl.sum(ones, 0).to(tl.int64))
    packed = tl.sum(tl.reshape(ones << (tl.arange(0, BLOCK) % 8), (BLOCK // 8, 8)), 1)
    spots = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(bits + spots, packed.to(tl.uint8), mask=spots < (n + 7) // 8)


@triton.jit
def gather_nonzero(x, values, starts, n, BLOCK: tl.constexpr):
    """Copy the elements of ``x`` that are not zero to ``values``; those of a block begin at its entry in ``starts``."""
    block = tl.program_id(0).to(tl.int64)
    places = block * BLOCK + tl.arange(0, BLOCK)
    elements = tl.load(x + places, mask=places < n, other=0)
    ones = (elements != 0).to(tl.int32)
    ranks = tl.cumsum(ones, 0) - ones
    tl.store(values + tl.load(starts + block) + ranks, elements, mask=ones != 0)


@triton.jit
def scatter_nonzero(bits, values, starts, out, n, BLOCK: tl.constexpr):
    """Undo ``gather_nonzero``: write the next value where a bit is set and zero elsewhere."""
    block = tl.program_id(0).to(tl.int64)
    places = block * BLOCK + tl.arange(0, BLOCK)
    ones = (tl.load(bits + places // 8, mask=places < n, other=0).to(tl.int32) >> (places % 8).to(tl.int32)) & 1
    ranks = tl.cumsum(ones, 0) - ones
    elements = tl.load(values + tl.load(starts + block) + ranks, mask=ones != 0, other=0)
    tl.store(out + places, elements, mask=places < n)
