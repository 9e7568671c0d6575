"""The main job: one small network on digits, trained with the default policy and beside it a dense twin, over seeds.

Network, data and optimizer are those of a trial in which dense training does well. The default policy has no number
that was chosen for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from regimewrap.policy.policy import RegimePolicy
from regimewrap.recipes.records import device_text, versions
from regimewrap.recipes.training import TrainSettings
from regimewrap.recipes.workers import Job, Work
from regimewrap.report.results import Arm, Experiment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regimewrap.recipes.data import ImageData
    from regimewrap.report.results import Run

DEMO_WORK = Work(
    source="digits",
    limit=200,
    settings=TrainSettings(arch="wrn-10-1", epochs=100, batch_size=25, lr=0.05, keep_ratios=(1.0, 0.2, 0.1, 0.05)),
)
_HOW_CHOSEN = "so that dense training does well; the default policy has no number that was chosen for this data"


def demo_arms() -> dict[str, tuple[str, RegimePolicy]]:
    """Return, for each arm's name, a sentence about it and its policy."""
    return {
        "dense": (
            "The full budget throughout: training as if there were no gate.",
            RegimePolicy.preset("dense"),
        ),
        "mixed": (
            "The default: half of each batch at a ratio from 0.05 to 1, in two updates of four; else the full budget.",
            RegimePolicy.preset("mixed"),
        ),
    }


def demo_jobs(seeds: Sequence[int]) -> list[Job]:
    """Return the demo's runs, all arms of a seed before the next seed, so that a part of them can be compared too."""
    arms = demo_arms()
    return [Job(name, policy, seed) for seed in seeds for name, (_, policy) in arms.items()]


def demo_experiment(runs: Sequence[Run], work: Work, data: ImageData, command: str, *, interrupted: bool) -> Experiment:
    """Return the record of the demo's finished runs."""
    arms = demo_arms()
    settings = {"data": data.about, **work.settings.as_record(), "settings_chosen": _HOW_CHOSEN}
    if interrupted:
        settings["interrupted"] = "only the runs that had ended are shown"
    return Experiment(
        title="One network on digits for many budgets, beside its dense twin",
        command=command,
        settings=settings,
        versions=versions(),
        device=device_text(torch.device("cpu")),
        arms=[
            Arm(name=name, about=about, policy=policy.model_dump(mode="json")) for name, (about, policy) in arms.items()
        ],
        runs=sorted(runs, key=lambda run: (list(arms).index(run.arm), run.seed)),
    )
