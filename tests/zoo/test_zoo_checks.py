"""The zoo's checks notice what they are there for. Part of the default run, on a toy model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_checks import Census, NondeterministicModelError, examine

import regimewrap
from regimewrap.gate.gate import TopKGate


class Toy(nn.Module):
    """An activation as a module and one as a function, dropout and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


def inputs(training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ARG001  the mode matters to other models
    return (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),), {}


def test_a_sound_wrap_passes():
    figures = examine(Toy(), inputs)
    assert figures["hook"] == figures["source"] == 1
    assert figures["idle"] == 0


def test_a_gate_that_changes_a_bit_at_full_budget_is_noticed(monkeypatch):
    monkeypatch.setattr(TopKGate, "__call__", lambda self, x, site, training: x * 1.0000001)  # noqa: ARG005
    with pytest.raises(AssertionError, match="eval output at full budget is not bit-equal"):
        examine(Toy(), inputs)


def test_a_gate_that_does_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(TopKGate, "_select", lambda self, x, *_, **__: x)  # noqa: ARG005
    with pytest.raises(AssertionError, match=r"at keep ratio 0\.1 is unchanged"):
        examine(Toy(), inputs)


def test_an_activation_that_no_gate_sees_is_noticed(monkeypatch):
    wrap = regimewrap.wrap

    def forgetful(model: nn.Module, *args: Any) -> nn.Module:
        wrap(model, *args).body[2]._forward_hooks.clear()
        return model

    monkeypatch.setattr(regimewrap, "wrap", forgetful)
    with pytest.raises(AssertionError, match=r"body\.2.*escaped"):
        examine(Toy(), inputs)


def test_the_census_sees_it_without_the_catalogue():
    model = Toy()
    plan = regimewrap.plan(model)
    regimewrap.wrap(model).body[2]._forward_hooks.clear()
    with Census(model) as census:
        model(*inputs(True)[0])
    assert census.escaped(plan) == ["body.2 (GELU): gelu"]


def test_what_unwrap_leaves_behind_is_noticed(monkeypatch):
    unwrap = regimewrap.unwrap

    def careless(model: nn.Module) -> nn.Module:
        unwrap(model).body.forgotten = 1
        return model

    monkeypatch.setattr(regimewrap, "unwrap", careless)
    with pytest.raises(AssertionError, match=r"unwrap leaves something behind: attributes.*forgotten"):
        examine(Toy(), inputs)


def test_a_model_that_is_not_deterministic_is_told_from_one_that_wrapping_broke():
    model = Toy()
    model.head.register_forward_hook(lambda module, args, output: output + torch.rand((), generator=generator))  # noqa: ARG005
    generator = torch.Generator()
    with pytest.raises(NondeterministicModelError, match="the bare model gives two results"):
        examine(model, inputs)
