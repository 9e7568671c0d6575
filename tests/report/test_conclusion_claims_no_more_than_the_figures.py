from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regimewrap.report import conclusion


def test_a_clear_difference_over_three_seeds_is_no_claim(three_arms):
    assert conclusion(three_arms) == (
        "Over 3 seeds: at full budget, loss-reset 93.2 % and accuracy-relax 92.8 % cannot be told from dense (93.0 %); "
        "at keep ratio 0.1, loss-reset 91.0 % and accuracy-relax 88.2 % cannot be told from dense (88.0 %); "
        "fewer than 8 seeds support no claim."
    )


def test_a_clear_difference_over_eight_seeds_is_told_with_its_size(make_experiment):
    figures = {
        "dense": [{"1.0": 0.90 + d / 1000} for d in range(8)],
        "loss-reset": [{"1.0": 0.80 + d / 900} for d in range(8)],
        "accuracy-relax": [{"1.0": 0.9001 + d / 1000} for d in range(8)],
    }
    assert conclusion(make_experiment(figures)) == (
        "Over 8 seeds: at full budget, loss-reset 80.4 % is 10.0 points below dense and accuracy-relax 90.4 % ties "
        "with dense (90.3 %)."
    )


def test_one_seed_shows_nothing_certain(make_experiment):
    figures = {"dense": [{"1.0": 0.5, "0.1": 0.4}], "loss-reset": [{"1.0": 0.9, "0.1": 0.8}]}
    assert conclusion(make_experiment(figures)) == (
        "One seed: at full budget, dense 50.0 % and loss-reset 90.0 %; at keep ratio 0.1, dense 40.0 % and loss-reset "
        "80.0 %; one seed shows nothing certain."
    )


def test_without_a_dense_arm_the_method_is_not_judged(make_experiment):
    text = conclusion(make_experiment({"loss-reset": [{"1.0": 0.9}, {"1.0": 0.8}]}))
    assert text.endswith("loss-reset 85.0 %; without a dense arm to compare with, this does not judge the method.")


def test_a_dense_arm_is_known_by_its_strategy_whatever_its_name(make_experiment):
    experiment = make_experiment({"control": [{"1.0": 0.9}, {"1.0": 0.9}], "loss-reset": [{"1.0": 0.9}, {"1.0": 0.9}]})
    control = experiment.arms[0].model_copy(update={"policy": {"cycle": {"strategy": {"kind": "dense"}}}})
    text = conclusion(experiment.model_copy(update={"arms": [control, experiment.arms[1]]}))
    assert "loss-reset 90.0 % cannot be told from control (90.0 %)" in text


def test_runs_without_a_number_are_counted_and_not_averaged(make_experiment):
    figures = {
        "dense": [{"1.0": a} for a in (0.90, 0.91, 0.90)],
        "loss-reset": [{"1.0": a} for a in (0.90, math.nan, 0.91)],
        "accuracy-relax": [{"1.0": math.nan}] * 3,
    }
    text = conclusion(make_experiment(figures))
    assert "loss-reset 90.5 % without 1 lost run cannot be told from dense" in text
    assert "accuracy-relax left too few numbers to compare" in text


@pytest.mark.parametrize("figures", [{}, {"dense": []}, {"dense": [{}], "loss-reset": [{}]}])
def test_nothing_finished_is_said_to_show_nothing(make_experiment, figures):
    assert conclusion(make_experiment(figures)) == "No run finished, so the figures show nothing yet."


accuracies = st.one_of(st.floats(0, 1), st.just(math.nan))
runs = st.dictionaries(st.sampled_from(["1.0", "0.5", "0.2", "0.1"]), accuracies)
arms = st.dictionaries(st.sampled_from(["dense", "loss-reset", "accuracy-relax"]), st.lists(runs, max_size=3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(figures=arms)
def test_whatever_the_records_hold_it_is_one_sentence_in_numbers(make_experiment, figures):
    text = conclusion(make_experiment(figures, trace=False))
    assert text.endswith(".")
    assert ". " not in text
    assert "nan" not in text
    assert "None" not in text
