from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regimewrap.topk.op import topk_gate
from regimewrap.topk.reference import kept

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-7, -1e-7, 3e4)


def ratio(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@st.composite
def tensors(draw: st.DrawFn, min_dims: int = 0) -> torch.Tensor:
    """Tensors of every dtype, few and many ties, dense and with gaps, up to five dimensions, empty ones too."""
    shape = draw(st.lists(st.integers(0, 6), min_size=min_dims, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator)
    content = draw(st.sampled_from(["normal", "relu", "few values", "special", "zero"]))
    if content == "relu":
        x = x.relu()
    elif content == "few values":
        x = (2 * x).round()
    elif content == "special":
        x = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    elif content == "zero":
        x = x * 0
    x = x.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "channels last", "transposed", "gaps", "expanded", "offset"]))
    if layout == "channels last" and x.dim() in (4, 5):
        return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1)
    if layout == "gaps" and x.dim() > 0:
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded" and x.dim() > 0 and x.shape[0] > 0:
        return x[:1].expand(3, *x.shape[1:])
    if layout == "offset" and x.dim() > 0:
        return torch.cat([x, x])[x.shape[0] :]
    return x


@st.composite
def selections(draw: st.DrawFn, dims: int) -> dict[str, object]:
    scopes = ["sample", "batch", "position"] if dims else ["sample", "batch"]
    return {
        "scope": draw(st.sampled_from(scopes)),
        "channel_dim": draw(st.integers(-dims, dims - 1)) if dims else 1,
        "score": draw(st.sampled_from(["magnitude", "value"])),
        "relative_to": draw(st.sampled_from(["all", "active"])),
        "ties": draw(st.sampled_from(["keep", "exact"])),
        "multiplier": draw(st.sampled_from([1.0, 0.5, 3.0])),
    }


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaN equals NaN and -0.0 differs from 0.0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def units_by_row(x: torch.Tensor, scope: str, channel_dim: int) -> torch.Tensor:
    if scope == "batch":
        return x.reshape(1, -1)
    if scope == "position":
        return x.movedim(channel_dim, -1).reshape(math.prod(x.shape) // x.shape[channel_dim], -1)
    return x.reshape(x.shape[0], -1) if x.dim() else x.reshape(1, 1)


@given(st.data(), tensors(), st.floats(0.001, 1.2))
def test_output_and_gradient_are_those_of_the_reference(data, x, keep_ratio):
    selection = data.draw(selections(x.dim()))
    x = x.requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)

    y = topk_gate(x, ratio(keep_ratio), **selection)
    (grad,) = torch.autograd.grad(y, x, upstream)

    mask = kept(x, keep_ratio, **selection)
    assert y.dtype == x.dtype
    assert torch.equal(bits_of(y), bits_of(torch.where(mask, x, 0)))
    assert torch.equal(bits_of(grad), bits_of(torch.where(mask, upstream, 0)))


@given(tensors(min_dims=2), st.floats(0.01, 0.999), st.sampled_from(["sample", "position", "batch"]))
def test_at_most_k_units_stay_without_ties_and_never_fewer_than_k_of_the_non_zero(x, keep_ratio, scope):
    if x.numel() == 0:
        return
    rows = units_by_row(x, scope, 1)
    k = max(1, int(rows.shape[1] * keep_ratio))

    gated = units_by_row(topk_gate(x, ratio(keep_ratio), scope=scope), scope, 1)

    for row, gated_row in zip(rows.double(), gated.double(), strict=True):
        survivors = int((gated_row != 0).sum())
        non_zero = row[row != 0]
        assert survivors >= min(k, len(non_zero))
        if len(non_zero.abs().unique()) == len(non_zero):  # NaN differs from itself, so it makes no ties
            assert survivors <= max(k, int(row.isnan().sum()))


@given(tensors(min_dims=1), st.floats(0.01, 1.0), st.randoms(use_true_random=False))
def test_permuting_samples_commutes_with_the_gate(x, keep_ratio, random):
    order = list(range(x.shape[0]))
    random.shuffle(order)

    gated_then_permuted = topk_gate(x, ratio(keep_ratio))[order]
    permuted_then_gated = topk_gate(x[order], ratio(keep_ratio))

    assert torch.equal(bits_of(gated_then_permuted), bits_of(permuted_then_gated))


@given(st.data(), tensors(), st.sampled_from(["masked", "straight_through"]))
def test_at_full_budget_values_and_gradients_are_untouched_bit_for_bit(data, x, gradient):
    selection = data.draw(selections(x.dim()))
    x = x.requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)

    y = topk_gate(x, ratio(1.0), gradient=gradient, **selection)

    assert y is x
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream)


@given(tensors(), st.floats(0.01, 1.0))
def test_straight_through_passes_the_gradient_to_every_unit(x, keep_ratio):
    x = x.requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)

    y = topk_gate(x, ratio(keep_ratio), gradient="straight_through")

    assert torch.equal(bits_of(y), bits_of(topk_gate(x, ratio(keep_ratio))))
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scope", ["sample", "position", "batch"])
def test_memory_format_is_kept_forward_and_backward(memory_format, scope):
    x = torch.randn(2, 8, 5, 7).to(memory_format=memory_format).requires_grad_()

    y = topk_gate(x, ratio(0.3), scope=scope)
    (grad,) = torch.autograd.grad(y, x, torch.ones(()).expand_as(y))

    assert y.stride() == x.stride()
    assert grad.stride() == x.stride()
