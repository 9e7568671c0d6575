"""An activation that anything outside the model holds is gated in a copy; models that share a part share its fate."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import nn

from regimewrap import gate_of, unwrap, verify, wrap
from regimewrap.errors import AlreadyWrappedError, WrapError


class Slots:
    __slots__ = ("act",)

    def __init__(self, act) -> None:
        self.act = act


def in_a_closure(act):
    return lambda x: act(x)


HOLDERS = {
    "closure": in_a_closure,
    "slots": Slots,
    "set": lambda act: {act},
    "frozenset": lambda act: frozenset([act]),
    "deque": lambda act: deque([act]),
    "list": lambda act: [act],
    "dictionary": lambda act: {"act": act},
    "bound method": lambda act: act.forward,
    "model": lambda act: nn.Sequential(nn.Linear(4, 4), act),
}


@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_whatever_else_holds_an_activation_keeps_it_bare(make):
    def parts():
        act = nn.ReLU()
        return nn.Sequential(nn.Linear(4, 32), act), make(act)

    model, holder = parts()
    original, x = model[1], torch.randn(2, 4)
    del model[1]
    model.append(original)
    wrap(model)
    gate_of(model).set_keep_ratio(0.1)
    assert not original._forward_hooks
    assert torch.equal(original(x), torch.relu(x))
    assert verify(model, x).gated == ("1",)
    del original
    assert unwrap(model)[1] is next(iter(nn.Sequential(model[1])))
    assert holder is not None


@pytest.mark.parametrize(
    "keep",
    [
        lambda model, act: setattr(model, "acts", {"list": [act], "set": {act}}),
        lambda model, act: setattr(model, "forward_of", act.forward),
        lambda model, act: setattr(model, "call", lambda x: act(x)),
    ],
    ids=["containers", "bound method", "closure"],
)
def test_what_the_model_itself_holds_is_no_reason_for_a_copy(keep):
    def build():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        keep(model, model[1])
        return model

    model = build()
    before = id(model[1])
    wrap(model)
    assert id(model[1]) == before


class Head(nn.Module):
    def __init__(self, trunk) -> None:
        super().__init__()
        self.trunk, self.out = trunk, nn.Linear(8, 1)

    def forward(self, x):
        return self.out(self.trunk(x))


class Actor(Head):
    pass


class Critic(Head):
    pass


def test_a_model_that_shares_a_trunk_with_a_wrapped_one_is_left_alone_and_told_so():
    trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    actor, critic, x = Actor(trunk), Critic(trunk), torch.randn(2, 4)
    wrap(actor)
    with pytest.raises(WrapError, match=r"Critic is not wrapped itself; it shares trunk.* with a wrapped Actor"):
        unwrap(critic)
    assert verify(actor, x).gated == ("trunk.1",)
    with pytest.raises(AlreadyWrappedError, match=r"unwrap the Actor and wrap a module that holds both"):
        wrap(critic)
    assert verify(actor, x).gated == ("trunk.1",)
    unwrap(actor)
    both = wrap(nn.ModuleList([actor, critic]))  # as the error advises
    assert len(gate_of(both).sites) == 1
    unwrap(both)
    wrap(critic)


def test_a_gate_that_was_taken_off_says_so():
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    gate = gate_of(model)
    assert not gate.released
    unwrap(model)
    assert gate.released
    wrap(model)
    assert gate.released
    assert not gate_of(model).released
