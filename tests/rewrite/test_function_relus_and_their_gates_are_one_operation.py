"""A ReLU called as a function and its gate are one operation, which saves nothing that the dense model does not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from regimewrap import GatePolicy, RegimePolicy, gate_of, plan, unwrap, verify, wrap
from regimewrap.topk.op import topk_gate


class Straight(nn.Module):
    """A traced method."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.two(F.relu(self.one(x)))


class Method(Straight):
    def forward(self, x):
        return self.two(self.one(x).relu())


class Branches(Straight):
    """A rewritten method."""

    def forward(self, x, scale=None):
        x = torch.relu(self.one(x))
        return self.two(x if scale is None else x * scale)


class Named(Straight):
    def forward(self, x, scale=None):
        x = F.relu(self.one(x), inplace=False)
        return self.two(x if scale is None else x * scale)


class Held(Straight):
    """The function, or a module that is not called by hooks, is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.act = F.relu

    def forward(self, x):
        return self.two(self.act(self.one(x)))


SHARED = nn.ReLU()


class Global(Straight):
    def forward(self, x):
        return self.two(SHARED(self.one(x)))


class InPlace(Straight):
    def forward(self, x, scale=None):
        x = F.relu(self.one(x), inplace=True)
        return self.two(x if scale is None else x * scale)


MODELS = [Straight, Method, Branches, Named, Held, Global]


@pytest.fixture
def x():
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def bare(make):
    torch.manual_seed(0)
    return make()


def wrapped(make, ratio, **gate):
    model = wrap(bare(make), RegimePolicy(gate=GatePolicy(**gate)))
    gate_of(model).set_keep_ratio(ratio)
    return model


def saved_bytes(model, x):
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    own = {each.untyped_storage().data_ptr() for each in (x, *model.parameters())}
    assert output.requires_grad
    return sum(each.untyped_storage().nbytes() for pointer, each in held.items() if pointer not in own)


def gradients(model, output):
    return torch.autograd.grad((output * output.detach().cos()).sum(), list(model.parameters()))


def by_hand(model, x, ratio, **rule):
    hidden = topk_gate(torch.relu(model.one(x)), torch.tensor(ratio, dtype=torch.float64), **rule)
    return model.two(hidden)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_what_is_saved_for_backward_is_what_the_dense_model_saves(make, ratio, x):
    assert saved_bytes(wrapped(make, ratio), x) <= 1.02 * saved_bytes(bare(make), x)


def test_torchs_encoder_layer_saves_no_more_than_the_dense_one():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 512, dropout=0.0, batch_first=True)
    tokens = torch.randn(4, 8, 32)
    dense = saved_bytes(layer, tokens)
    gate_of(wrap(layer)).set_keep_ratio(0.2)
    assert saved_bytes(layer, tokens) <= 1.02 * dense


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("scope", ["sample", "position", "batch"])
def test_outputs_and_gradients_are_those_of_a_gate_behind(make, scope, x):
    model = wrapped(make, 0.2, scope=scope)
    found, expected = model(x), by_hand(bare(make), x, 0.2, scope=scope)
    assert torch.equal(found, expected)
    for mine, theirs in zip(
        gradients(model, found), gradients(model, by_hand(model, x, 0.2, scope=scope)), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", [*MODELS, InPlace])
def test_at_full_budget_every_bit_is_the_dense_models(make, x):
    model, dense = wrapped(make, 1.0), bare(make)
    found, expected = model(x), dense(x)
    assert torch.equal(found, expected)
    for mine, theirs in zip(gradients(model, found), gradients(dense, expected), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", MODELS)
def test_a_straight_through_gradient_still_reaches_units_that_were_cut(make, x):
    model = wrapped(make, 0.2, gradient="straight_through")
    found = model(x)
    expected = by_hand(model, x, 0.2, scope="sample", gradient="straight_through")
    assert torch.equal(found, expected)
    for mine, theirs in zip(gradients(model, found), gradients(model, expected), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", MODELS)
def test_an_observer_sees_the_activation_before_and_after(make, x):
    model = wrapped(make, 0.2)
    expected, seen = model(x), []
    gate_of(model).observers.append(lambda *seen_now: seen.append(seen_now[1:]))
    assert torch.equal(model(x), expected)
    [(before, after)] = seen
    assert torch.equal(before, torch.relu(model.one(x)))
    assert after.count_nonzero() < before.count_nonzero()
    gate_of(model).observers.clear()
    assert not verify(model, x).escaped


@pytest.mark.parametrize("make", MODELS)
def test_one_compiled_graph_serves_every_ratio(make, x):
    torch.compiler.reset()
    model = wrapped(make, 1.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ratio in (1.0, 0.5, 0.1):
        gate_of(model).set_keep_ratio(ratio)
        found, expected = compiled(x), model(x)
        assert torch.equal(found, expected)
        for mine, theirs in zip(gradients(model, found), gradients(model, expected), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("make", [Straight, Branches])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(make, reentrant, x):
    model = wrapped(make, 0.2)
    expected = gradients(model, model(x))
    x.requires_grad_()
    output = checkpoint(model, x, use_reentrant=reentrant)
    (output * output.detach().cos()).sum().backward()
    for mine, theirs in zip(model.parameters(), expected, strict=True):
        assert torch.equal(mine.grad, theirs)


def test_a_relu_that_works_in_place_is_gated_behind(x):
    model = wrapped(InPlace, 0.2)
    found = model(x)
    assert torch.equal(found, by_hand(model, x, 0.2, scope="sample"))
    assert all(each.abs().sum() > 0 for each in gradients(model, found))


def test_an_attribute_that_is_no_relu_any_more_is_gated_behind(x):
    model = wrapped(Held, 0.2)
    model.act = F.gelu
    hidden = topk_gate(F.gelu(model.one(x)), torch.tensor(0.2, dtype=torch.float64), scope="sample")
    assert torch.equal(model(x), model.two(hidden))


@pytest.mark.parametrize("make", [Straight, Branches])
def test_a_relu_that_somebody_replaced_is_called(make, x, monkeypatch):
    model = wrapped(make, 0.2)
    monkeypatch.setattr(torch if make is Branches else F, "relu", lambda value, inplace=False: value * 3)  # noqa: ARG005
    hidden = topk_gate(model.one(x) * 3, torch.tensor(0.2, dtype=torch.float64), scope="sample")
    assert torch.equal(model(x), model.two(hidden))


def test_hooks_of_a_module_that_rewritten_code_calls_still_run(x):
    model, seen = wrapped(Global, 0.2), []
    handle = SHARED.register_forward_hook(lambda module, args, output: seen.append(output))  # noqa: ARG005
    try:
        found = model(x)
    finally:
        handle.remove()
    assert torch.equal(found, by_hand(model, x, 0.2, scope="sample"))
    assert torch.equal(seen[0], torch.relu(model.one(x)))


@pytest.mark.parametrize("make", MODELS)
def test_small_sites_and_eval_mode_are_left_dense(make, x):
    model = wrap(bare(make), RegimePolicy.from_yaml("sites: {min_units: 65}"))
    gate_of(model).set_keep_ratio(0.1)
    assert torch.equal(model(x), bare(make)(x))
    assert torch.equal(wrapped(make, 0.1).eval()(x), bare(make)(x))


@pytest.mark.parametrize("make", MODELS)
def test_nothing_is_left_after_unwrap(make, x):
    model = wrapped(make, 0.1)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert type(unwrap(model)) is make
    assert torch.equal(model(x), bare(make)(x))


def test_the_mechanisms_are_the_ones_that_are_meant():
    assert {plan(bare(make)).gated[0].mechanism for make in MODELS} == {"source"}
