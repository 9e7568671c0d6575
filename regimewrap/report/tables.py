"""The accuracy table, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regimewrap.errors import MissingExtraError
from regimewrap.report.summary import accuracy, bound_share, budget, keep_ratios, percent, percent_spread, seed_count

if TYPE_CHECKING:
    from rich.table import Table

    from regimewrap.report.results import Experiment


def console_table(experiment: Experiment) -> Table:
    """Return a table of test accuracy, in percent, mean ± standard deviation over seeds: a row an arm.

    Raises:
        MissingExtraError: rich is not installed.
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise MissingExtraError("rich", "cli") from error
    ratios = keep_ratios(experiment)
    table = Table(title=accuracy_caption(experiment), title_justify="left")
    table.add_column("arm", no_wrap=True)
    for ratio in ratios:
        table.add_column(budget(ratio), justify="right")
    table.add_column("gate bound", justify="right")
    table.add_column("cycles", justify="right")
    for arm in experiment.arms:
        figures = [percent_spread(accuracy(experiment, arm.name, ratio)) for ratio in ratios]
        table.add_row(arm.name, *figures, percent(bound_share(experiment, arm.name).mean), cycles(experiment, arm.name))
    return table


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
