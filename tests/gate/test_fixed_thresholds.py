"""Thresholds that stand in for the selection."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regimewrap import GatePolicy, RegimePolicy, at_keep_ratio, gate_of, unwrap, wrap
from regimewrap.errors import PolicyError
from regimewrap.gate.gate import Site, TopKGate

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.GELU()))


def by_hand(model, x, first, second):
    x = model[0](x).relu()
    x = model[2](torch.where(x > first, x, 0))
    x = nn.functional.gelu(x)
    return torch.where(x.abs() > second, x, 0)


@given(
    x=st.lists(st.floats(width=32, allow_subnormal=False), min_size=1, max_size=20),
    threshold=st.integers(0, 255).map(lambda n: n / 64),  # which every dtype holds exactly
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    score=st.sampled_from(["magnitude", "value"]),
)
def test_a_unit_stays_if_its_score_is_above_the_threshold_or_is_nan(x, threshold, dtype, score):
    gate = TopKGate(RegimePolicy(gate=GatePolicy(score=score)))
    gate.sites = (Site("act", "relu"),)
    gate.set_thresholds({"act": threshold})
    x = torch.tensor(x, dtype=torch.float64).to(dtype)
    scores = x.abs() if score == "magnitude" else x
    expected = torch.where((scores > threshold) | x.isnan(), x, 0)

    y = gate(x, gate.sites[0], training=False)

    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("training", [True, False])
def test_they_hold_in_both_modes_and_whatever_the_ratio(model, training):
    model.train(training)
    gate_of(model).set_thresholds({"1": 0.4, "3": 0.1})
    gate_of(model).set_keep_ratio(0.01)

    torch.testing.assert_close(model(X), by_hand(model, X, 0.4, 0.1))


def test_a_site_without_one_is_left_alone(model):
    gate_of(model).set_thresholds({"1": 0.4})
    gate_of(model).set_keep_ratio(0.1)

    torch.testing.assert_close(model(X), by_hand(model, X, 0.4, 0.0))


def test_the_gate_shows_that_thresholds_are_in_force(model):
    assert "thresholds" not in repr(gate_of(model))
    gate_of(model).set_thresholds({"1": 0.4})
    assert repr(gate_of(model)) == "TopKGate(keep_ratio=1, scope='sample', sites=2, thresholds=1)"


def test_none_brings_the_selection_back(model):
    gate_of(model).set_keep_ratio(0.25)
    selected = model(X)
    gate_of(model).set_thresholds({"1": 0.4})
    assert not torch.equal(model(X), selected)

    gate_of(model).set_thresholds(None)

    assert torch.equal(model(X), selected)


def test_a_ratio_asked_for_inside_wins_and_thresholds_come_back(model):
    model.eval()
    with at_keep_ratio(model, 0.25):
        selected = model(X)
    gate_of(model).set_thresholds({"1": 0.4})
    cut = model(X)

    with at_keep_ratio(model, 0.25):
        assert torch.equal(model(X), selected)
    assert torch.equal(model(X), cut)


def test_an_unknown_site_is_refused_and_nothing_changes(model):
    gate_of(model).set_thresholds({"1": 0.4})
    with pytest.raises(PolicyError, match=r"no gated site is called 'relu'; sites are 1, 3\."):
        gate_of(model).set_thresholds({"relu": 0.1})
    assert gate_of(model).thresholds == {"1": 0.4}


def test_copies_and_files_keep_them_and_change_them_apart(model):
    gate_of(model).set_thresholds({"1": 0.4})
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own bytes
        assert torch.equal(twin(X), model(X))
        gate_of(twin).set_thresholds(None)
        assert gate_of(model).thresholds == {"1": 0.4}


def test_unwrap_takes_them_away(model):
    gate_of(model).set_thresholds({"1": 0.4})
    model = wrap(unwrap(model))

    assert gate_of(model).thresholds is None
    assert torch.equal(model(X), by_hand(model, X, 0.0, 0.0))


def test_gradients_pass_to_units_that_stay(model):
    gate_of(model).set_thresholds({"1": 0.4, "3": 0.1})
    model(X).square().sum().backward()
    mine = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    by_hand(model, X, 0.4, 0.1).square().sum().backward()

    for found, parameter in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_memory_format_is_kept(model):
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    gate = gate_of(model)
    gate.set_thresholds({"1": 0.4})

    assert gate(x, gate.sites[0], training=False).is_contiguous(memory_format=torch.channels_last)


def test_an_encoder_layer_does_not_bypass_them():
    torch.manual_seed(0)
    layer = wrap(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        dense = layer(x)
        gate_of(layer).set_thresholds({gate_of(layer).sites[0].name: 0.5})
        assert not torch.allclose(layer(x), dense)
