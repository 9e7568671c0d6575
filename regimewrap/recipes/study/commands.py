"""``regimewrap study``: arguments to calls. No work of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from regimewrap.recipes.study.cells import Cell
    from regimewrap.recipes.study.runner import Progress

app = typer.Typer(help="Compare ways of training over seeds and tasks, a cell a file.")

_INTERRUPTED = 130
_DATA_HELP = "Folder of the data files that the study names."


@app.command("run")
def run(
    spec: Annotated[str, typer.Argument(help="A study's YAML file, or one that comes with regimewrap: cifar10-paper.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the cells; by default the study's name.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms, separated by commas.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")] = None,
    data: Annotated[Path | None, typer.Option(help=_DATA_HELP)] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells at once.")] = 1,
    on: Annotated[str, typer.Option(help="local, slurm[:partition=NAME,timeout_min=90] or dask:ADDRESS.")] = "local",
    at_most: Annotated[int | None, typer.Option(min=1, help="Stop after so many cells.")] = None,
) -> int:
    """Make the cells of a study that are missing. Ctrl-C loses the cells in the making, no others."""
    # Imported here, so that the other commands need not wait.
    from regimewrap.recipes.study.cells import open_folder
    from regimewrap.recipes.study.ranks import Together, follow, join, rank_of_torchrun
    from regimewrap.recipes.study.runner import Processes, executor_for, run_study
    from regimewrap.recipes.study.spec import load_study, pick

    asked = load_study(spec)
    wanted_arms, wanted_tasks = pick(asked.arms, arms, "arm"), pick(asked.tasks, tasks, "task")
    folder = Path(asked.name) if out is None else out
    rank = rank_of_torchrun()
    if rank is not None:
        join()
        if rank > 0:
            follow()
            return 0
    study = open_folder(asked, folder)
    if asked.cost:
        typer.echo(f"Cost: {' '.join(asked.cost.split())}")
    executor = executor_for(on, workers, folder) if rank is None else Together()
    try:
        progress = run_study(
            study,
            folder,
            executor,
            arms=wanted_arms,
            tasks=wanted_tasks,
            data=None if data is None else str(data.resolve()),
            at_most=at_most,
            on_cell=_say,
        )
    except KeyboardInterrupt:
        typer.echo("Interrupted. Cells that were finished are kept; run again to go on.", err=True)
        return _INTERRUPTED
    finally:
        if isinstance(executor, Processes | Together):
            executor.stop()
    if progress.elsewhere:
        typer.echo(f"{_cells(len(progress.elsewhere))} in the making by another run; run again when that has ended.")
    if progress.failed:
        typer.echo(f"{_cells(len(progress.failed))} failed; the errors are in {folder / 'failed'}.", err=True)
        return 2
    meanwhile = progress.done - progress.made - len(progress.elsewhere)
    others = f", {meanwhile} by another run" if meanwhile else ""
    made = f"{_cells(progress.made)} made{others}" if progress.done else "All cells are there"
    typer.echo(f"{made}; see regimewrap study report {folder}")
    return 0


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder.")],
) -> None:
    """Compare the arms over the finished cells; write report.md and pictures into the folder."""
    from regimewrap.recipes.study.page import write_study_report

    typer.echo(write_study_report(folder), nl=False)


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="A study's folder.")],
    cells: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of the cells.")] = 0,
    data: Annotated[Path | None, typer.Option(help=_DATA_HELP)] = None,
) -> int:
    """Make a few cells again and say whether they reproduce. Changes nothing."""
    from regimewrap.recipes.study.verify import problems_in, verify_cells

    for problem in problems_in(folder):
        typer.echo(f"left out: {problem}", err=True)
    wrong = 0
    for check in verify_cells(folder, cells, seed, data):
        wrong += not check.alike
        word = "reproduces" if check.alike else "DIFFERS"
        typer.echo(f"{check.file}: {word}: {check.text}")
    return 2 if wrong else 0


def _say(cell: Cell, said: str, progress: Progress) -> None:
    width = len(str(progress.total))
    trial = "trial " if cell.part == "validation" else ""
    what = f"{cell.name}  {cell.arm}  {trial}seed {cell.seed}  {said}"
    typer.echo(f"{progress.done:>{width}}/{progress.total}  {what}  {_time(progress.seconds_left)} left")


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
