from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from regimewrap import gate_of, wrap
from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.errors import NotWrappedError, PolicyError, SignalError
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import CyclePolicy, RegimePolicy
from regimewrap.policy.strategies import Constant, Dense, EmaReset, PlateauReset, Sawtooth, Spread


def cycler_with(**cycle: Any) -> RegimeCycler:
    settings = {"strategy": EmaReset(decay=0.5, cooldown=0), "every": 1, "smoothing": 0.0, "guarded": False, **cycle}
    return RegimeCycler(TopKGate(), CyclePolicy(**settings))


def test_nothing_is_decided_between_decisions():
    cycler = cycler_with(every=3)

    events = [cycler.step(1.0).event for _ in range(7)]

    assert events == [None, None, "compress", None, None, "compress", None]
    assert [decision.step for decision in cycler.history] == [3, 6]


def test_the_signal_is_an_exponential_average_that_starts_at_the_first_value():
    cycler = cycler_with(every=4, smoothing=0.75)

    for value in (4.0, 8.0, math.nan, 0.0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cycler.step(value)

    assert cycler.history[0].signal == 0.75 * (0.75 * 4 + 0.25 * 8)


@pytest.mark.parametrize(
    ("kind", "losses", "falls"),
    [
        ("absolute", (10.0, 4.0, 5.0), 1.0),
        ("relative", (10.0, 4.0, 5.0), 0.25),
        ("progress", (10.0, 4.0, 5.0), 1 / 6),
        ("relative", (3.0, -2.0, -1.0), 0.5),
        ("progress", (3.0, -2.0, -1.0), 0.2),
    ],
)
def test_a_fall_is_measured_in_the_unit_of_the_tolerance(kind: str, losses: tuple[float, ...], falls: float):
    for tolerance, event in ((falls * 0.999, "reset"), (falls * 1.001, "compress")):
        cycler = cycler_with(tolerance_kind=kind, strategy=EmaReset(tolerance=tolerance, cooldown=0))

        assert [cycler.step(loss).event for loss in losses][-1] == event


@pytest.mark.parametrize("kind", ["relative", "progress"])
def test_a_fall_from_a_best_of_nothing_is_beyond_any_tolerance(kind: str):
    cycler = cycler_with(tolerance_kind=kind, strategy=EmaReset(tolerance=1e300))

    assert [cycler.step(loss).event for loss in (0.0, 0.0, 1e-9)] == ["compress", "compress", "reset"]


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1000.0, 0.0), (0.001, -7.0)])
def test_progress_does_not_depend_on_the_signals_scale_or_offset(scale: float, offset: float):
    cycler = cycler_with(strategy=EmaReset(tolerance=0.12))
    losses = [2.3, 1.5, 1.0, 0.7, 0.85, 0.95, 0.5, 0.4, 0.8]

    events = [cycler.step(scale * loss + offset).event for loss in losses]

    assert events == ["compress"] * 5 + ["reset"] + ["hold"] * 3


def test_for_accuracy_more_is_better():
    policy = RegimePolicy.preset("accuracy-reset", full_share=0).replace(
        cycle={"every": 1, "smoothing": 0.0, "scaled_to": None}
    )
    cycler = RegimeCycler(TopKGate(), policy)

    assert [cycler.step(accuracy=value).event for value in (0.1, 0.9, 0.7)] == ["compress", "compress", "reset"]


def test_phase_and_cycle_tell_the_story():
    cycler = cycler_with(strategy=EmaReset(decay=0.5, tolerance=0.1, cooldown=1), tolerance_kind="absolute")

    regimes = [cycler.step(loss) for loss in (1.0, 1.0, 2.0, 1.0, 1.0)]

    assert [(r.keep_ratio, r.event, r.phase, r.cycle) for r in regimes] == [
        (0.5, "compress", "compress", 0),
        (0.25, "compress", "compress", 0),
        (1.0, "reset", "recover", 1),
        (1.0, "hold", "recover", 1),
        (0.5, "compress", "compress", 1),
    ]
    assert [decision.phase for decision in cycler.history] == [regime.phase for regime in regimes]


