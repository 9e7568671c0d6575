"""A ReLU module and its gate are one operation wherever that is the same, and only there."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regimewrap import RegimePolicy, gate_of, unwrap, verify, wrap
from regimewrap.topk.op import topk_gate


def bare(*, inplace=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(inplace), nn.Linear(64, 16))


def wrapped(model=None, keep_ratio=0.2, policy=None):
    model = wrap(bare() if model is None else model, policy)
    gate_of(model).set_keep_ratio(keep_ratio)
    return model


@pytest.fixture
def x():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def gated(x, keep_ratio=0.2, **rule):
    return topk_gate(x, torch.tensor(keep_ratio, dtype=torch.float64), **rule)


def by_hand(model, x, keep_ratio=0.2, **rule):
    return model[2](gated(torch.relu(model[0](x)), keep_ratio, **rule))


def behind_the_last_layer(output):
    """Return the name of what backward runs between the two layers, and of what comes behind it."""
    node = output.grad_fn.next_functions[1][0]
    return node.name(), node.next_functions[0][0].name()


def test_backward_is_one_operation_in_place_of_the_relus(x):
    model = wrapped()
    assert behind_the_last_layer(model(x)) == ("topk_gateBackward", "AddmmBackward0")
    gate_of(model).set_keep_ratio(1.0)
    assert behind_the_last_layer(model(x)) == ("ReluBackward0", "AddmmBackward0")


def test_a_users_hooks_see_the_relus_input_and_the_gated_output(x):
    model, seen = wrapped(), []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: ARG005
    model[1].register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))  # noqa: ARG005
    model(x)
    raw = model[0](x)
    for found, expected in zip(seen, (raw, raw, gated(torch.relu(raw))), strict=True):
        assert torch.equal(found, expected)


def test_a_relu_that_works_in_place_still_does(x):
    model = wrapped(bare(inplace=True))
    assert torch.equal(model(x), by_hand(model, x))
    raw = model[0](x).detach()
    model[1](raw)
    assert (raw >= 0).all()


def test_a_relu_that_is_told_to_work_in_place_later_does(x):
    model = wrapped()
    model[1].inplace = True
    assert torch.equal(model(x), by_hand(model, x))


@pytest.mark.parametrize(("owner", "name"), [(F, "relu"), (nn.ReLU, "forward")])
def test_what_somebody_put_in_the_place_of_torchs_relu_runs(owner, name, x, monkeypatch):
    model = wrapped()
    monkeypatch.setattr(owner, name, lambda *args, **_: args[-1 if owner is nn.ReLU else 0] * 3)
    assert torch.equal(model(x), model[2](gated(model[0](x) * 3)))


def test_called_by_its_forward_alone_it_is_gated_too(x):
    class Around(nn.Sequential):
        def forward(self, x):
            return self[2](self[1].forward(self[0](x)))

    model = wrapped(Around(*bare()))
    assert torch.equal(model(x), by_hand(model, x))
    for sampled in (False, True):  # a sample runs a ReLU of its own beside the gate
        if sampled:
            gate_of(model).sample_next()
        coverage = verify(model, x)
        assert coverage.gated == ("1",)
        assert not coverage.escaped
    assert torch.equal(unwrap(model)(x), bare()(x))


def test_an_activation_in_place_behind_it_is_found_to_escape(x):
    model = wrapped()
    model[1] = nn.Sequential(model[1], nn.SiLU(inplace=True))
    assert verify(model, x).escaped == ("1.1",)


def put_around(module):
    """Put a forward of one's own on a module that keeps what was there, as libraries that move weights about do."""
    module._old_forward = module.forward
    module.forward = functools.partial(lambda module, x: module._old_forward(x) * 2, module)


def take_off(module):
    module.forward = module._old_forward
    del module._old_forward


def test_a_forward_that_was_there_before_is_called(x):
    model = bare()
    put_around(model[1])
    expected = model[2](gated(torch.relu(model[0](x)) * 2))
    assert torch.equal(wrapped(model)(x), expected)
    assert "forward" in vars(unwrap(model)[1])
    take_off(model[1])
    assert torch.equal(model(x), bare()(x))


@pytest.mark.parametrize("taken_off_first", [True, False])
def test_a_forward_that_came_later_is_called_and_both_come_off_in_any_order(taken_off_first, x):
    model = wrapped()
    put_around(model[1])
    assert torch.equal(model(x), model[2](gated(torch.relu(model[0](x)) * 2)))
    if taken_off_first:
        take_off(model[1])
        assert torch.equal(model(x), by_hand(model, x))
        unwrap(model)
    else:
        unwrap(model)
        assert torch.equal(model(x), model[2](torch.relu(model[0](x)) * 2))
        take_off(model[1])
    assert torch.equal(model(x), bare()(x))
    assert b"regimewrap" not in pickle.dumps(model)


def test_torchs_fusion_gates_once(x):
    policy = RegimePolicy.from_yaml("gate: {relative_to: active}")
    model = wrapped(policy=policy)
    fused = torch.ao.quantization.fuse_modules_qat(copy.deepcopy(model), [["0", "1"]])
    expected = by_hand(model, x, relative_to="active")
    assert torch.equal(fused(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_has_a_forward_of_its_own(copied, x):
    model = wrapped()
    twin = copied(model)
    gate_of(model).set_keep_ratio(0.5)
    assert torch.equal(twin(x), by_hand(model, x, 0.2))
    assert torch.equal(model(x), by_hand(model, x, 0.5))
    twin.eval()
    assert torch.equal(twin(x), bare()(x))
    assert torch.equal(model(x), by_hand(model, x, 0.5))


def test_modes_are_the_modules_own(x):
    model = wrapped()
    model[1].eval()
    assert torch.equal(model(x), bare()(x))
