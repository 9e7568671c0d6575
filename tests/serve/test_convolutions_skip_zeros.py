"""Convolutions that skip zeros give what the slow reference and torch give, in the layout torch gives it in."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from regimewrap.serve import reference
from regimewrap.serve.cpu import dispatch
from regimewrap.serve.layers import CannotSkip, product_of

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What ``torch.empty`` returns is full of NaN, so that an element that is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(dispatch.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    with torch.no_grad():
        yield


def images(shape, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < density, x, 0.0)


def run(layer, x):
    y, found = product_of(layer)(x, math.inf)
    assert found == int(torch.count_nonzero(x))
    return y


def same(a, b, tolerance=1e-4):
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, tolerance, tolerance, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(
    count=st.sampled_from([1, 3]),
    channels=st.integers(1, 5),
    outputs=st.integers(1, 20),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    biased=st.booleans(),
)
def test_the_kernel_adds_up_what_the_reference_does(
    count, channels, outputs, height, width, kernel, stride, padding, dilation, biased
):
    reach = [dilation * (k - 1) + 1 - 2 * p for k, p in zip(kernel, padding, strict=True)]
    if reach[0] > height or reach[1] > width:
        return
    x, weight = images((count, channels, height, width), 0.4), torch.randn(outputs, channels, *kernel)
    bias = torch.linspace(-1, 1, outputs) if biased else None
    window = (*kernel, *stride, *padding, dilation, dilation)
    y, _ = dispatch.convolve(x, dispatch.laid_convolution(weight), bias, outputs, window, math.inf)
    assert same(y, reference.convolution(x, weight, bias, window))


@settings(max_examples=60, deadline=None)
@given(
    count=st.sampled_from([1, 3, 33]),
    channels=st.sampled_from([1, 16, 63, 64, 70, 130]),
    outputs=st.sampled_from([1, 8, 16, 40, 64, 130, 256]),
    size=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "same"]),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    last=st.booleans(),
    biased=st.booleans(),
)
def test_layers_give_what_torch_gives_in_its_layout(
    count, channels, outputs, size, kernel, stride, padding, density, dtype, last, biased
):
    if padding == "same":
        stride = 1
    elif min(size) + 2 * padding < kernel:
        return
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=biased).to(dtype)
    x = images((count, channels, *size), density).to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    y = run(layer, x)
    # In float32: of a column of zeros, torch 2.14.1's bfloat16 convolution of stride 2 makes what was in memory before.
    expected = layer.float()(x.float()).to(dtype)
    assert same(y, expected, 1e-4 if dtype == torch.float32 else 3e-2)
    if min(size) > 1 < channels and min(y.shape) > 1:
        assert y.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8), (2, 3, 8, 8)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_of_none_and_images_alone_and_threads(shape, threads):
    layer, x = nn.Conv2d(3, 70, 3, padding=1), images(shape, 0.2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = run(layer, x)
    finally:
        torch.set_num_threads(before)
    assert same(y, layer(x))


@pytest.mark.parametrize("shape", [(2, 6, 30), (6, 30), (1, 6, 5)])
def test_sequences_are_convolved(shape):
    layer, x = nn.Conv1d(6, 20, 3, stride=2, padding=2, dilation=2), images(shape, 0.2)
    assert same(run(layer, x), layer(x))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_through(value):
    layer, x = nn.Conv2d(70, 20, 3, padding=1), images((1, 70, 9, 9), 0.1)
    x[0, 65, 4, 4] = value
    assert same(run(layer, x), layer(x))


def test_strided_inputs_are_read_in_their_order():
    layer, x = nn.Conv2d(5, 9, 3), images((2, 5, 20, 20), 0.2)
    for view in (x[:, :, ::2, 1::2], x.transpose(2, 3), x.expand(2, 5, 20, 20), x.flip(3)):
        assert same(run(layer, view), layer(view))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "groups=4"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
        (nn.Conv3d(4, 4, 3), "none of the convolutions"),
        (nn.Conv2d(4, 4, 3).double(), "float32"),
        (nn.Conv2d(4, 4, 2, padding="same"), "both sides"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "computed"),
    ],
)
def test_what_cannot_skip_says_why(layer, why):
    with pytest.raises(CannotSkip, match=why):
        product_of(layer)


def test_without_numba_convolutions_stay_dense(monkeypatch):
    monkeypatch.setattr(dispatch.KERNELS, "usable", False)
    with pytest.raises(CannotSkip, match="regimewrap"):
        product_of(nn.Conv2d(4, 4, 3))
