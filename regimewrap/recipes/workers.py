"""Several runs at once, each in a process with one thread, so that figures don't depend on how many there are.

Starts processes, hands out runs and returns their records; after an error or Ctrl-C no process of its own is left.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from regimewrap import serve
from regimewrap.errors import RegimewrapError, ServeError
from regimewrap.recipes.data import load_data
from regimewrap.recipes.training import TrainSettings, train_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from regimewrap.policy.policy import RegimePolicy
    from regimewrap.recipes.training import Trained
    from regimewrap.report.results import Run

_MOST_WORKERS = 4  # each takes some 400 MB


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


def train_jobs(jobs: Iterable[Job], work: Work, workers: int) -> Iterator[tuple[Job, Run]]:
    """Train every job, ``workers`` at once, and yield each with its record as soon as it has ended.

    Call it where ``multiprocessing`` may start processes anew: in a script, below ``if __name__ == "__main__":``.

    Raises:
        RegimewrapError: a run failed, or its process died; the message names a run.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch may hang
    pool = ProcessPoolExecutor(workers, context, initializer=_begin)
    try:  # Ctrl-C may come while processes start, too
        doing = {pool.submit(_train, job, work): job for job in jobs}
        for future in as_completed(doing):
            job = doing[future]
            try:
                yield job, future.result()
            except BrokenProcessPool:
                raise RegimewrapError(
                    f"{job.arm}, seed {job.seed}: a process that trained died; is there enough memory?"
                ) from None
            except RegimewrapError as error:
                raise RegimewrapError(f"{job.arm}, seed {job.seed}: {error}") from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # else leaving would wait for the runs that are under way
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    torch.set_num_threads(1)


def _train(job: Job, work: Work) -> Run:
    data = load_data(work.source, limit=work.limit)
    trained = train_run(job.arm, job.policy, data, work.settings, seed=job.seed)
    sample, _ = next(data.test.batches(1))
    return trained.run.model_copy(update={"milliseconds": _milliseconds(trained, sample)})


def _milliseconds(trained: Trained, sample: Tensor) -> dict[str, float]:
    """Return how long one sample takes at each keep ratio that the run was evaluated at, with the network served."""
    found: dict[str, float] = {}
    with warnings.catch_warnings(), contextlib.suppress(ServeError), torch.no_grad():
        warnings.simplefilter("ignore")  # that nothing is faster here: the figures say so
        for ratio in trained.run.accuracy:
            with serve(trained.model.eval(), float(ratio), example_inputs=sample) as served:
                found[ratio] = served.served_ms
    return found
