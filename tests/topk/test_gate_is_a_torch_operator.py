"""The contract with torch: schema, fake kernel, derivatives, compilation, and no peeking at devices."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from regimewrap.topk import op
from regimewrap.topk.cpu import dispatch as cpu
from regimewrap.topk.op import topk_gate
from regimewrap.topk.reference import kept

relu_gate = functools.partial(topk_gate, after_relu=True)

SCOPES = ["sample", "position", "batch"]
ROWS = torch.tensor((0.5, 1.0), dtype=torch.float64)
# opcheck itself looks at .grad of tensors that are no leaves.
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def ratio(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@opcheck_warns
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scope", SCOPES)
def test_opcheck_finds_nothing_in_other_dtypes(scope, dtype):
    x = torch.randn(2, 3, 5, 4).to(dtype).requires_grad_()
    arguments = (x, ratio(0.3), None, scope, 1, "magnitude", "active", "keep", 0.5, "mask")
    torch.library.opcheck(torch.ops.regimewrap.topk_gate.default, arguments)


@opcheck_warns
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("saved", ["mask", "output", "nothing"])
@pytest.mark.parametrize("ties", ["keep", "exact"])
@pytest.mark.parametrize("scope", SCOPES)
def test_opcheck_finds_nothing(scope, ties, saved, memory_format):
    score = "positive" if saved == "output" else "magnitude"
    x = torch.randn(2, 3, 5, 4).to(memory_format=memory_format).requires_grad_(saved != "nothing")
    arguments = (x, ratio(0.3), ROWS, scope, 1, score, "all", ties, 1.0, saved)
    torch.library.opcheck(torch.ops.regimewrap.topk_gate.default, arguments)


@opcheck_warns
def test_opcheck_finds_nothing_in_the_gradient():
    grad = torch.randn(2, 3, 5, 4, requires_grad=True)
    bits = torch.randint(0, 256, (15,), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.regimewrap.masked_gradient.default, (grad, bits, (60, 1, 12, 3)))


@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_a_hundred_keep_ratios_and_none_is_stale(backend, gradient):
    torch._dynamo.reset()
    counters.clear()
    gate = torch.compile(
        lambda x, r: topk_gate(x * 2, r, gradient=gradient), backend=backend, fullgraph=True, dynamic=False
    )
    keep_ratio = ratio(1.0)
    for step in range(100):
        keep_ratio.fill_(1.0 - step / 100)
        x = torch.randn(3, 4, 5, requires_grad=True)

        y = gate(x, keep_ratio)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))

        mask = kept(x, float(keep_ratio))
        assert torch.equal(y, torch.where(mask, 2 * x, 0))
        assert torch.equal(grad, 2 * (mask.float() if gradient == "masked" else torch.ones_like(x)))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_dynamic_shapes_compile_to_one_graph():
    torch._dynamo.reset()
    gate = torch.compile(lambda x, r: topk_gate(x, r), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        gate(torch.randn(3, 4, 5, 6, requires_grad=True), ratio(0.5)).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((2, 4, 7, 5), (5, 3, 4, 9)):
            x = torch.randn(shape, requires_grad=True)
            y = gate(x, ratio(0.25))
            y.sum().backward()
            assert torch.equal(x.grad != 0, kept(x, 0.25))


def test_export_keeps_the_keep_ratio_an_input():
    class Gate(torch.nn.Module):
        def forward(self, x, keep_ratio):
            return topk_gate(x, keep_ratio)

    x = torch.randn(2, 10)
    program = torch.export.export(Gate(), (x, ratio(1.0))).module()

    assert torch.equal(program(x, ratio(0.2)), torch.where(kept(x, 0.2), x, 0))


def test_a_trace_taken_at_full_budget_still_gates():
    x = torch.randn(2, 10)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x, r: topk_gate(x, r))(x, ratio(1.0))

    assert torch.equal(traced(x, ratio(0.2)), torch.where(kept(x, 0.2), x, 0))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_a_legacy_trace_holds_the_operator():
    x = torch.randn(2, 10)
    # Its own check traces again without gradients, where the gate rightly saves less.
    traced = torch.jit.trace(lambda x, r: topk_gate(x, r), (x, ratio(1.0)), check_trace=False)

    assert "regimewrap::topk_gate" in str(traced.graph)
    assert torch.equal(traced(x, ratio(0.2)), torch.where(kept(x, 0.2), x, 0))


@pytest.mark.parametrize("scope", SCOPES)
def test_shape_and_strides_are_known_without_data(scope):
    x = torch.empty(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    assert topk_gate(x, ratio(0.5), scope=scope).stride() == x.stride()
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
        assert topk_gate(x, ratio(0.5), scope=scope).stride() == x.stride()


def test_first_and_second_derivatives_are_right():
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)

    def function(x):
        return topk_gate(x, ratio(0.4)) ** 3

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_selects_the_same_units(use_reentrant):
    x = torch.randn(4, 50, requires_grad=True)
    keep_ratio = ratio(0.2)

    direct = torch.autograd.grad((topk_gate(x.sin(), keep_ratio) ** 2).sum(), x)[0]
    again = checkpoint(lambda x: (topk_gate(x.sin(), keep_ratio) ** 2).sum(), x, use_reentrant=use_reentrant)

    if use_reentrant:
        again.backward()
        assert torch.equal(x.grad, direct)
    else:
        assert torch.equal(torch.autograd.grad(again, x)[0], direct)


@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("function", [topk_gate, relu_gate])
def test_autocast_leaves_values_gradients_and_dtype_alone(function, dtype, gradient):
    x = torch.randn(2, 8, dtype=dtype, requires_grad=True)
    outside = function(x, ratio(0.5), gradient=gradient)
    grad_outside = torch.autograd.grad(outside.sum(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function(x, ratio(0.5), gradient=gradient)
        grad_inside = torch.autograd.grad(inside, x, torch.ones_like(inside))[0]
    assert inside.dtype == grad_inside.dtype == dtype
    assert torch.equal(inside, outside)
    assert torch.equal(grad_inside, grad_outside)


@pytest.mark.parametrize("saved", ["mask", "output", "nothing"])
@pytest.mark.parametrize("ties", ["keep", "exact"])
@pytest.mark.parametrize("relative_to", ["all", "active"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_selection_itself_reads_no_value_of_its_tensor(scope, relative_to, ties, saved):
    # The operator would not even run here: on tensors without values torch only asks it for shapes.
    x = torch.empty(2, 3, 5, 4, device="meta").to(memory_format=torch.channels_last)
    score = "positive" if saved == "output" else "magnitude"

    y, bits = op._gate(x, ratio(0.3), None, scope, 1, score, relative_to, ties, 1.0, saved)

    assert y.stride() == x.stride()
    if saved == "mask":
        assert op._masked(y, bits, y.stride()).stride() == x.stride()


@pytest.mark.parametrize("scope", SCOPES)
def test_two_runs_agree_bit_for_bit_where_torch_demands_determinism(scope, monkeypatch):
    monkeypatch.setattr(cpu.KERNELS, "usable", False)  # the kernels have this in their own tests
    x = torch.randn(2, 3, 40, 40).round().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [topk_gate(x, ratio(0.3), scope=scope, ties="exact") for _ in range(2)]
        grads = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in runs]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*runs)
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (0,), (0, 4), (4, 0), (2, 0, 3), (2, 1, 1, 1)])
@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_rows_of_one_unit_and_of_none_come_out_as_they_went_in(backend, scope, shape):
    torch._dynamo.reset()
    x = torch.randn(shape, requires_grad=True)

    def function(x):
        return topk_gate(x, ratio(0.5), scope=scope) * 2

    y = torch.compile(function, backend=backend)(x) if backend else function(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    if scope == "sample" or x.numel() < 2:
        assert torch.equal(y, 2 * x)
        assert torch.equal(grad, torch.full(shape, 2.0))


def test_vmap_over_no_entries_is_empty():
    x = torch.randn(0, 3, 4)
    assert torch.vmap(lambda entry: topk_gate(entry, ratio(0.3)))(x).shape == x.shape
    loss = torch.func.grad(lambda entry: topk_gate(entry, ratio(0.3)).sum())
    assert torch.vmap(loss, in_dims=1)(torch.randn(3, 0, 4)).shape == (0, 3, 4)


def saved_for_backward(function, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(x.requires_grad_())
    # Beside what backward needs: the budget, three numbers, which is noted only while such hooks are active.
    return [t for t in saved if t.dtype != torch.int64], y


def test_a_masked_gradient_costs_one_bit_for_each_unit():
    x = torch.randn(4, 63)
    saved, _ = saved_for_backward(lambda x: topk_gate(x, ratio(0.5)), x)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 32)]
    assert saved_for_backward(lambda x: topk_gate(x, ratio(0.5), gradient="straight_through"), x)[0] == []


def test_a_gate_on_a_relu_saves_nothing_but_its_output():
    x = torch.randn(4, 63)
    saved, y = saved_for_backward(lambda x: relu_gate(x, ratio(0.5)), x)
    assert [t.data_ptr() for t in saved] == [y.data_ptr()]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("function", [topk_gate, relu_gate])
def test_vmap_and_grad_compose_in_any_order(function, scope):
    x = torch.randn(5, 3, 7, 4, 6)

    def loss(x):
        return (function(x, ratio(0.3), scope=scope) ** 2).sum()

    for dim in (0, 2, 4):
        entries = [function(entry, ratio(0.3), scope=scope) for entry in x.unbind(dim)]
        mapped = torch.vmap(lambda entry: function(entry, ratio(0.3), scope=scope), in_dims=dim)(x)
        assert torch.equal(mapped, torch.stack(entries))
        assert torch.equal(torch.vmap(torch.func.grad(loss), in_dims=dim)(x), 2 * mapped)
        grad = torch.func.grad(lambda x, dim=dim: torch.vmap(loss, in_dims=dim)(x).sum())(x)
        assert torch.equal(grad, 2 * mapped.movedim(0, dim))


def test_vmap_maps_over_keep_ratios():
    x, ratios = torch.randn(2, 10), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    mapped = torch.vmap(lambda r: topk_gate(x, r))(ratios)
    assert torch.equal(mapped, torch.stack([topk_gate(x, r) for r in ratios]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
def test_hessians_come_out_in_every_mode():
    x = torch.randn(2, 4)

    def loss(x):
        return (topk_gate(x, ratio(0.5)) ** 3).sum()

    expected = torch.diag(6 * topk_gate(x, ratio(0.5)).flatten()).reshape(2, 4, 2, 4)
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        for inner in (torch.func.jacrev, torch.func.jacfwd):
            assert torch.equal(outer(inner(loss))(x), expected)


def test_a_graph_holding_the_gate_can_be_copied():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.keep_ratio = ratio(0.5)

        def forward(self, x):
            return topk_gate(x, self.keep_ratio)

    net = Net()
    twin = copy.deepcopy(net)
    twin.keep_ratio.fill_(0.1)
    x = torch.randn(2, 10)

    assert int((net(x) != 0).sum()) == 10
    assert int((twin(x) != 0).sum()) == 2
