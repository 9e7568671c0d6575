from __future__ import annotations

from typing import Protocol

import pytest

from regimewrap.report.results import Arm, Experiment, Run, TracePoint

ABOUT = {"dense": "Never gated.", "loss-reset": "Back to the full budget when the loss falls behind."}


class MakeExperiment(Protocol):
    def __call__(self, figures: dict[str, list[dict[str, float]]], *, trace: bool = True) -> Experiment: ...


def _policy(arm: str) -> dict[str, object]:
    kind = "dense" if arm == "dense" else "ema-reset"
    return {"schema_version": 1, "gate": {"scope": "sample"}, "cycle": {"strategy": {"kind": kind}, "every": 8}}


def _trace(arm: str) -> list[TracePoint]:
    points, keep_ratio = [], 1.0
    for step in range(8, 400, 8):
        reset = arm != "dense" and keep_ratio < 0.3
        bound = 0.0 if arm == "dense" else max(0.0, 1 - keep_ratio)
        event = "reset" if reset else None
        points.append(
            TracePoint(
                step=step, loss=0.5, keep_ratio=keep_ratio, phase="compress", event=event, bound=bound, density=0.4
            )
        )
        if arm != "dense":
            keep_ratio = 1.0 if reset else keep_ratio * 0.93
    return points


@pytest.fixture
def make_experiment() -> MakeExperiment:
    """Build an experiment from accuracies: arm -> a dict of keep ratio -> accuracy for each seed."""

    def make(figures: dict[str, list[dict[str, float]]], *, trace: bool = True) -> Experiment:
        return Experiment(
            title="Digits & <friends>",
            command="regimewrap demo --out 'a <b>'",
            settings={"epochs": 3, "lr": 0.05, "widths": [16, 32]},
            versions={"regimewrap": "0.1.0", "torch": "2.14.1"},
            device="CPU, 2 cores",
            arms=[
                Arm(name=arm, about=ABOUT.get(arm, "An arm.") + " Of <ours>.", policy=_policy(arm)) for arm in figures
            ],
            runs=[
                Run(
                    arm=arm,
                    seed=seed,
                    accuracy=accuracy,
                    density={ratio: 0.4 * float(ratio) for ratio in accuracy} if trace else {},
                    milliseconds={ratio: 0.5 + float(ratio) for ratio in accuracy} if trace else {},
                    trace=_trace(arm) if trace else [],
                    cycles=0 if arm == "dense" else 2 + seed,
                    bound_share=0.0 if arm == "dense" else 0.6,
                    train_seconds=1.5,
                )
                for arm, seeds in figures.items()
                for seed, accuracy in enumerate(seeds)
            ],
        )

    return make


@pytest.fixture
def three_arms(make_experiment: MakeExperiment) -> Experiment:
    """Three arms, three seeds: at the full budget all alike, at 0.1 loss-reset is well above dense."""
    return make_experiment(
        {
            "dense": [{"1.0": 0.930 + d, "0.1": 0.880 + d} for d in (-0.004, 0.0, 0.004)],
            "loss-reset": [{"1.0": 0.932 + d, "0.1": 0.910 + d} for d in (-0.004, 0.0, 0.004)],
            "accuracy-relax": [{"1.0": 0.928 + d, "0.1": 0.882 + d} for d in (-0.004, 0.0, 0.004)],
        }
    )
