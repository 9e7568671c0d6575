"""METHOD's two controllers, written down a second time as plain loops, and compared step by step."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import RegimePolicy
from regimewrap.policy.strategies import EmaRelax, EmaReset


def accuracies(seed: int, length: int) -> list[float]:
    """A noisy climb with collapses, so that every branch is taken."""
    source, level, values = random.Random(seed), 0.1, []  # noqa: S311
    for _ in range(length):
        level = level * 0.4 if source.random() < 0.004 else level + 0.004 * (1 - level)
        values.append(min(1.0, max(0.0, source.gauss(level, 0.04))))
    return values


def reset_loop(values: list[float], every: int = 128) -> list[float]:
    """Weight 0.5 on the past; at a decision: over 0.12 behind the best, back to 1 and sit out 3; else × 0.982."""
    average, best, ratio, sit_out, ratios = None, None, 1.0, 0, []
    for batch, value in enumerate(values, 1):
        average = value if average is None else 0.5 * average + 0.5 * value
        if batch % every == 0:
            best = average if best is None or average > best else best
            if sit_out > 0:
                sit_out -= 1
            elif best - average > 0.12:
                ratio, sit_out = 1.0, 3
            else:
                ratio = ratio * 0.982
        ratios.append(ratio)
    return ratios


def relax_loop(values: list[float], cap: float) -> list[float]:
    """Weight 0.9 on the past; every 50 batches: over 0.01 behind, add and sit out 3; else × 0.98, not below 0.2."""
    average, best, ratio, sit_out, ratios = None, None, 1.0, 0, []
    for batch, value in enumerate(values, 1):
        average = value if average is None else 0.9 * average + (1 - 0.9) * value
        if batch % 50 == 0:
            best = average if best is None or average > best else best
            fall = best - average
            if sit_out > 0:
                sit_out -= 1
            elif fall > 0.01:
                ratio, sit_out = min(1.0, ratio + min(cap, 0.03 * min(5, 1 + 1.5 * (fall - 0.01) / 0.01))), 3
            else:
                ratio = max(0.2, ratio * 0.98)
        ratios.append(ratio)
    return ratios


def published(name: str, **changes: object) -> RegimePolicy:
    return RegimePolicy.preset(name, full_share=0).replace(cycle={"scaled_to": None, **changes})


def driven(policy: RegimePolicy, values: list[float]) -> tuple[list[float], set[str]]:
    cycler = RegimeCycler(TopKGate(), policy)
    ratios = [cycler.step(accuracy=value).keep_ratio for value in values]
    return ratios, {decision.event for decision in cycler.history}


def test_the_preset_accuracy_reset_is_the_published_controller():
    values = accuracies(0, 20_000)

    ratios, events = driven(published("accuracy-reset"), values)

    assert ratios == reset_loop(values)
    assert events == {"compress", "hold", "reset"}


def test_the_preset_accuracy_relax_is_the_published_controller():
    values = accuracies(1, 20_000)

    ratios, events = driven(published("accuracy-relax"), values)

    assert ratios == relax_loop(values, cap=0.03)
    assert events == {"compress", "hold", "relax"}


def test_with_a_higher_cap_the_urgency_of_the_relaxing_shows():
    values = accuracies(2, 20_000)
    policy = published("accuracy-relax", strategy={"step_cap": 1.0})

    ratios, _ = driven(policy, values)

    assert ratios == relax_loop(values, cap=1.0)
    assert ratios != relax_loop(values, cap=0.03)


@given(values=st.lists(st.floats(0, 1), max_size=80), every=st.integers(1, 5))
def test_the_published_controller_is_followed_for_any_accuracy_and_interval(values: list[float], every: int):
    ratios, _ = driven(published("accuracy-reset", every=every), values)

    assert ratios == reset_loop(values, every)


def test_a_fall_beyond_tolerance_at_full_budget_is_a_reset_but_no_new_cycle():
    policy = published("accuracy-reset", every=1, smoothing=0.0)
    cycler = RegimeCycler(TopKGate(), policy.replace(cycle={"strategy": EmaReset(decay=1.0)}))

    cycler.step(accuracy=0.9)
    regime = cycler.step(accuracy=0.5)

    assert (regime.keep_ratio, regime.event, regime.phase, regime.cycle) == (1.0, "reset", "recover", 0)
    assert [cycler.step(accuracy=0.1).event for _ in range(4)] == ["hold", "hold", "hold", "reset"]


def test_a_fall_of_exactly_the_tolerance_is_tolerated():
    strategy = EmaReset(tolerance=0.25)
    policy = published("accuracy-reset", every=1, smoothing=0.0, strategy=strategy)
    cycler = RegimeCycler(TopKGate(), policy)

    assert [cycler.step(accuracy=value).event for value in (1.0, 0.75)] == ["compress", "compress"]


def test_the_numbers_of_the_presets_are_the_methods():
    reset, relax = (published(name).cycle for name in ("accuracy-reset", "accuracy-relax"))

    assert (reset.every, reset.smoothing, relax.every, relax.smoothing) == (128, 0.5, 50, 0.9)
    assert reset.strategy == EmaReset(decay=1 - 0.018, tolerance=0.12, cooldown=3)
    assert relax.strategy == EmaRelax(decay=1 - 0.02, tolerance=0.01, step=0.03, step_cap=0.03, floor=0.2)
    for name, cycle in (("accuracy-reset", reset), ("accuracy-relax", relax)):
        mended = RegimePolicy.preset(name).cycle
        assert mended.strategy == cycle.strategy.replace(floor=0.05)
        assert (mended.every, mended.smoothing) == (cycle.every, cycle.smoothing)
        assert (cycle.monitor, cycle.mode, cycle.tolerance_kind) == ("accuracy", "max", "absolute")
