from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.errors import PolicyError
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import METHOD_STEPS, PRESETS, CyclePolicy, RegimePolicy
from regimewrap.policy.strategies import Spread

EACH = pytest.mark.parametrize("name", PRESETS)


def test_the_presets_are_those_that_are_promised():
    assert PRESETS == ("mixed", "sawtooth", "loss-reset", "accuracy-reset", "accuracy-relax", "dense")


def test_the_default_policy_is_mixed_and_keeps_half_of_each_batch_dense():
    assert RegimePolicy() == RegimePolicy.preset("mixed")
    assert CyclePolicy() == RegimePolicy().cycle
    assert RegimePolicy().cycle.strategy == Spread(floor=0.05)
    assert RegimePolicy().cycle.full_share == 0.5


@EACH
def test_half_of_each_batch_is_dense_and_one_argument_changes_that(name: str):
    assert RegimePolicy.preset(name).cycle.full_share == 0.5
    assert RegimePolicy.preset(name, full_share=0.25).cycle.full_share == 0.25
    assert RegimePolicy.preset(name, full_share=0).cycle.full_share == 0
    assert getattr(RegimePolicy.preset(name).cycle.strategy, "floor", 0.05) == 0.05
    for wrong in (1, -0.1, "half", True):
        with pytest.raises(PolicyError, match=r"full_share"):
            RegimePolicy.preset(name, full_share=wrong)


@EACH
def test_a_preset_that_moves_with_the_run_is_scaled_when_the_cycler_is_built(name: str):
    policy = RegimePolicy.preset(name)
    cycler = RegimeCycler(TopKGate(policy), total_steps=800)

    assert cycler.policy == RegimePolicy.preset(name, total_steps=800).cycle
    assert cycler.policy == RegimeCycler(TopKGate(), name, total_steps=800).policy
    assert cycler.total_steps == 800
    assert (policy.cycle.scaled_to == "run") == (name not in ("mixed", "dense"))
    assert cycler.policy.scaled_to == (None if name in ("mixed", "dense") else 800)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("mixed", "dense")])
def test_without_a_length_the_cycler_says_what_to_pass(name: str):
    with pytest.raises(PolicyError, match=r"needs the length of the run: pass total_steps=N"):
        RegimeCycler(TopKGate(), name)
    with pytest.raises(PolicyError, match=r"scaled to a run of 800 updates; got total_steps=900"):
        RegimeCycler(TopKGate(), RegimePolicy.preset(name, total_steps=800), total_steps=900)
    as_written = RegimePolicy.preset(name).replace(cycle={"scaled_to": None}).cycle
    assert RegimeCycler(TopKGate(), as_written).policy == as_written


@EACH
@pytest.mark.parametrize("total_steps", [0, -5, True, 1.5, "800", math.nan])
def test_the_cycler_takes_a_whole_number_of_steps(name: str, total_steps: Any):
    with pytest.raises(PolicyError, match="total_steps must be a whole number ≥ 1; got"):
        RegimeCycler(TopKGate(), name, total_steps=total_steps)


@EACH
@given(total_steps=st.integers(1, 10**30))
def test_every_length_of_a_run_has_a_valid_policy(name: str, total_steps: int):
    policy = RegimePolicy.preset(name, total_steps=total_steps)

    assert RegimePolicy.from_yaml(policy.to_yaml()) == policy


@pytest.mark.parametrize("total_steps", [50, 200, 800, 5_000, 40_000, 195_500, 3_000_000])
@pytest.mark.parametrize("name", ["loss-reset", "accuracy-reset", "accuracy-relax"])
def test_a_dozen_compressions_and_cooldowns_fit_the_run(name: str, total_steps: int):
    cycle = RegimePolicy.preset(name, total_steps=total_steps).cycle

    compression = math.log(cycle.strategy.floor) / math.log(cycle.strategy.decay)
    cycles = total_steps / (cycle.every * (compression + cycle.strategy.cooldown))

    assert 11 <= cycles <= 13.5


@pytest.mark.parametrize("total_steps", [50, 200, 800, 5_000, 40_000])
def test_a_dozen_teeth_fit_the_run(total_steps: int):
    cycler = RegimeCycler(TopKGate(), RegimePolicy.preset("sawtooth", total_steps=total_steps))

    for _ in range(total_steps):
        regime = cycler.step()

    assert 11 <= regime.cycle <= 13
    assert min(decision.keep_ratio for decision in cycler.history) == pytest.approx(0.05)


@pytest.mark.parametrize("total_steps", [200, 800, 5_000])
def test_a_net_that_breaks_at_small_budgets_goes_through_about_a_dozen_cycles(total_steps: int):
    cycler = RegimeCycler(TopKGate(), RegimePolicy.preset("loss-reset", total_steps=total_steps))

    for step in range(total_steps):
        # It learns, and below a tenth of its units it cannot follow.
        regime = cycler.step(2.3 * math.exp(-4 * step / total_steps) + (2.0 if cycler.keep_ratio < 0.1 else 0.0))

    assert 8 <= regime.cycle <= 14


@pytest.mark.parametrize("total_steps", [200, 800, 5_000])
def test_a_signal_that_never_falls_behind_is_reset_at_the_floor_or_when_its_share_is_over(total_steps: int):
    for name in ("loss-reset", "accuracy-reset", "accuracy-relax"):
        cycler = RegimeCycler(TopKGate(), name, total_steps=total_steps)

        ratios = [cycler.step(-float(step), accuracy=step / total_steps).keep_ratio for step in range(total_steps)]

        assert 8 <= cycler.history[-1].cycle <= 13
        assert min(ratios) <= 0.08
        assert ratios[: cycler.policy.warmup - 1] == [1.0] * (cycler.policy.warmup - 1)


def test_at_the_methods_length_the_numbers_as_published_are_the_methods():
    cycle = RegimePolicy.preset("accuracy-reset", total_steps=METHOD_STEPS, full_share=0).cycle

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
        ("xyz", r"one of mixed, sawtooth, loss-reset, accuracy-reset, accuracy-relax, dense; got 'xyz'\.$"),
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
