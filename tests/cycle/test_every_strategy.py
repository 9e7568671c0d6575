"""What holds for each strategy, one list for all of them."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import CyclePolicy, RegimePolicy
from regimewrap.policy.strategies import (
    EVENTS,
    Constant,
    Dense,
    EmaRelax,
    EmaReset,
    Event,
    PlateauReset,
    Sawtooth,
    Situation,
    Spread,
    Strategy,
    kinds,
)

STRATEGIES = [
    Spread(),
    Spread(floor=5e-324),
    EmaReset(),
    EmaReset(decay=0.3, tolerance=0.0, cooldown=0, floor=1e-300),
    EmaRelax(),
    EmaRelax(decay=0.5, step=1.0, step_cap=1.0, slope=0.0, cooldown=0),
    PlateauReset(),
    PlateauReset(decay=0.4, tolerance=0.0, patience=0, floor=0.2),
    Sawtooth(shape="linear", decisions=5, floor=5e-324),
    Sawtooth(shape="geometric", decisions=2),
    Sawtooth(shape="cosine", decisions=7, floor=0.3),
    Constant(keep_ratio=0.2),
    Dense(),
]
EACH = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.kind)

SIGNALS = st.lists(st.floats() | st.floats(0, 3), max_size=40)
TOLERANCE_KINDS = st.sampled_from(["absolute", "relative", "progress"])
ratios = st.floats(0, 1, exclude_min=True)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    first_raise = draw(st.none() | st.integers(1, 9))
    return Situation(
        keep_ratio=draw(ratios),
        signal=draw(st.floats(-1e300, 1e300)),
        best=draw(st.floats(-1e300, 1e300)),
        fall=draw(st.floats(0, math.inf)),
        decision=draw(st.integers(0, 10**6)),
        since_raise=first_raise,
        held=draw(st.integers(0, 50)),
    )


def cycler_for(strategy: Strategy, **settings: object) -> RegimeCycler:
    return RegimeCycler(TopKGate(), CyclePolicy(strategy=strategy, **{"every": 3, "smoothing": 0.4, **settings}))


def run(cycler: RegimeCycler, signals: list[float]) -> list[tuple[float, str, int, Event | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [tuple(cycler.step(signal)) for signal in signals]


def test_the_list_has_every_strategy():
    assert {strategy.kind for strategy in STRATEGIES} >= set(kinds())


@EACH
@settings(deadline=None)
@given(now=situations())
def test_a_move_is_to_a_ratio_in_range(strategy: Strategy, now: Situation):
    ratio, event = strategy.next_move(now)

    assert 0 < ratio <= 1
    assert event in ([None] if strategy.each_update else EVENTS)


@EACH
@settings(deadline=None)
@given(now=situations())
def test_a_rule_is_pure(strategy: Strategy, now: Situation):
    assert strategy.next_move(now) == strategy.next_move(now)


@EACH
@settings(deadline=None)
@given(signals=SIGNALS, kind=TOLERANCE_KINDS, mode=st.sampled_from(["min", "max"]))
def test_the_ratio_stays_in_range_whatever_the_signal(strategy: Strategy, signals: list[float], kind: str, mode: str):
    cycler = cycler_for(strategy, tolerance_kind=kind, mode=mode, every=1)

    for regime in run(cycler, signals):
        assert 0 < regime[0] <= 1

    assert len(cycler.history) == (0 if strategy.each_update else len(signals))
    json.dumps(cycler.state_dict(), allow_nan=False)


@EACH
@settings(deadline=None)
@given(signals=SIGNALS, stop=st.integers(0, 40), kind=TOLERANCE_KINDS)
def test_resuming_at_any_step_equals_never_having_stopped(
    strategy: Strategy, signals: list[float], stop: int, kind: str
):
    straight = cycler_for(strategy, tolerance_kind=kind)
    stopped = cycler_for(strategy, tolerance_kind=kind)
    resumed = cycler_for(strategy, tolerance_kind=kind)

    trace = run(straight, signals)
    run(stopped, signals[:stop])
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))

    assert run(resumed, signals[stop:]) == trace[stop:]
    assert resumed.history == straight.history
    assert resumed.state_dict() == straight.state_dict()


@EACH
def test_saving_changes_nothing(strategy: Strategy):
    signals = [1.0, 0.5, 2.0, 0.4, 0.3, 5.0, 5.0, 0.1]
    saving, straight = cycler_for(strategy), cycler_for(strategy)

    for signal in signals:
        assert saving.step(signal) == straight.step(signal)
        saving.state_dict()


@EACH
def test_the_gate_holds_the_cyclers_ratio(strategy: Strategy):
    gate = TopKGate()
    cycler = RegimeCycler(gate, CyclePolicy(strategy=strategy, every=1))

    assert float(gate.keep_ratio) == cycler.keep_ratio == strategy.initial_keep_ratio
    for signal in (1.0, 0.9, 4.0, 4.0, 0.2, 0.1):
        assert float(gate.keep_ratio) == cycler.keep_ratio
        assert cycler.step(signal).keep_ratio == float(gate.keep_ratio)


@EACH
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])  # noqa: S301
def test_a_copy_goes_on_like_the_original_with_a_gate_of_its_own(strategy: Strategy, copied):
    gate = TopKGate()
    cycler = RegimeCycler(gate, CyclePolicy(strategy=strategy, every=3))
    for signal in (1.0, 0.9, 0.8, 0.7):
        cycler.step(signal)

    twin_gate, twin = copied((gate, cycler))
    moves = [twin.step(signal) for signal in (0.7, 0.6, 4.0, 4.0, 4.0)]

    assert moves == [cycler.step(signal) for signal in (0.7, 0.6, 4.0, 4.0, 4.0)]
    assert twin_gate is not gate
    assert float(twin_gate.keep_ratio) == twin.keep_ratio


@EACH
def test_a_policy_with_it_survives_files_and_copies(strategy: Strategy):
    policy = RegimePolicy(cycle=CyclePolicy(strategy=strategy))

    assert RegimePolicy.from_yaml(policy.to_yaml()) == policy
    assert RegimePolicy.from_json(policy.to_json()) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)  # noqa: S301
    assert hash(RegimePolicy.from_yaml(policy.to_yaml())) == hash(policy)


@EACH
@settings(deadline=None)
@given(decisions=st.integers(1, 10**6))
def test_it_can_be_rescaled_to_any_number_of_decisions(strategy: Strategy, decisions: int):
    assert isinstance(strategy.rescaled(decisions), type(strategy))


@EACH
def test_the_schema_describes_it(strategy: Strategy):
    schema = RegimePolicy.json_schema()

    described = schema["$defs"][type(strategy).__name__]
    assert described["additionalProperties"] is False
    assert set(described["properties"]) == set(type(strategy).model_fields)
