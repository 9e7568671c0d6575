"""Cells to figures: what each arm does at each budget, and how it compares with dense, seed by seed. Draws nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, final

from regimewrap.recipes.study.arms import POSTHOC
from regimewrap.recipes.study.cells import trial_cells
from regimewrap.recipes.study.runner import finals
from regimewrap.recipes.study.spec import Characters, Images
from regimewrap.report.statistics import EQUIVALENT, Difference, compared
from regimewrap.report.summary import Spread, spread

if TYPE_CHECKING:
    from regimewrap.recipes.study.cells import Cell
    from regimewrap.recipes.study.spec import Study

#: Nats a character that are as good as no difference, where text is the task.
EQUIVALENT_NATS = 0.005

_WITHIN = 0.01  # of dense at full budget

#: Figures of a run at each budget, and whether larger is better.
OUTCOMES = {"accuracy": True, "nll": False, "ece": False}


@final
@dataclass(frozen=True)
class TaskFigures:
    """All finished runs of one task: arm to seed to a cell's figures, and each arm's learning rate and own number."""

    name: str
    outcome: str
    equivalent: float
    budgets: tuple[str, ...]
    runs: dict[str, dict[int, dict[str, Any]]]
    chosen: dict[str, str]

    @property
    def arms(self) -> list[str]:
        """Arms with a finished run, dense first."""
        return list(self.runs)

    def by_seed(self, arm: str, budget: str, outcome: str | None = None) -> dict[int, float]:
        """Return an arm's figures by seed; of runs that have none at this budget, none."""
        outcome = outcome or self.outcome
        found = {seed: run.get(outcome, {}).get(budget) for seed, run in self.runs.get(arm, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def spread(self, arm: str, budget: str, outcome: str | None = None) -> Spread:
        """Return an arm's figures at a budget, over seeds."""
        return spread(list(self.by_seed(arm, budget, outcome).values()))

    def corrupted(self, arm: str, budget: str) -> float | None:
        """Return an arm's accuracy on corrupted samples, the mean over kinds and seeds."""
        runs = [run["corrupted"] for run in self.runs.get(arm, {}).values() if "corrupted" in run]
        values = [kind[budget] for run in runs for kind in run.values() if budget in kind]
        return fmean(values) if values else None

    def compared(self, budget: str, outcome: str | None = None) -> dict[str, Difference]:
        """Compare every other arm with dense at a budget; positive is better than dense."""
        sign = 1.0 if OUTCOMES[outcome or self.outcome] else -1.0

        def signed(arm: str) -> dict[int, float]:
            return {seed: sign * value for seed, value in self.by_seed(arm, budget, outcome).items()}

        return compared({arm: signed(arm) for arm in self.arms if arm != "dense"}, signed("dense"))

    def lowest_budget(self, arm: str) -> str | None:
        """Return the lowest budget down to which an arm's mean stays within 1 % of dense at full budget."""
        full = self.spread("dense", self.budgets[0]).mean
        lowest = None
        for budget in self.budgets:
            mean = self.spread(arm, budget).mean
            if full is None or mean is None:
                return lowest
            better = OUTCOMES[self.outcome]
            if mean < full * (1 - _WITHIN) if better else mean > full * (1 + _WITHIN):
                return lowest
            lowest = budget
        return lowest

    def worst(self, arm: str) -> float | None:
        """Return the figure of an arm's worst seed at full budget; not a number if one run broke."""
        values = list(self.by_seed(arm, self.budgets[0]).values())
        if not values:
            return None
        if not all(map(math.isfinite, values)):
            return math.nan
        return min(values) if OUTCOMES[self.outcome] else max(values)

    def mean_of(self, arm: str, name: str) -> float | None:
        """Return the mean over seeds of one of a cell's single numbers, such as ``bound``."""
        values = [run[name] for run in self.runs.get(arm, {}).values() if isinstance(run.get(name), int | float)]
        return fmean(values) if values else None


@final
@dataclass(frozen=True)
class Count:
    """Final cells that are there, of how many that the study has, and whole cells that are not of it as it is now."""

    done: int
    total: int
    trials: int
    others: int


def figures(study: Study, records: dict[str, dict[str, Any]]) -> tuple[list[TaskFigures], Count]:
    """Return the figures of each task, from a folder's whole cells, and how complete they are.

    Cells that the study does not name, such as those of a learning rate that trials no longer choose, do not count.
    """
    cells = finals(study, study.arms, study.tasks, records)
    done = [cell for cell in cells if cell.file in records]
    trials = sum(record["cell"]["part"] == "validation" for record in records.values())
    tasks = []
    for name, task in study.tasks.items():
        runs: dict[str, dict[int, dict[str, Any]]] = {}
        chosen: dict[str, str] = {}
        for cell in (each for each in done if each.name == name):
            found = records[cell.file]
            chosen.setdefault(cell.arm, _chosen(study, cell))
            runs.setdefault(cell.arm, {})[cell.seed] = found["figures"] | {"seconds": found["made"]["seconds"]}
        text = isinstance(task, Characters)
        batchnorm = isinstance(task, Images) and task.norm == "batch"
        post_hoc = {seed: run["post-hoc"] for seed, run in runs.get("dense", {}).items() if "post-hoc" in run}
        ordered = {arm: runs[arm] for arm in ("dense", *study.arms) if arm in runs}
        if post_hoc and not batchnorm:  # older cells have thresholds from statistics of another budget
            ordered[POSTHOC] = post_hoc
        budgets = tuple(f"{budget:g}" for budget in study.budgets)
        equivalent = EQUIVALENT_NATS if text else EQUIVALENT
        tasks.append(TaskFigures(name, "nll" if text else "accuracy", equivalent, budgets, ordered, chosen))
    total = len(study.arms) * len(study.tasks) * study.seeds
    return tasks, Count(len(done), total, trials, len(records) - len(done) - trials)


def _chosen(study: Study, cell: Cell) -> str:
    """Return a cell's learning rate and own number, with a star at what is the least or the largest that was tried."""
    tried = [cells[0] for cells in trial_cells(study, cell.name, cell.arm)]
    shown = []
    for value, others in ((cell.lr, [each.lr for each in tried]), (cell.knob, [each.knob for each in tried])):
        if value is not None:
            numbers = [other for other in others if other is not None]
            edge = "*" if numbers and value in (min(numbers), max(numbers)) else ""
            shown.append(f"{value:g}{edge}")
    return ", ".join(shown)
