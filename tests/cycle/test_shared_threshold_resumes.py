"""The histogram of network scope is a part of the cycler's state, and of nothing else's."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from regimewrap import CyclePolicy, GatePolicy, RegimeCycler, RegimePolicy, gate_of, wrap
from regimewrap.errors import StateError
from regimewrap.policy.strategies import Constant, EmaReset

NETWORK = RegimePolicy(
    gate=GatePolicy(scope="network"), cycle=CyclePolicy(strategy=EmaReset(decay=0.6), every=3, full_share=0)
)


def made(policy: RegimePolicy = NETWORK) -> tuple[nn.Module, torch.optim.Optimizer, RegimeCycler]:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1)), policy)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), RegimeCycler(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, cycler: RegimeCycler, updates: range) -> list[float]:
    losses = []
    for update in updates:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(update))
        loss = (model(x) - x[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycler.step(loss)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stop", [0, 1, 7, 9])
def test_a_run_goes_on_exactly_as_if_it_had_never_stopped(stop):
    whole = train(*made(), range(30))

    first = made()
    losses = train(*first, range(stop))
    states = [first[0].state_dict(), first[1].state_dict(), json.loads(json.dumps(first[2].state_dict()))]
    second = made()
    train(*second, range(3))  # something to be overwritten
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)

    assert losses + train(*second, range(stop, 30)) == whole


def test_a_state_of_another_scope_is_refused_and_changes_nothing():
    sample = made(RegimePolicy(cycle=NETWORK.cycle))
    train(*sample, range(5))
    network = made()
    train(*network, range(5))
    before = network[2].state_dict()

    with pytest.raises(StateError, match=r"gate.scope is 'sample' in the state and 'network' here"):
        network[2].load_state_dict(sample[2].state_dict())
    assert network[2].state_dict() == before
    with pytest.raises(StateError, match=r"gate.scope is 'network' in the state and 'sample' here"):
        sample[2].load_state_dict(before)


@pytest.mark.parametrize(
    "damage",
    [
        {"bins": [1], "counts": []},
        {"bins": [2, 1], "counts": [1, 1]},
        {"bins": [1, 1], "counts": [1, 1]},
        {"bins": [-1], "counts": [1]},
        {"bins": [10**6], "counts": [1]},
        {"bins": [1], "counts": [0]},
        {"bins": [1], "counts": [1.5]},
        [1, 2],
    ],
)
def test_a_damaged_histogram_is_refused(damage):
    cycler = made()[2]
    state = {**cycler.state_dict(), "network": damage}
    with pytest.raises(StateError, match="damaged"):
        cycler.load_state_dict(state)


def test_a_state_saved_before_there_was_a_histogram_leaves_none():
    model, optimizer, cycler = made()
    state = cycler.state_dict()
    train(model, optimizer, cycler, range(2))
    cycler.load_state_dict(state)
    assert gate_of(model).network.histogram is None
    assert state["network"] == {"bins": [], "counts": []}


def test_a_cycler_that_drives_two_models_counts_both():
    models = [made()[0] for _ in range(2)]
    cycler = RegimeCycler(models[0], CyclePolicy(strategy=Constant(keep_ratio=0.5), full_share=0))
    cycler.bind(models[1])
    for model in models:
        model(torch.randn(4, 8))
    cycler.step()
    first, second = (gate_of(model).network.histogram for model in models)
    assert first.sum() == 2 * 4 * 64
    assert torch.equal(first, second)


def test_a_copied_pair_of_model_and_cycler_goes_on_by_itself():
    model, _, cycler = made()
    model(torch.randn(4, 8))
    cycler.step(1.0)
    twin, twins_cycler = copy.deepcopy((model, cycler))
    twin(torch.randn(9, 8))
    twins_cycler.step(1.0)
    assert gate_of(twin).network.histogram.sum() == 9 * 64
    assert gate_of(model).network.histogram.sum() == 4 * 64


def test_a_model_that_is_bound_takes_the_histogram_over():
    model, _, cycler = made()
    model(torch.randn(4, 8))
    cycler.step(1.0)
    averaged = made()[0]
    cycler.bind(averaged)
    assert torch.equal(gate_of(averaged).network.histogram, gate_of(model).network.histogram)
