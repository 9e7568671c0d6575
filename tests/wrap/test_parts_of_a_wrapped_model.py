"""A part of a wrapped model belongs to that model, until it is all that is left of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regimewrap import gate_of, unwrap, verify, wrap
from regimewrap.errors import AlreadyWrappedError, WrapError


class Calls(nn.Module):
    """It calls its activation as a function, so that its method is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.linear(x))


def hooked() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


every_mechanism = pytest.mark.parametrize("make", [hooked, Calls])


@every_mechanism
def test_a_part_cannot_be_unwrapped_or_wrapped_by_itself_and_the_error_names_the_whole(make):
    model = wrap(nn.Sequential(make(), make()))
    with pytest.raises(WrapError, match=r"a part \(1\) of a wrapped Sequential; unwrap that"):
        unwrap(model[1])
    with pytest.raises(AlreadyWrappedError, match="a part of a wrapped Sequential"):
        wrap(model[1])
    assert len(verify(model, torch.randn(2, 4)).gated) == 2
    unwrap(model)
    assert wrap(model[1]) is model[1]


@every_mechanism
def test_a_part_has_the_gate_of_the_whole(make):
    model = wrap(nn.Sequential(make(), make()))
    assert gate_of(model[1]) is gate_of(model)


@every_mechanism
def test_what_is_left_of_a_model_can_be_unwrapped(make):
    model = wrap(nn.Sequential(make(), make()))
    part, bare = model[1], copy.deepcopy(unwrap(copy.deepcopy(model)))[1]
    model.itself = [model]  # in a cycle, which is how models often go
    del model
    unwrap(part)
    x = torch.randn(2, 4)
    assert torch.equal(part(x), bare(x))
    assert type(part) is type(bare)


@every_mechanism
def test_a_copied_part_can_be_unwrapped_and_the_whole_stays_gated(make):
    model = wrap(nn.Sequential(make(), make()))
    unwrap(copy.deepcopy(model[1]))
    assert len(verify(model, torch.randn(2, 4)).gated) == 2


@every_mechanism
def test_a_model_around_a_wrapped_one_can_be_unwrapped(make):
    model = wrap(nn.Sequential(make(), make()))
    around = nn.Sequential(model, nn.Linear(4, 2))
    assert unwrap(around) is around
    wrap(around)
