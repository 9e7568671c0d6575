"""Density and whether the gate binds, per site."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regimewrap import at_keep_ratio, gate_of, watch, wrap


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 50), nn.GELU()))


def test_the_gate_does_not_bind_at_full_budget(model):
    with watch(model) as seen:
        model(torch.randn(3, 4))
    assert seen.bound == 0.0
    assert seen.by_site["1"].density == seen.by_site["1"].density_before


def test_a_ratio_above_the_share_of_active_units_does_not_bind(model):
    with at_keep_ratio(model, 0.9), watch(model) as seen:
        model(torch.randn(3, 4))
    assert seen.by_site["1"].bound == 0.0
    assert seen.by_site["3"].bound == 1.0
    assert seen.bound == 0.5


def test_density_after_the_gate_is_the_keep_ratio_where_it_binds(model):
    with at_keep_ratio(model, 0.1), watch(model) as seen:
        model(torch.randn(3, 4))
        model(torch.randn(3, 4))
    assert seen.density == pytest.approx(0.1)
    assert {record.calls for record in seen.by_site.values()} == {2}
    assert seen.by_site["1"].units == 600


def test_watching_ends_with_the_block(model):
    with pytest.raises(ZeroDivisionError), watch(model):
        raise ZeroDivisionError
    assert not gate_of(model).observers


def test_nothing_ran_is_zero(model):
    with watch(model) as seen:
        pass
    assert (seen.bound, seen.density, seen.by_site) == (0.0, 0.0, {})
