"""The products of few rows on GPUs, compiled by Triton; imported only when a layer on a GPU is served.

First the inputs that are not zero are listed, then one row of the weight is read for each. Sums are float32, and the
work of one output is cut into parts that are added up in a fixed order, so that results repeat. No kernel waits for the
device: how long a list is stays there.
"""

# Triton wants constants in upper case, and no annotations but its own.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_units(x, units, values, counts, inputs, BLOCK: tl.constexpr):
    """List a row's units that are not zero (NaN is not), their values, and how many they are."""
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    value = tl.load(x + row * inputs + place, mask=place < inputs, other=0).to(tl.float32)
    found = value != 0
    to = row * inputs + tl.cumsum(found.to(tl.int32), 0) - 1
    tl.store(units + to, place, mask=found)
    tl.store(values + to, value, mask=found)
    tl.store(counts + row, tl.sum(found.to(tl.int32), 0))


@triton.jit
def add_rows(
    units,
    values,
    counts,
    weight,
    parts,
    inputs,
    outputs,
    PARTS: tl.constexpr,
    UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Add up the weight's rows of one part of a row's list; the weight has a row for each input."""
    row, part = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = column < outputs
    count = tl.load(counts + row)
    total = tl.zeros([OUTPUTS], tl.float32)
    for start in range(part * UNITS, count, PARTS * UNITS):
        place = start + tl.arange(0, UNITS)
        here = place < count
        unit = tl.load(units + row * inputs + place, mask=here, other=0).to(tl.int64)
        value = tl.load(values + row * inputs + place, mask=here, other=0)
        read = weight + unit[:, None] * outputs + column[None, :]
        rows = tl.load(read, mask=here[:, None] & inside[None, :], other=0).to(tl.float32)
        total += tl.sum(value[:, None] * rows, axis=0)
    tl.store(parts + (part * tl.num_programs(1) + row) * outputs + column, total, mask=inside)


@triton.jit
def add_parts(parts, bias, out, size, outputs, BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the parts of each output, and the bias."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * size + place, mask=inside, other=0)
    if BIAS:
        total += tl.load(bias + place % outputs, mask=inside, other=0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def some_outputs(
    x, units, counts, weight, bias, out, inputs, outputs, BIAS: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the listed outputs of a linear layer; the weight has a row for each output."""
    row = tl.program_id(1)
    count = tl.load(counts + row)
    start = tl.program_id(0) * UNITS
    if start < count:
        place = start + tl.arange(0, UNITS)
        here = place < count
        unit = tl.load(units + row * outputs + place, mask=here, other=0).to(tl.int64)
        total = tl.zeros([UNITS], tl.float32)
        for first in range(0, inputs, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < inputs
            value = tl.load(x + row * inputs + column, mask=inside, other=0).to(tl.float32)
            read = weight + unit[:, None] * inputs + column[None, :]
            rows = tl.load(read, mask=here[:, None] & inside[None, :], other=0).to(tl.float32)
            total += tl.sum(value[None, :] * rows, axis=1)
        if BIAS:
            total += tl.load(bias + unit, mask=here, other=0).to(tl.float32)
        tl.store(out + row * outputs + unit, total.to(out.dtype.element_ty), mask=here)
