"""The accuracy table, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regimewrap.files import Table
from regimewrap.report.summary import accuracy, bound_share, budget, keep_ratios, percent, percent_spread, seed_count

if TYPE_CHECKING:
    from regimewrap.report.results import Experiment


def console_table(experiment: Experiment, width: int | None = None) -> str:
    """Return a table of test accuracy, in percent, mean ± standard deviation over seeds: a row an arm.

    Where ``width``, columns of the terminal, is too small for that, an arm is a block of lines.
    """
    ratios = keep_ratios(experiment)
    rows = [["arm", *map(budget, ratios), "gate bound", "cycles"]]
    for arm in experiment.arms:
        figures = [percent_spread(accuracy(experiment, arm.name, ratio)) for ratio in ratios]
        bound = percent(bound_share(experiment, arm.name).mean)
        rows.append([arm.name, *figures, bound, cycles(experiment, arm.name)])
    return Table(rows, accuracy_caption(experiment)).text(width)


def accuracy_caption(experiment: Experiment) -> str:
    """Say what the table's figures are."""
    seeds = seed_count(experiment)
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return f"Test accuracy in %, after the last epoch, {over}"


def cycles(experiment: Experiment, arm: str) -> str:
    """Write how many compress-and-recover cycles the runs of an arm completed: a count or a range."""
    counts = [run.cycles for run in experiment.runs_of(arm)]
    if not counts:
        return "–"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
