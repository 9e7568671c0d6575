"""Density and whether the gate binds, per site."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regimewrap import at_keep_ratio, gate_of, watch, wrap
from regimewrap.errors import PolicyError


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


def test_a_training_is_sampled_and_what_is_between_is_left_alone(model):
    gate, looks = gate_of(model), []
    with watch(model, every=3) as seen:
        for step in range(7):
            gate.set_keep_ratio(1 / (step + 2))
            handle = model[1].register_forward_hook(lambda *_: looks.append(len(gate.observers)))
            model(torch.randn(8, 4))
            handle.remove()
            model.eval()(torch.randn(8, 4))
            model.train()

    assert [sample.forward for sample in seen.over_time["3"]] == [0, 3, 6]
    assert [sample.density for sample in seen.over_time["3"]] == pytest.approx([25 / 50, 10 / 50, 6 / 50])
    assert looks == [1, 0, 0, 1, 0, 0, 1]
    assert not gate.observers
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_forward_pass_that_fails_is_looked_at_no_longer(model):
    with watch(model, every=1):
        with pytest.raises(RuntimeError):
            model(torch.randn(8, 5))
        assert not gate_of(model).observers


def test_dead_and_always_on_channels_are_counted_over_all_that_was_seen():
    model = wrap(nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU()))
    with torch.no_grad():
        model[0].weight[:, 0, 0, 0] = torch.tensor([1.0, -1.0, 0.0, 0.0])
        model[0].bias[:] = torch.tensor([0.0, 0.0, 1.0, -1.0])
    with watch(model) as seen:
        model(torch.full((2, 1, 3, 3), 0.5))
        model(torch.full((2, 1, 3, 3), -2.0))

    (first, second), record = seen.over_time["1"], seen.by_site["1"]
    assert (
        (first.channels, first.dead, first.always_on) == (second.channels, second.dead, second.always_on) == (4, 2, 2)
    )
    assert (record.channels, record.dead, record.always_on) == (4, 1, 1)
    assert (first.threshold, second.threshold, record.threshold) == (0.5, 1.0, 0.5)


def test_one_activation_of_layers_of_several_widths_is_counted_at_each():
    act = nn.ReLU()
    model = wrap(nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 3), act))
    with watch(model) as seen:
        model(torch.randn(2, 4))
    assert seen.by_site["1"].channels == 11


def test_how_often_to_look_is_a_whole_number(model):
    with pytest.raises(PolicyError, match="every must be a whole number"), watch(model, every=0):
        pass
