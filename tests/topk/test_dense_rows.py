"""Entries of the first dimension that keep all their units, on every way to a gate, against the reference."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regimewrap.errors import SelectionError
from regimewrap.topk import sampling
from regimewrap.topk.cpu import dispatch as cpu
from regimewrap.topk.op import topk_gate
from regimewrap.topk.reference import histogram, in_full, kept, reaches
from regimewrap.topk.selection import INTEGERS, Selection, full_rows
from regimewrap.topk.threshold import BINS, SHIFT, count_scores, threshold_gate

relu_gate = functools.partial(topk_gate, after_relu=True)
relu_threshold_gate = functools.partial(threshold_gate, after_relu=True)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 2.0, -2.0, 1e-7)
SHARES = st.one_of(st.sampled_from([0.5, 0.25, 0.9, 0.3]), st.floats(0.0, 0.999))
UPDATES = st.integers(0, 10**6)


@pytest.fixture(params=["kernels", "plain torch"], autouse=True)
def way(request, monkeypatch):
    if request.param == "plain torch":
        monkeypatch.setattr(cpu.KERNELS, "usable", False)
    else:
        pytest.importorskip("numba", reason="the kernels are compiled by numba")
        monkeypatch.setattr(cpu, "_WORTH_LOADING", 1)
    yield
    assert cpu.KERNELS.usable == (request.param == "kernels")


def ratio(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def rows(full_share: float, update: int) -> torch.Tensor:
    return torch.tensor((full_share, update), dtype=torch.float64)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = INTEGERS[a.dtype][0]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of every dtype and order of memory, with ties, zeros, infinities and NaN, empty ones too."""
    shape = draw(st.lists(st.one_of(st.integers(0, 9), st.just(8)), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        x = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    x = x.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        x = x.permute(draw(st.permutations(range(x.dim()))))
    if x.dim() and draw(st.booleans()):
        x = x[..., 1:]
    return x


@st.composite
def selections(draw: st.DrawFn, x: torch.Tensor) -> dict[str, object]:
    scopes = ["sample", "position", "batch"] if x.dim() else ["sample", "batch"]
    return {
        "scope": draw(st.sampled_from(scopes)),
        "channel_dim": draw(st.integers(-x.dim(), max(x.dim() - 1, 0))),
        "relative_to": draw(st.sampled_from(["all", "active"])),
        "ties": draw(st.sampled_from(["keep", "exact"])),
        "multiplier": draw(st.sampled_from([1.0, 0.5, 3.0])),
    }


@given(st.data(), tensors(), st.floats(0.001, 1.0), SHARES, UPDATES, st.sampled_from(["masked", "straight_through"]))
def test_values_and_gradients_are_the_references(data, x, keep_ratio, share, update, gradient):
    rule = data.draw(selections(x)) | {"score": data.draw(st.sampled_from(["magnitude", "value"]))}
    x = x.detach().requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)

    y = topk_gate(x, ratio(keep_ratio), dense_rows=rows(share, update), gradient=gradient, **rule)
    (grad,) = torch.autograd.grad(y, x, upstream)

    mask = kept(x, keep_ratio, full_share=share, update=update, **rule)
    assert same_bits(y, torch.where(mask, x, 0))
    assert same_bits(grad, upstream if gradient == "straight_through" else torch.where(mask, upstream, 0))


@given(st.data(), tensors(), st.floats(0.001, 1.0), SHARES, UPDATES, st.sampled_from(["masked", "straight_through"]))
def test_with_a_relu_values_and_gradients_are_the_references(data, x, keep_ratio, share, update, gradient):
    rule = data.draw(selections(x))
    x = x.detach().requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)

    y = relu_gate(x, ratio(keep_ratio), dense_rows=rows(share, update), gradient=gradient, **rule)
    (grad,) = torch.autograd.grad(y, x, upstream)

    mask = kept(torch.relu(x), keep_ratio, score="value", full_share=share, update=update, **rule)
    expected = torch.where(mask, torch.relu(x), 0)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    let_through = ~(torch.relu(x) <= 0) & (mask | (gradient == "straight_through"))
    assert torch.equal(grad, torch.where(let_through, upstream, 0))


