"""What holds for each strategy, one list for all of them."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regimewrap import wrap
from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import PRESETS, CyclePolicy, RegimePolicy
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
@given(now=situations())
def test_a_move_is_to_a_ratio_in_range(strategy: Strategy, now: Situation):
    ratio, event = strategy.next_move(now)

    assert 0 < ratio <= 1
    assert event in ([None] if strategy.each_update else EVENTS)


@EACH
@given(now=situations())
def test_a_rule_is_pure(strategy: Strategy, now: Situation):
    assert strategy.next_move(now) == strategy.next_move(now)


@EACH
@given(signals=SIGNALS, kind=TOLERANCE_KINDS, mode=st.sampled_from(["min", "max"]))
def test_the_ratio_stays_in_range_whatever_the_signal(strategy: Strategy, signals: list[float], kind: str, mode: str):
    cycler = cycler_for(strategy, tolerance_kind=kind, mode=mode, every=1)

    for regime in run(cycler, signals):
        assert 0 < regime[0] <= 1

    assert len(cycler.history) == (0 if strategy.each_update else len(signals))
    json.dumps(cycler.state_dict(), allow_nan=False)


@EACH
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
@given(decisions=st.integers(1, 10**6))
def test_it_can_be_rescaled_to_any_number_of_decisions(strategy: Strategy, decisions: int):
    assert isinstance(strategy.rescaled(decisions), type(strategy))


@EACH
def test_the_schema_describes_it(strategy: Strategy):
    schema = RegimePolicy.json_schema()

    described = schema["$defs"][type(strategy).__name__]
    assert described["additionalProperties"] is False
    assert set(described["properties"]) == set(type(strategy).model_fields)


# The presets, by the same list

EACH_PRESET = pytest.mark.parametrize("name", PRESETS)
RUN = 60


def made(name: str) -> tuple[nn.Module, torch.optim.Optimizer, RegimeCycler]:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 2)), name)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), RegimeCycler(model, total_steps=RUN)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, cycler: RegimeCycler, updates: range, size: int = 16
) -> list[tuple[float, float]]:
    seen = []
    for update in updates:
        x = torch.randn(size, 8, generator=torch.Generator().manual_seed(update))
        y = (x[:, 0] > 0).long()
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append((loss.item(), cycler.keep_ratio))
        cycler.step(loss, accuracy=(logits.argmax(1) == y).float().mean())
    return seen


@EACH_PRESET
@pytest.mark.parametrize("size", [16, 1])
def test_a_preset_trains_the_full_budget_and_the_small_ones(name: str, size: int):
    model, optimizer, cycler = made(name)

    losses = [loss for loss, _ in trained(model, optimizer, cycler, range(RUN), size)]

    assert all(map(math.isfinite, losses))
    if size > 1:
        assert sum(losses[-10:]) < sum(losses[:10])
    assert cycler.updates == RUN


@EACH_PRESET
@pytest.mark.parametrize("stop", [0, 1, 23, 24])
def test_a_preset_resumes_between_any_two_updates(name: str, stop: int):
    straight = made(name)
    whole = trained(*straight, range(RUN))
    first = made(name)
    before = trained(*first, range(stop))
    states = [first[0].state_dict(), first[1].state_dict(), json.loads(json.dumps(first[2].state_dict()))]
    second = made(name)
    trained(*second, range(5))  # something to be overwritten
    second[1].state.clear()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)

    assert before + trained(*second, range(stop, RUN)) == whole
    assert second[2].state_dict() == straight[2].state_dict()


@EACH_PRESET
def test_a_preset_goes_on_in_a_copy(name: str):
    original = made(name)
    trained(*original, range(20))

    copied = copy.deepcopy(original)

    assert trained(*copied, range(20, RUN)) == trained(*original, range(20, RUN))


@EACH_PRESET
def test_a_preset_compiles_to_one_graph_whatever_its_ratio(name: str):
    eager, (model, optimizer, cycler) = made(name), made(name)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    losses = trained(compiled, optimizer, cycler, range(RUN))

    assert [ratio for _, ratio in losses] == pytest.approx([ratio for _, ratio in trained(*eager, range(RUN))])
    assert counter.frame_count == 1


@EACH_PRESET
def test_a_checkpoint_stays_small_and_the_state_exact_however_long_the_run(name: str):
    policy = RegimePolicy.preset(name, total_steps=10**6).cycle.replace(every=8)
    cycler = RegimeCycler(TopKGate(), policy)
    for step in range(4096):
        cycler.step(math.exp(-step / 4000) + 0.01 * math.sin(step), accuracy=0.5)
    state = cycler.state_dict()
    late = {**state, "updates": 999_996 + 4, "state": {**state["state"], "began": 999_000}}
    late["history"] = [{**each, "step": 10**6 - 8 * n} for n, each in enumerate(reversed(state["history"]))][::-1]
    if policy.strategy.each_update:
        late["state"]["keep_ratio"] = policy.strategy.ratio(10**6)

    cycler.load_state_dict(late)

    assert len(json.dumps(cycler.state_dict(), indent=2)) < 100_000
    assert len(cycler.history) <= 256
