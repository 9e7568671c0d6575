from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.errors import PolicyError
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import METHOD_STEPS, PRESETS, RegimePolicy

EACH = pytest.mark.parametrize("name", PRESETS)


def test_the_presets_are_those_that_are_promised():
    assert PRESETS == ("loss-reset", "accuracy-reset", "accuracy-relax", "sawtooth", "dense")


def test_the_default_policy_is_loss_reset():
    assert RegimePolicy() == RegimePolicy.preset("loss-reset")


@EACH
@settings(deadline=None)
@given(total_steps=st.integers(1, 10**30))
def test_every_length_of_a_run_has_a_valid_policy(name: str, total_steps: int):
    policy = RegimePolicy.preset(name, total_steps=total_steps)

    assert RegimePolicy.from_yaml(policy.to_yaml()) == policy


@pytest.mark.parametrize("total_steps", [50, 200, 800, 5_000, 40_000, 195_500, 3_000_000])
@pytest.mark.parametrize("name", ["loss-reset", "accuracy-reset", "accuracy-relax"])
def test_a_dozen_compressions_and_cooldowns_fit_the_run(name: str, total_steps: int):
    cycle = RegimePolicy.preset(name, total_steps=total_steps).cycle

    compression = math.log(0.1) / math.log(cycle.strategy.decay)
    cycles = total_steps / (cycle.every * (compression + cycle.strategy.cooldown))

    assert 11 <= cycles <= 13.5


@pytest.mark.parametrize("total_steps", [50, 200, 800, 5_000, 40_000])
def test_a_dozen_teeth_fit_the_run(total_steps: int):
    cycler = RegimeCycler(TopKGate(), RegimePolicy.preset("sawtooth", total_steps=total_steps))

    for _ in range(total_steps):
        regime = cycler.step()

    assert 11 <= regime.cycle <= 13
    assert min(decision.keep_ratio for decision in cycler.history) == pytest.approx(0.1)


@pytest.mark.parametrize("total_steps", [200, 800, 5_000])
def test_a_net_that_breaks_at_small_budgets_goes_through_about_a_dozen_cycles(total_steps: int):
    cycler = RegimeCycler(TopKGate(), RegimePolicy.preset("loss-reset", total_steps=total_steps))

    for step in range(total_steps):
        # It learns, and below a tenth of its units it cannot follow.
        regime = cycler.step(2.3 * math.exp(-4 * step / total_steps) + (2.0 if cycler.keep_ratio < 0.1 else 0.0))

    assert 8 <= regime.cycle <= 13


def test_at_the_methods_length_the_numbers_are_the_methods():
    cycle = RegimePolicy.preset("accuracy-reset", total_steps=METHOD_STEPS).cycle

    assert cycle.every == 128
    assert cycle.strategy.decay == pytest.approx(0.982, abs=5e-4)
    assert cycle.strategy.cooldown == 3


def test_short_runs_decide_often_and_long_ones_seldom():
    every = [RegimePolicy.preset("loss-reset", total_steps=n).cycle.every for n in (1, 50, 800, 20_000, 10**6)]

    assert every == [1, 1, 8, 13, 655]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("los-reset", r"got 'los-reset'\. Did you mean 'loss-reset'\?"),
        ("xyz", r"one of loss-reset, accuracy-reset, accuracy-relax, sawtooth, dense; got 'xyz'\.$"),
        (None, "got None"),
        (["dense"], r"got \['dense'\]"),
    ],
)
def test_an_unknown_preset_is_answered_with_the_names(name: Any, message: str):
    with pytest.raises(PolicyError, match=message):
        RegimePolicy.preset(name)


@EACH
@pytest.mark.parametrize("total_steps", [0, -5, True, 1.5, "800", math.nan])
def test_a_run_has_a_whole_number_of_steps(name: str, total_steps: Any):
    with pytest.raises(PolicyError, match="total_steps must be a whole number ≥ 1; got"):
        RegimePolicy.preset(name, total_steps=total_steps)
