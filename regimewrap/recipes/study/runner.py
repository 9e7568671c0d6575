"""Which cells are missing, and who makes them: any object with ``submit(function, ...)`` whose answer has ``done``.

That is what ``concurrent.futures.Executor`` offers, and with it processes here, submitit's executors for Slurm, and
dask's for its clusters. Workers write the cells; the folder must be one that they all see.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

from regimewrap.errors import DataError, MissingExtraError, RegimewrapError
from regimewrap.recipes.study.cells import choice, final_cell, keep_failure, make_file, read_cells, trial_cells
from regimewrap.recipes.study.spec import pick

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from multiprocessing.connection import Connection

    from regimewrap.recipes.study.cells import Cell
    from regimewrap.recipes.study.spec import Study

_POLL_SECONDS = 0.1


class Submits(Protocol):
    """What makes cells."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Begin ``function(*arguments)`` elsewhere; the answer has ``done()`` and ``result()``."""


@final
@dataclass
class Progress:
    """How far a run is: cells that are ``done`` with, of how many.

    They were ``made`` here, ``failed``, are being made ``elsewhere``, or were made there meanwhile.
    """

    total: int
    done: int = 0
    made: int = 0
    failed: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Time left at the pace so far."""
        return (time.monotonic() - self.began) / max(1, self.done) * (self.total - self.done)


def run_study(
    study: Study,
    folder: Path,
    executor: Submits,
    *,
    arms: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    data: str | None = None,
    at_most: int | None = None,
    on_cell: Callable[[Cell, str, Progress], None] = lambda _cell, _said, _progress: None,
) -> Progress:
    """Make the cells that are missing: first trials, then final runs, all arms of a seed before the next seed.

    Args:
        study: from ``open_folder``.
        folder: where cells are.
        executor: who makes them.
        arms: only these.
        tasks: only these.
        data: folder of the data files that tasks name, as the workers see it.
        at_most: stop after so many cells.
        on_cell: called after each cell with it and what became of it; see ``make_file``.

    Returns:
        What was done.

    Raises:
        DataError: files in the folder are not whole cells; or the data or the folder cannot be used.
        PolicyError: the study has no such arm or task.
    """
    folder = Path(folder)
    arms = study.arms if arms is None else pick(study.arms, ",".join(arms), "arm")
    tasks = tuple(study.tasks) if tasks is None else pick(study.tasks, ",".join(tasks), "task")
    trials = [cell for task in tasks for arm in arms for cells in trial_cells(study, task, arm) for cell in cells]
    there = _checked(folder)
    progress = Progress(_count(study, arms, tasks, trials, there, at_most))
    _make(trials, there, folder, executor, data, progress, on_cell)
    there = _checked(folder) if trials else there
    _make(finals(study, arms, tasks, there), there, folder, executor, data, progress, on_cell)
    progress.elsewhere = [name for name in progress.elsewhere if not (folder / "cells" / name).exists()]
    return progress


def finals(study: Study, arms: Iterable[str], tasks: Iterable[str], there: dict[str, Any]) -> list[Cell]:
    """Return the cells of the final runs, all arms of a seed before the next; not those whose trials are missing."""
    chosen = {}
    figures = {name: record["figures"] for name, record in there.items()}
    for task in tasks:
        for arm in arms:
            found = choice(study, task, arm, figures)
            if found is not None:
                chosen[task, arm] = found
    return [
        final_cell(study, task, arm, seed, lr, knob)
        for seed in range(study.seeds)
        for (task, arm), (lr, knob) in chosen.items()
    ]


def _count(
    study: Study, arms: Sequence[str], tasks: Sequence[str], trials: list[Cell], there: Any, at_most: int | None
) -> int:
    missing = sum(cell.file not in there for cell in trials)
    known = finals(study, arms, tasks, there)
    unknown = len(arms) * len(tasks) * study.seeds - len(known)
    total = missing + unknown + sum(cell.file not in there for cell in known)
    return total if at_most is None else min(total, at_most)


def _checked(folder: Path) -> dict[str, Any]:
    records, problems = read_cells(folder)
    if problems:
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        lines = "\n".join(problems[:5])
        raise DataError(f"{lines}{more}\nMove these files away or delete them; run again, and the cells are made anew.")
    return records


def _make(
    cells: list[Cell],
    there: dict[str, Any],
    folder: Path,
    executor: Submits,
    data: str | None,
    progress: Progress,
    on_cell: Callable[[Cell, str, Progress], None],
) -> None:
    todo = [cell for cell in cells if cell.file not in there][: progress.total - progress.done]
    waiting = {cell.file: (executor.submit(make_file, cell, str(folder), data), cell) for cell in todo}
    while waiting:
        ended = [name for name, (future, _) in waiting.items() if future.done()]
        for name in ended:
            future, cell = waiting.pop(name)
            said = _answer(future, cell, str(folder))
            progress.done += 1
            progress.made += said == "made"
            if said == "elsewhere":
                progress.elsewhere.append(cell.file)
            if said.startswith("failed"):
                progress.failed.append(cell.file)
            on_cell(cell, said, progress)
        if not ended:
            time.sleep(_POLL_SECONDS)


def _answer(future: Any, cell: Cell, folder: str) -> str:
    try:
        return str(future.result())
    except (DataError, MissingExtraError):
        raise  # the next cell would fail likewise
    except Exception as error:  # noqa: BLE001 - a worker that died, in the words of whoever ran it
        return keep_failure(cell, folder, error)


@final
class Processes(ThreadPoolExecutor):
    """An executor that gives each call a process of its own, forked from one that has loaded torch but not used it.

    A process that dies fails its own call alone. ``stop`` ends all of them.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        methods = multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload(["regimewrap.recipes.study.warm"])
        self._running: set[Any] = set()
        self._stopped = threading.Event()

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:  # type: ignore[override]
        """Run ``function(*arguments)`` in a new process as soon as one of the workers is free."""
        return super().submit(self._run, function, arguments)

    def stop(self) -> None:
        """End all processes now, and begin no more."""
        self._stopped.set()
        self.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.terminate()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_call, args=(theirs, function, arguments))
        if self._stopped.is_set():
            raise RegimewrapError("the run was stopped")
        process.start()
        self._running.add(process)
        if self._stopped.is_set():  # while it was starting
            process.terminate()
        theirs.close()
        try:
            ok, answer = ours.recv()
        except EOFError:
            process.join()
            how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit status {process.exitcode}"
            raise RegimewrapError(f"the process that made this cell died ({how}); is there enough memory?") from None
        finally:
            process.join()
            self._running.discard(process)
            ours.close()
        if not ok:
            raise answer
        return answer


