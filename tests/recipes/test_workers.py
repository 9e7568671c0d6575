from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from regimewrap.errors import RegimewrapError
from regimewrap.policy.policy import RegimePolicy
from regimewrap.recipes.data import load_data
from regimewrap.recipes.training import TrainSettings, train_run
from regimewrap.recipes.workers import Job, Work, default_workers, train_jobs
from regimewrap.report.results import Run

WORK = Work("digits", 40, TrainSettings(arch="wrn-10-1", epochs=2, batch_size=10, lr=0.05, keep_ratios=(1.0,)))
JOBS = [Job("reset", RegimePolicy.preset("loss-reset", total_steps=8), seed) for seed in range(2)]


def timeless(run: Run) -> Run:
    return run.model_copy(update={"train_seconds": 0.0, "milliseconds": {}})


def test_runs_made_at_once_equal_runs_made_here_one_by_one():
    runs = dict(train_jobs(JOBS, WORK, 2))
    assert all(run.milliseconds["1.0"] > 0 for run in runs.values())
    found = {job.seed: timeless(run) for job, run in runs.items()}

    data = load_data("digits", limit=40)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = {j.seed: timeless(train_run(j.arm, j.policy, data, WORK.settings, seed=j.seed).run) for j in JOBS}
    finally:
        torch.set_num_threads(threads)
    assert found == here
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_what_is_wrong_with_a_run_is_said_with_its_name():
    work = replace(WORK, settings=replace(WORK.settings, lr=1e30))

    with pytest.raises(RegimewrapError, match=r"reset, seed 0: the training loss became"):
        list(train_jobs(JOBS, work, 1))
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_is_an_error_and_not_a_wait():
    work = replace(WORK, settings=replace(WORK.settings, epochs=10_000))
    jobs = [Job("long", RegimePolicy.preset("dense"), seed) for seed in range(2)]

    def kill() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.05)
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RegimewrapError, match="a process that trained died"):
        list(train_jobs(jobs, work, 2))
    killer.join()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_who_stops_listening_ends_the_runs():
    jobs = [Job("long", JOBS[0].policy, seed=0), Job("short", JOBS[0].policy, seed=1)]
    reports = train_jobs(jobs, WORK, 2)
    next(reports)

    reports.close()

    assert multiprocessing.active_children() == []


def test_no_more_runs_are_made_at_once_than_cores_or_four():
    assert 1 <= default_workers() <= min(4, os.cpu_count())
