"""What a run leaves behind, as values: written by recipes, read by report.

Plain records that go to JSON and back. No training and no drawing here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TracePoint(_Record):
    """The state of a run just after one optimizer update at which the cycler decided.

    ``step`` counts optimizer updates from 1. ``loss`` is the mean training loss since the previous point (nats for
    cross-entropy). ``keep_ratio`` is the ratio the gates were using for the update just made. ``bound`` is the share
    of gated sites, in 0..1, at which the gate zeroed at least one non-zero unit during that update; ``density`` the
    share of units, over all gated sites, that were non-zero after the gate.
    """

    step: int
    loss: float
    keep_ratio: float
    phase: str
    event: str | None
    bound: float
    density: float


class Run(_Record):
    """One training run: one arm, one seed.

    ``accuracy`` maps a keep ratio, written as text (``"1.0"``), to test accuracy in 0..1 after the last epoch.
    ``density`` maps the same keep ratios to the share of units, over all gated sites, that were not zero meanwhile,
    ``milliseconds`` to the time of a forward pass of one sample when the network is served, where that was measured.
    ``bound_share`` is the share of updates, among those looked at, in which the gate bound at one site or more.
    """

    arm: str
    seed: int
    accuracy: dict[str, float]
    density: dict[str, float] = {}
    milliseconds: dict[str, float] = {}
    trace: list[TracePoint]
    cycles: int
    bound_share: float
    train_seconds: float


class Arm(_Record):
    """One way of training: its name, a sentence about it, and its policy as plain data."""

    name: str
    about: str
    policy: dict[str, Any]


class Experiment(_Record):
    """Arms, their runs, and everything needed to repeat them."""

    schema_version: Literal[1] = 1
    title: str
    command: str
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str
    arms: list[Arm]
    runs: list[Run]

    def runs_of(self, arm: str) -> list[Run]:
        """Return the runs of one arm, by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)
