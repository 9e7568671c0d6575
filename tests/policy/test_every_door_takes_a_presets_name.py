"""Wherever a policy is taken, a preset's name will do."""

from __future__ import annotations

import pytest
from torch import fx, nn

import regimewrap
from regimewrap import RegimePolicy, TopKGate, gate_of
from regimewrap.policy.policy import PRESETS
from regimewrap.rewrite.insert import InsertGates


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


DOORS = {
    "wrap": lambda name: gate_of(regimewrap.wrap(network(), name)).policy,
    "insert_gates": lambda name: gate_of(regimewrap.insert_gates(network(), name)).policy,
    "InsertGates": lambda name: gate_of(InsertGates(name)(fx.symbolic_trace(network())).graph_module).policy,
    "TopKGate": lambda name: TopKGate(name).policy,
}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("door", DOORS)
def test_a_model_is_gated_by_a_preset(door, name):
    assert DOORS[door](name) == RegimePolicy.preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_cycler_and_a_plan_take_one(name):
    assert regimewrap.plan(network(), name).gated
    cycler = regimewrap.RegimeCycler(regimewrap.wrap(network()), name, total_steps=400)
    assert cycler.policy.strategy == RegimePolicy.preset(name, total_steps=400).cycle.strategy