@pytest.mark.parametrize(("strategy", "phase"), [(Dense(), "dense"), (Constant(keep_ratio=0.3), "compress")])
def test_what_never_moves_stays_in_its_first_phase(strategy: Any, phase: str):
    cycler = cycler_with(strategy=strategy)

    assert {cycler.step().phase for _ in range(3)} == {phase}


def test_at_the_floor_the_ratio_is_held():
    cycler = cycler_with(strategy=EmaReset(decay=0.5, floor=0.3))

    assert [cycler.step(1.0)[::3] for _ in range(3)] == [(0.5, "compress"), (0.3, "compress"), (0.3, "hold")]


def test_values_that_are_not_finite_are_left_out_counted_and_warned_about_once():
    cycler = cycler_with(every=4)
    clean = cycler_with(every=2)

    for value in (math.nan, 2.0, math.inf):
        cycler.step(value)
    with pytest.warns(RuntimeWarning, match="3 of the last 4 values of loss were not finite") as told:
        cycler.step(-math.inf)
    for value in (1e301, 1.0, 1.0, torch.tensor(math.nan)):
        cycler.step(value)
    for value in (2.0, 2.0, 1.0, 1.0):
        clean.step(value)

    assert len(told) == 1
    assert told[0].filename == __file__
    assert cycler.skipped == 5
    assert [decision.signal for decision in cycler.history] == [decision.signal for decision in clean.history]


def test_without_one_finite_value_the_ratio_is_held():
    cycler = cycler_with(strategy=PlateauReset(decay=0.5, patience=9))
    cycler.step(1.0)

    with pytest.warns(RuntimeWarning):
        regime = cycler.step(math.nan)

    assert (regime.keep_ratio, regime.event, cycler.history[-1].signal) == (0.5, "hold", None)
    assert cycler.step(1.0).keep_ratio == 0.25


def test_the_decision_stands_when_the_warning_is_an_error():
    cycler = cycler_with()

    with pytest.raises(RuntimeWarning):
        cycler.step(math.nan)

    assert (cycler.updates, len(cycler.history)) == (1, 1)


