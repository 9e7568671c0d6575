"""Mean, spread and comparison of arms over seeds: the only place where figures are made from records.

Everything shown, as text, table or plot, comes from here, so that no two of them can disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from regimewrap.report.statistics import compared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regimewrap.report.results import Arm, Experiment
    from regimewrap.report.statistics import Difference


@dataclass(frozen=True)
class Spread:
    """Figures of one arm at one keep ratio.

    ``values`` are the finite ones, by seed; ``lost`` counts runs whose figure was not finite.
    """

    values: tuple[float, ...]
    lost: int = 0

    @property
    def mean(self) -> float | None:
        """Mean over seeds; None without any finite value."""
        return fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None below two values."""
        return stdev(self.values) if len(self.values) > 1 else None


def spread(values: Sequence[float]) -> Spread:
    """Split ``values`` into the finite ones and a count of the others."""
    finite = tuple(value for value in values if math.isfinite(value))
    return Spread(finite, len(values) - len(finite))


def keep_ratios(experiment: Experiment) -> list[str]:
    """Return the keep ratios that any run was evaluated at, as the records write them, largest first."""
    return sorted({ratio for run in experiment.runs for ratio in run.accuracy}, key=float, reverse=True)


def accuracy(experiment: Experiment, arm: str, keep_ratio: str) -> Spread:
    """Return test accuracy, 0..1, of an arm's runs at a keep ratio. Runs not evaluated there do not count."""
    return spread([run.accuracy[keep_ratio] for run in experiment.runs_of(arm) if keep_ratio in run.accuracy])


def density(experiment: Experiment, arm: str, keep_ratio: str) -> Spread:
    """Return the share of units, 0..1, that were not zero when an arm's runs were evaluated at a keep ratio."""
    return spread([run.density[keep_ratio] for run in experiment.runs_of(arm) if keep_ratio in run.density])


def milliseconds(experiment: Experiment, arm: str, keep_ratio: str) -> Spread:
    """Return the milliseconds in which an arm's runs, served at a keep ratio, took one sample."""
    return spread([run.milliseconds[keep_ratio] for run in experiment.runs_of(arm) if keep_ratio in run.milliseconds])


def bound_share(experiment: Experiment, arm: str) -> Spread:
    """Return the share of updates, 0..1, in which the gate zeroed something."""
    return spread([run.bound_share for run in experiment.runs_of(arm)])


def seed_count(experiment: Experiment) -> int:
    """Return the number of seeds of the arm that has fewest finished runs, arms without any left out."""
    counts = [len(experiment.runs_of(arm.name)) for arm in experiment.arms]
    return min((count for count in counts if count), default=0)


def reference_arm(experiment: Experiment) -> Arm | None:
    """Return the arm that others are compared with: the one whose strategy is ``dense``, or is called that."""
    for arm in experiment.arms:
        cycle = arm.policy.get("cycle")
        strategy = cycle.get("strategy") if isinstance(cycle, dict) else None
        if arm.name == "dense" or (isinstance(strategy, dict) and strategy.get("kind") == "dense"):
            return arm
    return None


def compare(experiment: Experiment, reference: Arm, keep_ratio: str) -> dict[str, Difference]:
    """Compare each other arm with ``reference`` at a keep ratio, paired by seed; see ``statistics.TIE_RULE``.

    Raises:
        MissingExtraError: scipy is missing.
    """

    def by_seed(arm: Arm) -> dict[int, float]:
        return {
            run.seed: run.accuracy[keep_ratio] for run in experiment.runs_of(arm.name) if keep_ratio in run.accuracy
        }

    others = {arm.name: by_seed(arm) for arm in experiment.arms if arm is not reference}
    return compared(others, by_seed(reference))


def percent(value: float | None) -> str:
    """Write an accuracy or share as percent, to a tenth; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_spread(figures: Spread) -> str:
    """Write mean and standard deviation in percent, and how many runs gave no number."""
    return written(figures, 100.0, 1)


def written(figures: Spread, times: float, digits: int) -> str:
    """Write mean and standard deviation, ``times`` as large as they are, and how many runs gave no number."""
    lost = f" ({figures.lost} without a number)" if figures.lost else ""
    if figures.mean is None:
        return f"–{lost}"
    around = "" if figures.deviation is None else f" ± {times * figures.deviation:.{digits}f}"
    return f"{times * figures.mean:.{digits}f}{around}{lost}"


def budget(keep_ratio: str) -> str:
    """Name a keep ratio in words: ``full budget`` or ``keep ratio 0.2``."""
    return "full budget" if float(keep_ratio) == 1.0 else f"keep ratio {float(keep_ratio):g}"
