from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regimewrap.topk.op import topk_gate

relu_gate = functools.partial(topk_gate, after_relu=True)

SETTINGS = {
    "scope": st.sampled_from(["sample", "position", "batch"]),
    "relative_to": st.sampled_from(["all", "active"]),
    "ties": st.sampled_from(["keep", "exact"]),
    "multiplier": st.sampled_from([1.0, 0.5, 3.0]),
}


def ratio(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@given(
    st.fixed_dictionaries(SETTINGS),
    st.floats(0.001, 1.0),
    st.lists(st.integers(0, 7), min_size=2, max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_values_and_gradients_are_those_of_a_gate_behind_a_relu(selection, keep_ratio, shape, dtype, special, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 1e-7])
    x = values[torch.randint(10, shape, generator=generator)] if special else torch.randn(shape, generator=generator)
    x = x.to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)

    expected = topk_gate(torch.relu(x), ratio(keep_ratio), **selection)
    expected_grad = torch.autograd.grad(expected, x, upstream)[0]

    y = relu_gate(x, ratio(keep_ratio), **selection)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], expected_grad)


def test_a_straight_through_gradient_reaches_what_the_relu_let_through():
    x = torch.randn(3, 20, requires_grad=True)
    y = relu_gate(x, ratio(0.1), gradient="straight_through")
    assert torch.equal(y, topk_gate(torch.relu(x), ratio(0.1)))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (x > 0).float())


def test_at_full_budget_it_is_the_relu():
    x = torch.randn(3, 20)
    assert torch.equal(relu_gate(x, ratio(1.0)), torch.relu(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_it_keeps_one_graph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(relu_gate, backend=backend, fullgraph=True)
    x = torch.randn(3, 20, requires_grad=True)
    compiled(x, ratio(1.0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for keep_ratio in (1.0, 0.5, 0.1):
            y = compiled(x, ratio(keep_ratio))
            assert torch.equal(y, topk_gate(torch.relu(x), ratio(keep_ratio)))
            (grad,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(grad, (y != 0).float())