def _call(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    try:
        answer = True, function(*arguments)
    except BaseException as error:  # noqa: BLE001 - the first process raises it
        answer = False, error
    with contextlib.suppress(BrokenPipeError):  # the first process is gone; the cell is written
        pipe.send(answer)


def executor_for(where: str, workers: int, folder: Path) -> Submits:
    """Return who makes cells: ``local``, ``slurm`` or ``slurm:partition=gpu,timeout_min=90``, or ``dask:ADDRESS``.

    Raises:
        MissingExtraError: submitit or distributed is missing.
        DataError: it is something else.
    """
    kind, _, rest = where.partition(":")
    if kind == "local" and not rest:
        return Processes(workers)
    if kind == "slurm":
        return _slurm(rest, workers, folder)
    if kind == "dask" and rest:
        try:
            from distributed import Client
        except ImportError:
            raise MissingExtraError("distributed", "study") from None
        client: Any = Client
        try:
            executor: Submits = client(rest).get_executor()
        except (OSError, ValueError) as error:
            raise DataError(f"no dask scheduler can be used at {rest}: {' '.join(str(error).split())}") from None
        return executor
    raise DataError(
        f"--on must be local, slurm, slurm:partition=NAME,timeout_min=90 or dask:tcp://HOST:8786; got {where!r}."
    )


def _slurm(options: str, workers: int, folder: Path) -> Submits:
    try:
        import submitit
    except ImportError:
        raise MissingExtraError("submitit", "study") from None
    executor = submitit.AutoExecutor(folder=os.fspath(folder / "slurm"))
    pairs = [pair.partition("=") for pair in options.split(",") if pair]
    named = {f"slurm_{name}" if name == "partition" else name: value for name, _, value in pairs}
    numbers = {name: int(value) if value.isdigit() else value for name, value in named.items()}
    try:
        if not all(named.values()):
            raise ValueError("each option has a value, as in partition=gpu")
        executor.update_parameters(**{"cpus_per_task": 1, "slurm_array_parallelism": workers, **numbers})
    except (AssertionError, NameError, TypeError, ValueError) as error:  # all of these come from submitit
        said = " ".join(str(error).split())
        raise DataError(f"--on slurm: {options!r} cannot be used: {said} (submitit's own options).") from None
    submits: Submits = executor
    return submits
