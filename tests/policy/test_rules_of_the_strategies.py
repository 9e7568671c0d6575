from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regimewrap.errors import PolicyError
from regimewrap.policy.strategies import EmaRelax, EmaReset, Move, PlateauReset, Sawtooth, Situation, Spread, Strategy

SPREAD = ["0x1.418cf08e1431bp-3", "0x1.f8db6b2af463bp-2", "0x1.a7a3c7706f101p-5"]


def now(**known: Any) -> Situation:
    unknown = {
        "keep_ratio": 1.0,
        "signal": 1.0,
        "best": 1.0,
        "fall": 0.0,
        "decision": 0,
        "since_raise": None,
        "held": 0,
    }
    return Situation(**{**unknown, **known})


def teeth(sawtooth: Sawtooth, decisions: int) -> list[float]:
    return [sawtooth.initial_keep_ratio] + [sawtooth.next_move(now(decision=d)).keep_ratio for d in range(decisions)]


shapes = st.sampled_from(["linear", "geometric", "cosine"])


@given(
    shape=shapes,
    decisions=st.integers(2, 50),
    floor=st.floats(0, 1, exclude_min=True),
    at=st.integers(0, 10**9),
    keep_ratio=st.floats(0, 1, exclude_min=True),
    fall=st.floats(0, math.inf),
)
def test_a_sawtooth_depends_on_the_decision_count_alone(shape, decisions, floor, at, keep_ratio, fall):
    sawtooth = Sawtooth(shape=shape, decisions=decisions, floor=floor)

    move = sawtooth.next_move(now(decision=at, keep_ratio=keep_ratio, fall=fall, held=at % 7))

    assert move == sawtooth.next_move(now(decision=at))
    assert move == sawtooth.next_move(now(decision=at + decisions))


@given(shape=shapes, decisions=st.integers(2, 50), floor=st.floats(0, 1, exclude_min=True))
def test_a_tooth_goes_from_dense_down_to_the_floor(shape, decisions, floor):
    tooth = teeth(Sawtooth(shape=shape, decisions=decisions, floor=floor), decisions)

    assert tooth[0] == tooth[decisions] == 1.0
    assert tooth[decisions - 1] == pytest.approx(floor)
    assert all(before >= after >= floor for before, after in pairwise(tooth[:decisions]))


def test_each_shape_goes_down_in_its_own_way():
    linear, geometric, cosine = (
        teeth(Sawtooth(shape=shape, decisions=5, floor=0.0625), 4) for shape in ("linear", "geometric", "cosine")
    )

    assert linear == pytest.approx([1, 0.765625, 0.53125, 0.296875, 0.0625])
    assert geometric == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])
    assert cosine == pytest.approx([1, 0.86271, 0.53125, 0.19979, 0.0625], abs=1e-5)


def test_ema_reset_sits_out_its_cooldown_and_then_judges_again():
    strategy = EmaReset(decay=0.5, tolerance=0.1, cooldown=2)

    moves = [strategy.next_move(now(since_raise=since, fall=9.0)) for since in (None, 1, 2, 3)]

    assert [move.event for move in moves] == ["reset", "hold", "hold", "reset"]


def test_ema_relax_gives_back_more_the_further_behind_up_to_its_caps():
    strategy = EmaRelax(tolerance=0.01, step=0.03, step_cap=0.1)

    raised = [strategy.next_move(now(keep_ratio=0.5, fall=fall)).keep_ratio - 0.5 for fall in (0.011, 0.02, 0.5)]

    assert raised == pytest.approx([0.03 * 1.15, 0.03 * 2.5, 0.1])
    assert strategy.next_move(now(keep_ratio=0.99, fall=0.5)) == Move(1.0, "relax")
    assert strategy.next_move(now(keep_ratio=0.5, fall=math.inf)).keep_ratio == 0.6


def test_plateau_reset_waits_for_the_signal_and_gives_up_after_its_patience():
    strategy = PlateauReset(decay=0.5, tolerance=0.1, patience=2, floor=0.2)

    assert strategy.next_move(now(keep_ratio=0.8, fall=0.1)) == Move(0.4, "compress")
    assert strategy.next_move(now(keep_ratio=0.3, fall=0.0)) == Move(0.2, "compress")
    assert strategy.next_move(now(keep_ratio=0.8, fall=0.2, held=1)) == Move(0.8, "hold")
    assert strategy.next_move(now(keep_ratio=0.8, fall=0.2, held=2)) == Move(1.0, "reset")


def test_plateau_reset_resets_at_the_floor():
    assert PlateauReset(floor=0.2).next_move(now(keep_ratio=0.2)) == Move(1.0, "reset")


def test_spread_is_log_uniform_at_every_update_and_at_every_second_one():
    rule, floor = Spread(floor=0.05, rest=0), 0.05
    for step in (1, 2):
        for begin in (0, 7, 10**6):
            places = sorted(math.log(rule.ratio(begin + step * n)) / math.log(floor) for n in range(64))
            gap = max(abs(place - (n + 0.5) / 64) for n, place in enumerate(places))

            assert gap < 0.05  # 64 random draws: 0.1