@given(tensors(), st.floats(0.001, 1.0), SHARES, UPDATES, st.floats(0, 3), st.booleans(), st.booleans())
def test_a_shared_threshold_neither_cuts_nor_counts_them(x, keep_ratio, share, update, cut, known, relu):
    x = x.detach().requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)
    ranked = torch.relu(x) if relu else x
    gate = relu_threshold_gate if relu else threshold_gate
    threshold = torch.tensor(cut, dtype=torch.float32)

    y = gate(x, ratio(keep_ratio), threshold, torch.tensor(known), dense_rows=rows(share, update))
    (grad,) = torch.autograd.grad(y, x, upstream)
    counts = torch.zeros(BINS, dtype=torch.int64)
    count_scores(x, counts, dense_rows=rows(share, update), after_relu=relu)

    mask = reaches(ranked, float(threshold), full_share=share, update=update)
    if not known:
        mask = kept(ranked, keep_ratio, full_share=share, update=update)
    if keep_ratio == 1.0:
        mask = torch.ones_like(mask)
    torch.testing.assert_close(y, torch.where(mask, ranked, 0), rtol=0, atol=0, equal_nan=True)
    let_through = mask & ~(ranked <= 0) if relu else mask
    assert torch.equal(grad, torch.where(let_through, upstream, 0))
    competing = ~torch.tensor(in_full(x.shape[0] if x.dim() else 1, share, update), dtype=torch.bool)
    bins = counts.nonzero().flatten()
    found = dict(zip((bins << SHIFT).int().view(torch.float32).tolist(), counts[bins].tolist(), strict=True))
    assert found == histogram(ranked[competing] if x.dim() else ranked[competing.view(())])


@pytest.mark.parametrize("scope", ["sample", "position", "batch"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [0, 1])
def test_dense_rows_are_the_ungated_ones_bit_for_bit_forward_and_backward(scope, memory_format, dtype, update):
    x = torch.randn(6, 5, 7, 9).to(dtype).to(memory_format=memory_format)
    x[:, 0, 0] = -0.0
    upstream = torch.randn(x.shape).to(dtype).to(memory_format=memory_format)
    part = slice(0, 3) if update == 0 else slice(3, 6)
    for gradient in ("masked", "straight_through"):
        for gate, bare in ((topk_gate, lambda x: x * 1), (relu_gate, torch.relu)):
            ours, theirs = (x.clone().requires_grad_() for _ in range(2))
            y = gate(ours, ratio(0.1), dense_rows=rows(0.5, update), scope=scope, gradient=gradient)
            expected = bare(theirs)
            y.backward(upstream)
            expected.backward(upstream)
            assert same_bits(y[part].detach(), expected[part].detach())
            assert same_bits(ours.grad[part], theirs.grad[part])
            assert y.stride() == expected.stride()


@given(st.integers(1, 300), SHARES, st.integers(0, 10**9))
def test_over_many_updates_their_share_is_the_one_asked_for(n, share, update):
    counts = []
    for u in range(update, update + 50):
        start, stop = full_rows((n, 4), Selection(), share, u)
        assert 0 <= start <= stop <= n
        assert start == 0 if u % 2 == 0 else stop == n
        assert [start <= place < stop for place in range(n)] == in_full(n, share, u)
        counts.append(stop - start)
    assert abs(sum(counts) - 50 * n * Fraction(share)) <= 2


def test_a_batch_of_one_is_dense_in_every_other_update():
    assert [full_rows((1, 4), Selection(), 0.5, u) for u in range(4)] == [(0, 0), (0, 1), (0, 0), (0, 1)]


@pytest.mark.parametrize("update", [0, 1, 7, 2**40, 2**45 + 1])
def test_half_of_an_even_batch_is_dense_and_flattened_tokens_are_those_of_their_samples(update):
    start, stop = full_rows((8, 3), Selection(), 0.5, update)
    assert (start, stop) == ((0, 4) if update % 2 == 0 else (4, 8))
    assert full_rows((8 * 13, 3), Selection(), 0.5, update) == (13 * start, 13 * stop)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(16, 5000), (17, 4999), (9, 13, 700)])
