"""The examples that are made for several processes run on two of them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_ddp_is_killed_and_goes_on_from_its_file(tmp_path: Path):
    straight = processes.run(EXAMPLES / "ddp.py", tmp_path / "straight.pt", ranks=2)[0]

    with processes.Job(EXAMPLES / "ddp.py", tmp_path / "killed.pt", ranks=2) as job:
        job.wait_for_lines(3)
        job.kill()
    rest = processes.run(EXAMPLES / "ddp.py", tmp_path / "killed.pt", ranks=2)[0]

    assert rest
    assert straight.endswith(rest)
    weights = [torch.load(tmp_path / f"{name}.pt", weights_only=True)[0] for name in ("straight", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_fsdp2_runs_on_two_ranks():
    said = processes.run(EXAMPLES / "fsdp2.py", ranks=2)

    assert said[0].count("keep ratio") == 4
    assert said[1] == ""


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate_launch_runs_its_example():
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    more = ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]

    said = processes.under([*launcher, *more], EXAMPLES / "accelerate_loop.py")

    assert said.count("keep ratio") == 5
