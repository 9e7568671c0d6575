from __future__ import annotations

import math

import numpy as np
import pytest

from regimewrap.report.statistics import FEWEST_SEEDS, compared, difference, holm


def _arm(mean: float, noise: float, seeds: int = 20, shared: float = 0.0, draw: int = 0) -> dict[int, float]:
    both, own = (np.random.default_rng(each).standard_normal(seeds) for each in (99, draw))
    return {seed: float(mean + shared * both[seed] + noise * own[seed]) for seed in range(seeds)}


def test_pairing_finds_a_difference_that_the_seeds_spread_hides():
    first = _arm(0.905, 0.001, shared=0.02, draw=1)
    second = _arm(0.900, 0.001, shared=0.02, draw=2)
    assert difference(first, second).verdict() == "above"
    assert difference(second, first).verdict() == "below"
    shuffled = dict(zip(first, np.random.default_rng(0).permutation(list(first.values())).tolist(), strict=True))
    assert difference(shuffled, second).verdict() == "open"


def test_arms_within_a_fifth_of_a_point_tie_whatever_the_test_says():
    found = difference(_arm(0.901, 1e-5), _arm(0.900, 1e-5, draw=1))
    assert found.p < 0.05
    assert found.verdict() == "tie"


def test_fewer_than_eight_seeds_support_no_claim():
    seeds = FEWEST_SEEDS - 1
    assert difference(_arm(0.9, 1e-3, seeds), _arm(0.5, 1e-3, seeds)).verdict() == "open"
    assert not difference(_arm(0.9, 1e-3, seeds), _arm(0.5, 1e-3, seeds)).holds()


def test_the_sign_flip_test_counts_every_pattern_of_eight_seeds():
    assert difference(_arm(0.9, 1e-3, 8), _arm(0.5, 1e-3, 8)).p == pytest.approx(2 / 2**8)


def test_equal_arms_tie_with_no_chance_of_a_claim():
    found = difference(_arm(0.9, 0.1), _arm(0.9, 0.1))
    assert (found.mean, found.low, found.high, found.p, found.verdict()) == (0, 0, 0, 1, "tie")


def test_figures_that_are_not_finite_leave_out_their_pair_alone():
    broken = {**_arm(0.9, 1e-3), 3: math.nan, 4: math.inf}
    assert difference(broken, _arm(0.8, 1e-3)).seeds == 18


def test_only_seeds_of_both_arms_are_compared():
    assert difference({0: 0.5, 1: 0.6, 7: 0.9}, {0: 0.5, 1: 0.5, 2: 0.1}).seeds == 2


@pytest.mark.parametrize("figures", [{}, {0: 0.5}, {0: math.nan, 1: 0.3}])
def test_one_pair_has_neither_interval_nor_test(figures):
    found = difference(figures, {0: 0.4, 1: 0.3})
    assert math.isnan(found.low)
    assert math.isnan(found.p)
    assert found.verdict() == "open"


def test_holm_grows_with_the_number_of_arms_and_keeps_their_order():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    lone = compared({"a": _arm(0.91, 0.01)}, _arm(0.9, 0.01, draw=1))["a"].p
    among = compared({name: _arm(0.91, 0.01) for name in "abcd"}, _arm(0.9, 0.01, draw=1))["a"].p
    assert among == pytest.approx(min(1, 4 * lone))


def test_of_arms_that_are_alike_about_one_family_in_twenty_shows_a_claim():
    claims = 0
    for draw in range(40):
        arms = {str(arm): _arm(0.9, 0.02, 10, draw=100 * draw + arm) for arm in range(5)}
        found = compared(arms, _arm(0.9, 0.02, 10, draw=100 * draw + 50))
        claims += any(each.verdict() in ("above", "below") for each in found.values())
    assert claims <= 6
