"""Skipping zeros gives what the slow reference gives."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from regimewrap.serve import reference, stock
from regimewrap.serve.cpu import dispatch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def input_with_zeros(rows, inputs, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator)
    return torch.where(torch.rand(rows, inputs, generator=generator) < density, x, 0.0).to(dtype)


def same(a, b, tolerance):
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, tolerance, tolerance, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 33]),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_stock_torch_adds_up_what_the_reference_does(rows, inputs, outputs, density, dtype, biased, seed):
    x = input_with_zeros(rows, inputs, density, dtype, seed)
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed)).to(dtype) / inputs**0.5
    bias = torch.linspace(-1, 1, outputs).to(dtype) if biased else None

    y, found = stock.rows(x, weight, bias, math.inf)

    assert found == int(torch.count_nonzero(x))
    assert same(y, reference.rows(x, weight, bias), TOLERANCE[dtype])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_is_shared_among_threads(threads):
    x, weight = input_with_zeros(1, 50, 0.3, torch.float32, 0), torch.randn(50, 20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, _ = stock.rows(x, weight, None, math.inf)
    finally:
        torch.set_num_threads(before)
    assert same(y, reference.rows(x, weight), 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_not_finite_comes_through(value, rows):
    x, weight = input_with_zeros(rows, 30, 0.2, torch.float32, 1), torch.randn(30, 8)
    x[0, 7] = value
    y, _ = stock.rows(x, weight, None, math.inf)
    assert same(y, x @ weight, 1e-4)
    assert not y[0].isfinite().any()


def test_more_than_asked_for_is_not_computed():
    x = input_with_zeros(2, 30, 0.5, torch.float32, 1)
    found = int(torch.count_nonzero(x))
    assert stock.rows(x, torch.randn(30, 8), None, found - 1) == (None, found)
    assert stock.rows(x, torch.randn(30, 8), None, found)[0] is not None


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 8, 33, 70]),
    inputs=st.sampled_from([1, 5, 64, 130, 300]),
    outputs=st.sampled_from([1, 10, 16, 48, 128, 200]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    biased=st.booleans(),
    threads=st.integers(1, 3),
)
def test_compiled_rows_add_up_what_the_reference_does(rows, inputs, outputs, density, biased, threads):
    pytest.importorskip("numba")
    x = input_with_zeros(rows, inputs, density, torch.float32, 0)
    weight = torch.randn(outputs, inputs) / inputs**0.5
    bias = torch.linspace(-1, 1, outputs) if biased else None
    before, empty = torch.get_num_threads(), torch.empty
    torch.set_num_threads(threads)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
            y, found = dispatch.linear(x, dispatch.laid_linear(weight.t()), bias, outputs, math.inf)
    finally:
        torch.set_num_threads(before)
    assert found == int(torch.count_nonzero(x))
    assert same(y, reference.rows(x, weight.t(), bias), 1e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 33]),
    inputs=st.sampled_from([1, 7, 64, 130]),
    outputs=st.sampled_from([1, 10, 64, 200]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    biased=st.booleans(),
    threads=st.integers(1, 2),
)
def test_rows_that_are_not_asked_for_are_zero_and_the_others_right(rows, inputs, outputs, density, biased, threads):
    pytest.importorskip("numba")
    active = input_with_zeros(rows, outputs, density, torch.float32, 0)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) / inputs**0.5
    bias = torch.linspace(-1, 1, outputs) if biased else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, found = dispatch.some_rows(x, weight, bias, active, math.inf)
    finally:
        torch.set_num_threads(before)
    assert found == int(torch.count_nonzero(active))
    assert same(y, torch.nn.functional.linear(x, weight, bias).masked_fill(active == 0, 0), 1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 40])
def test_what_is_not_finite_comes_through_the_kernels_too(value, rows):
    pytest.importorskip("numba")
    x, weight = input_with_zeros(rows, 70, 0.2, torch.float32, 1), torch.randn(20, 70)
    x[0, 66] = value
    y, _ = dispatch.linear(x, dispatch.laid_linear(weight.t()), None, 20, math.inf)
    assert same(y, x @ weight.t(), 1e-4)
    y, _ = dispatch.some_rows(x, weight, None, torch.ones(rows, 20), math.inf)
    assert same(y, x @ weight.t(), 1e-4)