def test_spread_begins_at_the_full_budget_and_stays_in_its_range():
    ratios = [Spread(floor=0.05).ratio(update) for update in range(20_000)]

    assert ratios[0] == 1.0
    assert min(ratios) >= 0.05
    assert min(ratios) < 0.0501
    assert sum(ratio > 0.95 for ratio in ratios) > 200


@pytest.mark.parametrize("rest", [0.25, 0.5, 0.75])
def test_spread_rests_a_share_of_the_pairs_and_moves_on_from_where_it_was(rest: float):
    moving, pairs = (
        Spread(rest=0),
        [(Spread(rest=rest).ratio(2 * n), Spread(rest=rest).ratio(2 * n + 1)) for n in range(1, 801)],
    )
    moved = [ratio for pair in pairs for ratio in pair if pair != (1.0, 1.0)]

    assert sum(pair == (1.0, 1.0) for pair in pairs) == pytest.approx(800 * rest, abs=1)
    assert moved == [moving.ratio(2 + n) for n in range(len(moved))]


def test_spread_is_the_power_that_it_says_to_a_millionth():
    for floor in (0.05, 0.5, 1e-6):
        for update in (1, 2, 3, 1000, 12_345_678, 2**63):
            place = (update * 0x9E3779B97F4A7C15 % 2**64) / 2**64
            assert Spread(floor=floor, rest=0).ratio(update) == pytest.approx(floor**place, rel=2e-6)


def test_spread_is_the_same_on_every_machine_bit_for_bit():
    assert [Spread(floor=0.05, rest=0).ratio(update).hex() for update in (1, 2, 1_000_000)] == SPREAD


@given(floor=st.floats(0, 1, exclude_min=True), update=st.integers(0, 2**70))
def test_spread_takes_any_floor_and_any_number_of_updates(floor, update):
    assert floor <= Spread(floor=floor).ratio(update) <= 1


@pytest.mark.parametrize("cls", [EmaReset, EmaRelax])
def test_a_guarded_cycle_ends_at_its_floor_and_when_it_is_overdue(cls: type[EmaReset]):
    strategy = cls(floor=0.2)

    assert strategy.next_move(now(keep_ratio=0.2, guarded=True)) == Move(1.0, "reset")
    assert strategy.next_move(now(keep_ratio=0.8, guarded=True, overdue=True)) == Move(1.0, "reset")
    assert strategy.next_move(now(keep_ratio=0.2, overdue=True)) == Move(0.2, "hold")


def test_plateau_reset_ends_an_overdue_cycle_and_waits_no_longer():
    assert PlateauReset().next_move(now(keep_ratio=0.5, fall=9.0, guarded=True, overdue=True)) == Move(1.0, "reset")


@pytest.mark.parametrize("cls", [EmaReset, EmaRelax])
@given(decisions=st.integers(1, 2000))
def test_rescaled_a_compression_to_the_floor_and_the_cooldown_fill_the_cycle(cls: type[EmaReset], decisions: int):
    for floor, end in ((0.001, 0.1), (0.05, 0.05), (0.2, 0.2)):
        strategy = cls(floor=floor).rescaled(decisions)

        assert strategy.cooldown <= decisions / 8
        assert strategy.decay ** (decisions - strategy.cooldown) == pytest.approx(end, rel=1e-6)


def test_rescaled_relaxing_undoes_as_many_compressions_as_before():
    before = EmaRelax()
    after = before.rescaled(40)

    assert math.log(after.decay) / math.log(before.decay) == pytest.approx(after.step / before.step)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EmaReset(decay=0), r"decay should be greater than 0; got 0\."),
        (lambda: EmaReset(decay=98), r"got 98\. If you meant 98%, pass decay=0\.98\."),
        (lambda: EmaReset(cooldown=-1), r"cooldown should be greater than or equal to 0; got -1\."),
        (lambda: EmaReset(tolerance=math.inf), r"tolerance should be a finite number; got inf\."),
        (lambda: EmaReset(floor=True), r"floor should be a number, not a boolean; got True\."),
        (lambda: EmaRelax(tolerance=0), r"tolerance should be greater than 0; got 0\."),
        (lambda: Sawtooth(decisions=1), r"decisions should be greater than or equal to 2; got 1\."),
        (lambda: Sawtooth(shape="cosin"), r"'linear', 'geometric' or 'cosine'; got 'cosin'\. Did you mean 'cosine'\?"),
        (lambda: EmaReset(toleranc=1), r"toleranc is not a setting; got 1\. Did you mean 'tolerance'\?"),
        (lambda: EmaReset(0.9), r"EmaReset takes its settings by name; got 0\.9 without one"),
    ],
)
def test_a_mistaken_setting_is_explained_when_the_strategy_is_built(build: Any, message: str):
    with pytest.raises(PolicyError, match=message):
        build()


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Strategy(kind="mine")


def test_a_strategy_cannot_be_changed():
    with pytest.raises(PolicyError, match=r"EmaReset is frozen; make a changed copy: \.replace\(decay=0\.5\)"):
        EmaReset().decay = 0.5  # type: ignore[misc]
