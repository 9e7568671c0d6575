"""The histogram, its quantile, and the gate at a given threshold, against reference and torch's contract."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from regimewrap.errors import SelectionError
from regimewrap.topk.cpu import dispatch as cpu
from regimewrap.topk.op import topk_gate
from regimewrap.topk.reference import histogram, reaches
from regimewrap.topk.threshold import (
    BINS,
    SHIFT,
    _threshold_on_device,
    count_scores,
    threshold_at,
    threshold_gate,
)

relu_threshold_gate = functools.partial(threshold_gate, after_relu=True)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1.0, -1.0, 1e-7, -1e-7, 3e4, 1e-42, 2e-38)
KNOWN = torch.tensor(data=True)
ROWS = torch.tensor((0.5, 1.0), dtype=torch.float64)
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def ratio(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def at(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def counted(x: torch.Tensor, *, after_relu: bool = False) -> torch.Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    count_scores(x, counts, after_relu=after_relu)
    return counts


def lower_ends(counts: torch.Tensor) -> dict[float, int]:
    bins = counts.nonzero().flatten()
    ends = (bins << SHIFT).int().view(torch.float32)
    return dict(zip(ends.tolist(), counts[bins].tolist(), strict=True))


@pytest.fixture(params=["kernels", "plain torch"], autouse=True)
def way(request, monkeypatch):
    if request.param == "plain torch":
        monkeypatch.setattr(cpu.KERNELS, "usable", False)
    else:
        pytest.importorskip("numba", reason="the kernels are compiled by numba")
        monkeypatch.setattr(cpu, "_WORTH_LOADING", 1)
    yield
    assert cpu.KERNELS.usable == (request.param == "kernels")


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of every dtype, with ties, zeros, infinities and NaN, dense and with gaps, empty ones too."""
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator)
    content = draw(st.sampled_from(["normal", "relu", "few values", "special", "wide", "long"]))
    if content == "relu":
        x = x.relu()
    elif content == "few values":
        x = (2 * x).round()
    elif content == "special":
        x = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    elif content == "wide":
        x = x**15
    elif content == "long":
        x = torch.randn(draw(st.integers(4000, 9000)), generator=generator)
    x = x.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "channels last", "transposed", "gaps", "expanded"]))
    if layout == "channels last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1)
    if layout == "gaps" and x.dim() > 0:
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded" and x.dim() > 0 and x.shape[0] > 0:
        return x[:1].expand(3, *x.shape[1:])
    return x


thresholds = st.sampled_from([0.0, 1e-45, 1.0, math.inf]) | st.floats(0, 5, width=32)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@given(tensors(), thresholds)
def test_output_gradient_and_memory_format_are_those_of_the_reference(x, threshold):
    x.requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)

    y = threshold_gate(x, ratio(0.5), at(threshold), KNOWN)
    (grad,) = torch.autograd.grad(y, x, upstream)

    mask = reaches(x, threshold)
    assert torch.equal(bits_of(y), bits_of(torch.where(mask, x, 0)))
    assert torch.equal(bits_of(grad), bits_of(torch.where(mask, upstream, 0)))
    assert y.stride() == torch.empty_like(x).stride()


@given(tensors(), thresholds)
def test_in_one_operation_with_a_relu_it_is_the_gate_behind_it(x, threshold):
    x.requires_grad_()
    upstream = torch.randn(x.shape).to(x.dtype)

    behind = threshold_gate(torch.relu(x), ratio(0.5), at(threshold), KNOWN)
    fused = relu_threshold_gate(x, ratio(0.5), at(threshold), KNOWN)

    assert torch.equal(bits_of(fused + 0.0), bits_of(behind + 0.0))  # up to the sign of zeros
    kept = behind.detach() != 0  # a gate that keeps a zero lets no gradient through a relu either
    expected = torch.autograd.grad(behind, x, upstream)[0]
    found = torch.autograd.grad(fused, x, upstream)[0]
    assert torch.equal(bits_of(found[kept]), bits_of(expected[kept]))
    assert not found[~kept].any()


