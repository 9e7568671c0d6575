from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regimewrap.report import conclusion
from regimewrap.report.summary import spread, tie


def test_a_clear_difference_is_told_with_its_size_and_few_seeds_make_it_a_hint(three_arms):
    assert conclusion(three_arms) == (
        "Over 3 seeds: at full budget, loss-reset 93.2 % and accuracy-relax 92.8 % tie with dense (93.0 %); "
        "at keep ratio 0.1, loss-reset 91.0 % is 3.0 points above dense and accuracy-relax 88.2 % ties with dense "
        "(88.0 %); from so few seeds that is a hint, not a proof."
    )


def test_an_arm_that_loses_is_said_to_be_below(make_experiment):
    figures = {
        "dense": [{"1.0": a} for a in (0.90, 0.91, 0.90)],
        "loss-reset": [{"1.0": a} for a in (0.80, 0.81, 0.80)],
    }
    assert "loss-reset 80.3 % is 10.0 points below dense (90.3 %)" in conclusion(make_experiment(figures))


def test_arms_that_all_tie_are_told_so_without_a_hint(make_experiment):
    figures = {arm: [{"1.0": a} for a in (0.90, 0.91)] for arm in ("dense", "loss-reset")}
    assert (
        conclusion(make_experiment(figures))
        == "Over 2 seeds: at full budget, loss-reset 90.5 % ties with dense (90.5 %)."
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
    assert "loss-reset 90.0 % ties with control (90.0 %)" in text


def test_runs_without_a_number_are_counted_and_not_averaged(make_experiment):
    figures = {
        "dense": [{"1.0": a} for a in (0.90, 0.91, 0.90)],
        "loss-reset": [{"1.0": a} for a in (0.90, math.nan, 0.91)],
        "accuracy-relax": [{"1.0": math.nan}] * 3,
    }
    text = conclusion(make_experiment(figures))
    assert "loss-reset 90.5 % without 1 lost run ties with dense" in text
    assert "accuracy-relax left too few numbers to compare" in text


@pytest.mark.parametrize("figures", [{}, {"dense": []}, {"dense": [{}], "loss-reset": [{}]}])
def test_nothing_finished_is_said_to_show_nothing(make_experiment, figures):
    assert conclusion(make_experiment(figures)) == "No run finished, so the figures show nothing yet."


def test_two_seeds_that_agree_by_chance_make_no_lead_of_one_image():
    assert tie(spread([0.9500, 0.9500]), spread([0.9515, 0.9515]))


def test_a_difference_is_no_tie_once_seeds_tell_it_apart():
    assert tie(spread([0.90, 0.93]), spread([0.93, 0.96]))
    assert not tie(spread([0.90, 0.93] * 8), spread([0.93, 0.96] * 8))


def test_an_arm_that_varies_more_must_differ_more():
    dense = spread([0.949, 0.950, 0.951, 0.950, 0.950])
    assert tie(spread([0.936, 0.939, 0.941, 0.944, 0.954]), dense)
    assert not tie(spread([0.942, 0.942, 0.943, 0.943, 0.944]), dense)


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