@pytest.mark.parametrize(
    "value",
    [
        2,
        2.0,
        np.float32(2),
        np.int64(2),
        torch.tensor(2.0, requires_grad=True),
        torch.tensor([[2]]),
        torch.tensor(2.0, dtype=torch.bfloat16),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_any_one_real_number_will_do(value: Any):
    cycler = cycler_with(every=2)

    cycler.step(2.0)
    cycler.step(value)

    assert cycler.history[0].signal == 2.0


def test_a_loss_that_the_loop_changes_afterwards_was_taken_as_it_was():
    cycler, loss = cycler_with(every=2, smoothing=0.5), torch.tensor(1.0)

    cycler.step(loss)
    loss.mul_(100)
    cycler.step(1.0)

    assert cycler.history[0].signal == 1.0


def test_no_graph_is_kept_alive():
    cycler = cycler_with(every=9)

    cycler.step((torch.ones(3, requires_grad=True) * 2).sum())

    assert not any(value.requires_grad for value in cycler._pending)


def test_tensors_are_only_read_when_a_decision_is_due(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("the device was waited for")

    cycler = cycler_with(every=4)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        for _ in range(3):
            cycler.step(torch.tensor(1.0))
        with pytest.raises(AssertionError):
            cycler.step(torch.tensor(1.0))

    assert cycler.step(torch.tensor(1.0)).event == "compress"


@pytest.mark.parametrize(
    ("monitor", "call", "message"),
    [
        ("loss", {}, r"monitors 'loss', which is missing: call step\(loss\)"),
        ("loss", {"accuracy": 1.0}, r"missing; got accuracy: call step\(loss\)"),
        ("accuracy", {"loss": 1.0, "acc": 0.5}, r"missing; got loss and acc: call step\(loss, accuracy=...\)"),
        ("accuracy", {"loss": 1.0}, r"call step\(loss, accuracy=...\)"),
        ("loss", {"loss": torch.ones(2)}, r"tensor of shape \(2,\): call .mean\(\) on it"),
        ("loss", {"loss": torch.ones(0)}, r"tensor of shape \(0,\)"),
        ("loss", {"loss": torch.tensor(True)}, "real number; got a torch.bool tensor"),
        ("loss", {"loss": torch.tensor(1j)}, "real number; got a torch.complex64 tensor"),
        ("loss", {"loss": torch.empty((), device="meta")}, "on meta"),
        ("loss", {"loss": True}, "a number or a tensor of one element; got True"),
        ("loss", {"loss": "0.5"}, "got '0.5'"),
        ("loss", {"loss": [0.5]}, r"got \[0.5\]"),
        ("accuracy", {"accuracy": 85}, r"fraction in \[0, 1\]; got 85 .*If you meant 85%, pass accuracy=0.85"),
        ("accuracy", {"accuracy": torch.tensor(1.5)}, r"got 1.5 at update 3"),
    ],
)
def test_a_signal_that_cannot_steer_is_refused_and_changes_nothing(monitor: str, call: dict[str, Any], message: str):
    cycler = cycler_with(every=3, monitor=monitor, mode="max")
    for _ in range(2):
        cycler.step(0.5, accuracy=0.5)
    before = cycler.state_dict()

    with pytest.raises(SignalError, match=message):
        cycler.step(**call)

    assert cycler.state_dict() == before
    assert cycler.step(0.5, accuracy=0.5).event == "compress"


def test_raising_for_values_that_are_not_finite_names_the_update_and_counts_none():
    cycler = cycler_with(every=3, on_nonfinite="raise")
    cycler.step(1.0)
    cycler.step(math.nan)
    before = cycler.state_dict()

    with pytest.raises(SignalError, match="loss was nan at update 2"):
        cycler.step(1.0)

    assert cycler.state_dict() == {**before, "pending": [1.0]}


def test_a_refused_value_is_forgotten_so_that_the_next_steps_work():
    cycler = cycler_with(every=3, on_nonfinite="raise")
    cycler.step(1.0)
    cycler.step(math.nan)
    with pytest.raises(SignalError):
        cycler.step(1.0)
    resumed = cycler_with(every=3, on_nonfinite="raise")
    resumed.load_state_dict(cycler.state_dict())

    for each in (cycler, resumed):
        assert each.step(2.0).event == "compress"
        assert each.history[0].signal == 2.0
        assert [each.step(1.0).event for _ in range(3)] == [None, None, "compress"]


def test_a_step_is_whole_where_its_warning_is_an_error():
    policy = RegimePolicy.from_yaml("gate: {scope: network}").replace(
        cycle={"strategy": EmaReset(decay=0.5), "every": 1, "guarded": False, "full_share": 0}
    )
    model = wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()), policy)
    cycler = RegimeCycler(model)
    model(torch.randn(3, 4))

    with pytest.raises(RuntimeWarning):
        cycler.step(math.nan)

    assert gate_of(model).network.histogram.sum() == 24
    assert cycler.updates == 1


def test_the_best_is_compared_with_signals_of_like_budgets_only():
    cycler = cycler_with(strategy=EmaReset(decay=0.5, cooldown=0, tolerance=0.1), guarded=True)

    events = [cycler.step(loss).event for loss in (1.0, 5.0, 9.0)]  # each budget for the first time
    assert events == ["compress"] * 3
    assert cycler.step(9.0).event == "compress"
    assert cycler.state_dict()["state"]["bests"] == [1.0, 5.0, 9.0, 9.0]


def test_a_fall_at_a_like_budget_resets():
    cycler = cycler_with(
        strategy=EmaReset(decay=0.9, cooldown=0, tolerance=0.1), tolerance_kind="absolute", guarded=True
    )

    assert [cycler.step(loss).event for loss in (1.0, 1.05, 1.2)] == ["compress", "compress", "reset"]


def test_a_strategy_without_a_guard_is_told_the_best_of_all():
    cycler = cycler_with(strategy=EmaReset(decay=0.5, cooldown=0, tolerance=0.1), tolerance_kind="absolute")

    assert [cycler.step(loss).event for loss in (1.0, 5.0)] == ["compress", "reset"]


def test_plateau_reset_counts_its_holds_anew_after_each_move():
    cycler = cycler_with(
        strategy=PlateauReset(decay=0.5, tolerance=0.1, patience=2, floor=0.01), tolerance_kind="absolute"
    )

    events = [cycler.step(loss).event for loss in (1.0, 9.0, 9.0, 1.0, 9.0, 9.0, 9.0)]

    assert events == ["compress", "hold", "hold", "compress", "hold", "hold", "reset"]


def test_a_warm_up_is_at_the_full_budget_and_the_rule_begins_after_it():
    for strategy in (EmaReset(decay=0.5), Sawtooth(decisions=3, floor=0.25), Constant(keep_ratio=0.2), Spread()):
        cycler = cycler_with(strategy=strategy, warmup=4)
        bare = cycler_with(strategy=strategy)

        ratios = [cycler.keep_ratio, *(cycler.step(1.0).keep_ratio for _ in range(10))]

        assert ratios[:4] == [1.0] * 4
        if strategy.kind == "spread":
            assert ratios[4:] == [1.0, *(bare.step(1.0).keep_ratio for _ in range(6))]
        else:
            assert ratios[4:] == [bare.step(1.0).keep_ratio for _ in range(7)]


def test_metrics_that_the_policy_does_not_monitor_are_ignored():
    cycler = cycler_with()

    assert cycler.step(1.0, accuracy="high", f1=torch.ones(3)).event == "compress"


def test_strategies_without_a_signal_need_no_argument_and_look_at_none():
    cycler = cycler_with(strategy=Sawtooth(decisions=2, floor=0.5), on_nonfinite="raise")

    assert [cycler.step().keep_ratio, cycler.step(torch.ones(3)).keep_ratio] == [0.5, 1.0]
    assert cycler.history[0].signal is None


def test_bound_models_follow():
    first, second = TopKGate(), TopKGate()
    cycler = RegimeCycler(first, CyclePolicy(strategy=EmaReset(decay=0.5), every=1))
    cycler.step(1.0)

    cycler.bind(second)
    cycler.bind(second)
    assert float(second.keep_ratio) == 0.5
    cycler.step(1.0)

    assert float(first.keep_ratio) == float(second.keep_ratio) == 0.25


def test_without_a_policy_the_gates_is_followed():
    policy = RegimePolicy.preset("sawtooth", total_steps=500)

    assert RegimeCycler(TopKGate("sawtooth"), total_steps=500).policy == policy.cycle
    assert RegimeCycler(TopKGate(policy)).policy == policy.cycle
    assert RegimeCycler(TopKGate(), policy).policy == policy.cycle
    assert RegimeCycler(TopKGate(), policy.cycle).policy == policy.cycle


@pytest.mark.parametrize("policy", [EmaReset(), {}, 3])
def test_what_is_not_a_policy_is_refused(policy: Any):
    with pytest.raises(PolicyError, match="policy must be a RegimePolicy, a preset's name"):
        RegimeCycler(TopKGate(), policy)


@pytest.mark.parametrize("model", [torch.nn.Linear(1, 1), None, "model"])
def test_a_cycler_needs_a_wrapped_model(model: Any):
    with pytest.raises(NotWrappedError):
        RegimeCycler(model)
    with pytest.raises(NotWrappedError):
        cycler_with().bind(model)