def test_threads_share_rows_without_changing_a_bit(shape, threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(cpu, "_GRAIN", 1000)
    x = torch.randn(shape)
    try:
        torch.set_num_threads(threads)
        for update in (0, 1):
            for scope in ("sample", "position", "batch"):
                y = topk_gate(x, ratio(0.2), dense_rows=rows(0.5, update), scope=scope)
                mask = kept(x, 0.2, scope=scope, full_share=0.5, update=update)
                assert torch.equal(y, torch.where(mask, x, 0))
    finally:
        torch.set_num_threads(before)


@given(st.integers(2, 200), st.sampled_from([1, 8]), st.integers(2, 8), st.data())
def test_threads_get_the_same_work_to_within_a_step(items, step, parts, data):
    if items // step < parts:
        return
    m = data.draw(st.integers(0, items - 1))
    full = data.draw(st.sampled_from([(0, m), (items - m, items)]))
    bounds = cpu._bounds(items, step, parts, full)

    assert bounds[0] == 0
    assert bounds[-1] == items
    assert bounds == sorted(bounds)
    assert all(bound % step == 0 for bound in bounds[:-1])
    work = [
        sum(cpu._COPY if full[0] <= item < full[1] else 1 for item in range(start, stop))
        for start, stop in itertools.pairwise(bounds)
    ]
    assert max(work) - min(work) <= 2 * step + 2


@pytest.mark.parametrize(
    "wrong",
    [0.5, torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64, device="meta")],
)
def test_what_does_not_say_which_rows_is_refused(wrong):
    with pytest.raises(SelectionError, match=r"dense_rows must be a float64 tensor of shape \(2,\) on the CPU; got"):
        topk_gate(torch.randn(2, 8), ratio(0.5), dense_rows=wrong)


def test_a_share_of_zero_is_the_gate_without_dense_rows():
    x = torch.randn(5, 33)
    for scope in ("sample", "position", "batch"):
        alone = topk_gate(x, ratio(0.3), scope=scope)
        assert same_bits(topk_gate(x, ratio(0.3), dense_rows=rows(0.0, 7), scope=scope), alone)


def test_calls_are_noted_while_a_sample_is_taken_and_only_those_that_could_cut():
    keep_ratio, other = ratio(0.5), ratio(0.5)
    x = torch.randn(4, 16)
    mostly_zero = torch.zeros(4, 16).index_fill(1, torch.arange(3), 1.0)
    topk_gate(x, keep_ratio)
    sampling.begin(keep_ratio)
    none = rows(0.0, 0)  # as in train mode; without, as in eval mode, nothing is noted
    topk_gate(x, keep_ratio, dense_rows=none)
    topk_gate(mostly_zero, keep_ratio, dense_rows=none)
    relu_gate(-x.abs(), keep_ratio, dense_rows=none)
    relu_gate(x.abs(), keep_ratio, dense_rows=none)
    topk_gate(x, keep_ratio)
    topk_gate(x, other, dense_rows=none)
    topk_gate(x[:1], keep_ratio, dense_rows=rows(0.5, 1))  # all of it is dense
    assert sampling.end(keep_ratio) == (4, 0.5)
    topk_gate(x, keep_ratio)
    assert sampling.end(keep_ratio) == (0, 0.0)
    assert keep_ratio.data_ptr() not in sampling.ON


@pytest.mark.parametrize("paused", [False, True])
def test_notes_end_with_the_keep_ratio_that_they_are_on(paused):
    before, keep_ratio = set(sampling.ON), ratio(0.5)
    sampling.begin(keep_ratio)
    if paused:
        sampling.pause(keep_ratio)
    address = keep_ratio.data_ptr()

    del keep_ratio

    assert set(sampling.ON) == before - {address}
    assert address not in sampling._PAUSED
