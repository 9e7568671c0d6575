"""The main job: one small network on digits, trained dense and with two cycling policies, over several seeds.

The settings are chosen so that the budget moves within a run of seconds, not so that an arm wins. Network, data and
optimizer are those of a trial in which dense training does well; the policies are presets rescaled to the run's length.
One number departs from a preset: the floor of ``accuracy-relax`` is 0.02 instead of 0.2, because 200 digits are learned
by heart at 0.2, so that the accuracy would never fall and the budget never come back.
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
    settings=TrainSettings(arch="wrn-10-1", epochs=100, batch_size=25, lr=0.05),
)
_RELAX_FLOOR = 0.02
_HOW_CHOSEN = (
    "so that the budget moves in a short run, not so that an arm wins: presets rescaled to the number of updates, and"
    f" accuracy-relax's floor lowered to {_RELAX_FLOOR}, without which these few digits never make it give budget back"
)


def demo_arms(total_steps: int) -> dict[str, tuple[str, RegimePolicy]]:
    """Return, for each arm's name, a sentence about it and its policy, for runs of so many optimizer updates."""
    relax = RegimePolicy.preset("accuracy-relax", total_steps)
    lower = relax.cycle.strategy.replace(floor=_RELAX_FLOOR)
    return {
        "dense": (
            "The full budget throughout: training as if there were no gate.",
            # Its decisions change nothing; at the others' interval its trace is as fine as theirs.
            RegimePolicy.preset("dense", total_steps),
        ),
        "loss-reset": (
            "Compress step by step; when the training loss falls behind its best, back to the full budget.",
            RegimePolicy.preset("loss-reset", total_steps),
        ),
        "accuracy-relax": (
            "Compress step by step; when the training accuracy falls behind its best, give part of the budget back.",
            relax.replace(cycle=relax.cycle.replace(strategy=lower)),
        ),
    }


def demo_jobs(work: Work, images: int, seeds: Sequence[int]) -> list[Job]:
    """Return the demo's runs, all arms of a seed before the next seed, so that a part of them can be compared too."""
    arms = demo_arms(work.settings.total_steps(images))
    return [Job(name, policy, seed) for seed in seeds for name, (_, policy) in arms.items()]


def demo_experiment(runs: Sequence[Run], work: Work, data: ImageData, command: str, *, interrupted: bool) -> Experiment:
    """Return the record of the demo's finished runs."""
    arms = demo_arms(work.settings.total_steps(len(data.train)))
    settings = {"data": data.about, **work.settings.as_record(), "settings_chosen": _HOW_CHOSEN}
    if interrupted:
        settings["interrupted"] = "only the runs that had ended are shown"
    return Experiment(
        title="One small network on digits, trained three ways",
        command=command,
        settings=settings,
        versions=versions(),
        device=device_text(torch.device("cpu")),
        arms=[
            Arm(name=name, about=about, policy=policy.model_dump(mode="json")) for name, (about, policy) in arms.items()
        ],
        runs=sorted(runs, key=lambda run: (list(arms).index(run.arm), run.seed)),
    )