@given(tensors(), st.booleans())
def test_the_histogram_is_the_references(x, after_relu):
    assert lower_ends(counted(x, after_relu=after_relu)) == histogram(torch.relu(x) if after_relu else x)


@given(tensors(), st.floats(0.001, 1.0), st.sampled_from(["all", "active"]))
def test_the_share_that_reaches_the_threshold_is_the_keep_ratio_up_to_one_bin(x, keep_ratio, relative_to):
    x = x.float()
    counts = counted(x)

    threshold = float(threshold_at(counts, keep_ratio, relative_to))
    assert float(_threshold_on_device(counts, keep_ratio, relative_to)) == threshold

    scores = x[~x.isnan()].abs()
    n = int((scores >= 2.0**-131).sum()) if relative_to == "active" else scores.numel()
    wanted = max(1.0, n * keep_ratio)
    bits = torch.tensor(threshold).view(torch.int32).item() >> SHIFT
    above = int(counts[bits + 1 :].sum())
    assert above <= wanted or n == 0
    assert above + int(counts[bits]) >= wanted or n == 0
    assert above <= int((scores >= threshold).sum()) <= above + int(counts[bits])


@pytest.mark.parametrize("keep_ratio", [0.5, 0.2, 0.05, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smooth_scores_are_cut_to_the_ratio(dtype, keep_ratio):
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    threshold = threshold_at(counted(x), keep_ratio)
    share = float((threshold_gate(x, ratio(keep_ratio), threshold, KNOWN) != 0).double().mean())
    assert share == pytest.approx(keep_ratio, rel=0.02 if dtype == torch.bfloat16 else 0.005)


def test_ties_that_are_most_of_what_is_kept_are_all_kept():
    x = torch.cat([torch.rand(700), torch.full((300,), 6.0)])  # as ReLU6 saturates
    assert threshold_at(counted(x), 0.2) == 6.0
    assert threshold_at(counted(torch.ones(10)), 0.5) == 1.0


def test_a_share_that_reaches_down_to_zeros_keeps_everything():
    x = torch.cat([torch.zeros(60), torch.rand(40)])
    assert threshold_at(counted(x), 0.5) == 0
    assert threshold_at(counted(x), 0.5, "active") > 0
    assert threshold_at(counted(torch.zeros(5)), 0.5) == 0
    assert threshold_at(counted(torch.full((5,), math.nan)), 0.5) == 0
    assert threshold_at(counted(torch.full((5,), math.inf)), 0.5) == math.inf


def test_full_budget_is_the_tensor_or_its_relu_whatever_the_threshold():
    x = torch.randn(4, 9)
    assert threshold_gate(x, ratio(1.0), at(9.0), KNOWN) is x
    assert torch.equal(relu_threshold_gate(x, ratio(1.0), at(9.0), KNOWN), torch.relu(x))
    compiled = torch.compile(lambda x: threshold_gate(x, ratio(1.0), at(9.0), KNOWN), backend="eager")
    assert torch.equal(compiled(x), x)


def test_without_a_threshold_samples_are_cut_by_themselves():
    x, unknown = torch.randn(4, 50), torch.tensor(data=False)
    expected = topk_gate(x, ratio(0.3), relative_to="active")
    assert torch.equal(threshold_gate(x, ratio(0.3), at(9.0), unknown, relative_to="active"), expected)
    fused = relu_threshold_gate(x, ratio(0.3), at(9.0), unknown)
    assert torch.equal(fused, topk_gate(x.relu(), ratio(0.3)))


def test_a_straight_through_gradient_passes_to_all_units():
    x = torch.randn(4, 50, requires_grad=True)
    y = threshold_gate(x, ratio(0.3), at(1.0), KNOWN, gradient="straight_through")
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


def test_bad_arguments_are_refused():
    with pytest.raises(SelectionError, match="gradient must be one of"):
        threshold_gate(torch.rand(3), ratio(0.3), at(1.0), KNOWN, gradient="soft")
    with pytest.raises(SelectionError, match="keep_ratio must be a 0-d float64"):
        threshold_gate(torch.rand(3), at(0.3), at(1.0), KNOWN)


@opcheck_warns
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("score", "saved"), [("magnitude", "mask"), ("magnitude", "nothing"), ("positive", "nothing")])
def test_opcheck_finds_nothing(score, saved, known, memory_format):
    x = torch.randn(2, 3, 5, 4).to(memory_format=memory_format).requires_grad_(saved == "mask")
    arguments = (x, ratio(0.3), ROWS, at(1.0), torch.tensor(known), "all", score, saved)
    torch.library.opcheck(torch.ops.regimewrap.threshold_gate.default, arguments)
    counts = torch.zeros(BINS, dtype=torch.int64)
    torch.library.opcheck(torch.ops.regimewrap.count_scores.default, (x.detach(), counts, ROWS, score == "positive"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_a_hundred_ratios_and_thresholds_and_counts_once_each(backend):
    torch._dynamo.reset()
    counters.clear()
    counts, threshold, keep_ratio = torch.zeros(BINS, dtype=torch.int64), at(0), ratio(1.0)
    known = torch.tensor(data=False)

    def function(x):
        count_scores(x, counts)
        return threshold_gate(x * 2, keep_ratio, threshold, known)

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    for step in range(100):
        known.fill_(step > 0)
        keep_ratio.fill_(1.0 - step / 100)
        threshold.fill_(step / 50)
        x = torch.randn(3, 4, 5, requires_grad=True)

        y = compiled(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))

        mask = reaches(2 * x, step / 50)
        assert torch.equal(y, torch.where(mask, 2 * x, 0))
        assert torch.equal(grad, 2 * mask.float())
        assert int(counts.sum()) == 60 * (step + 1)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_shape_and_strides_are_known_without_data():
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    threshold, counts = at(1.0).to("meta"), torch.zeros(BINS, dtype=torch.int64, device="meta")
    assert threshold_gate(x, ratio(0.5), threshold, KNOWN).stride() == x.stride()
    count_scores(x, counts)


def test_derivatives_are_right():
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: threshold_gate(x, ratio(0.4), at(0.7), KNOWN) ** 3, (x,))
    assert torch.autograd.gradgradcheck(lambda x: threshold_gate(x, ratio(0.4), at(0.7), KNOWN) ** 3, (x,))


def test_vmap_and_grad_compose_and_all_entries_are_counted():
    x, counts = torch.randn(5, 3, 7), torch.zeros(BINS, dtype=torch.int64)

    def loss(x):
        count_scores(x, counts)
        return (threshold_gate(x, ratio(0.3), at(0.8), KNOWN) ** 2).sum()

    expected = 2 * torch.where(reaches(x, 0.8), x, 0)
    assert torch.equal(torch.func.grad(loss)(x), expected)
    assert int(counts.sum()) == x.numel()
    assert torch.equal(torch.vmap(torch.func.grad(loss), in_dims=1, out_dims=1)(x), expected)
    assert int(counts.sum()) == 2 * x.numel()
    assert torch.equal(torch.func.grad(lambda x: torch.vmap(loss)(x).sum())(x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_keeps_the_same_units(use_reentrant):
    x = torch.randn(4, 50, requires_grad=True)

    def function(x):
        return (threshold_gate(x.sin(), ratio(0.2), at(0.5), KNOWN) ** 2).sum()

    direct = torch.autograd.grad(function(x), x)[0]
    checkpoint(function, x, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, direct)


def test_one_bit_a_unit_is_saved_and_with_a_relu_nothing_but_its_output():
    def saved_by(function):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = function(torch.randn(4, 63, requires_grad=True))
        # Beside what backward needs: the budget, three numbers, which is noted only while such hooks are active.
        return [t for t in saved if t.dtype != torch.int64], y

    saved, _ = saved_by(lambda x: threshold_gate(x, ratio(0.5), at(0.5), KNOWN))
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 32)]
    assert not saved_by(lambda x: threshold_gate(x, ratio(0.5), at(0.5), KNOWN, gradient="straight_through"))[0]
    saved, y = saved_by(lambda x: relu_threshold_gate(x, ratio(0.5), at(0.5), KNOWN))
    assert [t.data_ptr() for t in saved] == [y.data_ptr()]
