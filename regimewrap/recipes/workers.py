"""Several runs at once, each in a process of its own with one thread, so that figures don't depend on how many.

Starts processes, hands out runs, passes on what they say, and leaves none behind: not after an error, not after Ctrl-C.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, cast, final

import torch

from regimewrap.errors import RegimewrapError
from regimewrap.recipes.data import load_data
from regimewrap.recipes.training import Status, TrainSettings, train_run
from regimewrap.report.results import Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from multiprocessing.connection import Connection

    from regimewrap.policy.policy import RegimePolicy

_MOST_WORKERS = 4  # each takes some 400 MB
_SECONDS_BETWEEN_STATUS = 0.1


@final
@dataclass(frozen=True)
class Job:
    """One run to make."""

    arm: str
    policy: RegimePolicy
    seed: int


@final
@dataclass(frozen=True)
class Work:
    """What all jobs have in common; the arguments of ``load_data`` and ``train_run``."""

    source: str
    limit: int | None
    settings: TrainSettings


def default_workers() -> int:
    """Return how many runs to make at once: one for each core this process may use, four at most."""
    # sched_getaffinity knows of cores that are reserved for others, but not every system has it.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS)


def train_jobs(jobs: Iterable[Job], work: Work, workers: int) -> Iterator[tuple[Job, Status | Run]]:
    """Train every job, some at once, and yield what they report: a ``Status`` now and then, at the end a ``Run``.

    Call it where ``multiprocessing`` may start processes anew: in a script, below ``if __name__ == "__main__":``.

    Raises:
        RegimewrapError: a run failed, or its process died.
    """
    todo = deque(jobs)
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch may hang
    processes: list[Any] = []
    doing: dict[Connection, Job] = {}
    try:
        for _ in range(min(workers, len(todo))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            doing[ours] = todo.popleft()
            ours.send(doing[ours])
        while doing:
            for pipe in cast("list[Connection]", wait(list(doing))):
                job = doing[pipe]
                message = _receive(pipe, job)
                yield job, message
                if isinstance(message, Run):
                    if todo:
                        doing[pipe] = todo.popleft()
                        pipe.send(doing[pipe])
                    else:
                        del doing[pipe]
                        pipe.close()
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _receive(pipe: Connection, job: Job) -> Status | Run:
    where = f"{job.arm}, seed {job.seed}"
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        raise RegimewrapError(f"{where}: the process that trained it died; is there enough memory?") from None
    if isinstance(message, Status | Run):
        return message
    raise RegimewrapError(f"{where}: {message}")


def _serve(pipe: Connection, work: Work) -> None:
    """Train the jobs that come through the pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    torch.set_num_threads(1)
    told = 0.0

    def tell(status: Status) -> None:
        nonlocal told
        if time.monotonic() - told > _SECONDS_BETWEEN_STATUS:
            told = time.monotonic()
            pipe.send(status)

    try:
        data = load_data(work.source, limit=work.limit)
        while True:
            job = pipe.recv()
            pipe.send(train_run(job.arm, job.policy, data, work.settings, seed=job.seed, on_step=tell).run)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody is there any more
    except RegimewrapError as error:
        pipe.send(str(error))
