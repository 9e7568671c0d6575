"""The seam: whatever has ``submit`` makes cells. Each executor in its local mode."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from regimewrap.errors import DataError, MissingExtraError
from regimewrap.recipes.study.cells import open_folder, read_cells
from regimewrap.recipes.study.runner import executor_for, run_study

from .conftest import TINY

DENSE = {**TINY, "arms": ["dense"], "tasks": {"digits": TINY["tasks"]["digits"]}}


@pytest.fixture
def dense(digits):
    return digits.replace(arms=("dense",))


def _done(folder) -> int:
    return len(read_cells(folder)[0])


@pytest.mark.parametrize("cluster", ["debug", pytest.param("local", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_submitit_makes_cells(dense, tmp_path, cluster):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    executor = submitit.AutoExecutor(folder=tmp_path / "slurm", cluster=cluster)
    progress = run_study(open_folder(dense, tmp_path), tmp_path, executor)
    assert (progress.done, progress.failed, _done(tmp_path)) == (2, [], 2)


@pytest.mark.filterwarnings("ignore")
def test_dask_makes_cells(dense, tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        progress = run_study(open_folder(dense, tmp_path), tmp_path, client.get_executor())
    assert (progress.done, progress.failed, _done(tmp_path)) == (2, [], 2)


def test_where_cells_are_made_is_one_of_three(tmp_path):
    with pytest.raises(DataError, match="--on must be local, slurm"):
        executor_for("slrum", 1, tmp_path)
    with pytest.raises(DataError, match="--on must be"):
        executor_for("dask", 1, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [("foo=1", "foo"), ("partition", "each option has a value"), ("timeout_min=soon", "timeout_min")],
)
def test_an_option_that_submitit_does_not_know_is_named(tmp_path, options, said):
    pytest.importorskip("submitit", reason="submitit is not installed")
    with pytest.raises(DataError, match=f"--on slurm: .*{said}"):
        executor_for(f"slurm:{options}", 1, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_does_not_answer_is_named(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")

    def refuses(_address):
        raise TimeoutError("Timed out trying to connect")  # what the client raises after 30 seconds

    monkeypatch.setattr(distributed, "Client", refuses)
    with pytest.raises(DataError, match=r"no dask scheduler can be used at tcp://127.0.0.1:1: Timed out"):
        executor_for("dask:tcp://127.0.0.1:1", 1, tmp_path)


@pytest.mark.parametrize(("where", "package"), [("slurm", "submitit"), ("dask:tcp://host:1", "distributed")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, where, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*study"):
        executor_for(where, 1, tmp_path)


def _command(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "regimewrap", "study", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_the_command_line_runs_reports_and_verifies(tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(DENSE))
    out = tmp_path / "out"
    first = _command("run", tmp_path / "spec.yaml", "--out", out, "--at-most", 1)
    assert first.returncode == 0, first.stderr
    assert "1/1  digits  dense  seed 0  made" in first.stdout
    second = _command("run", tmp_path / "spec.yaml", "--out", out)
    assert "1/1  digits  dense  seed 1  made" in second.stdout
    assert "2 of 2 final cells" in _command("report", out).stdout
    verified = _command("verify", out, "--cells", 2)
    assert verified.returncode == 0
    assert verified.stdout.count("reproduces: equal to the last bit") == 2
    unknown = _command("run", tmp_path / "spec.yaml", "--out", out, "--arms", "dens")
    assert unknown.returncode == 2
    assert unknown.stderr == "Error: the study has no arm called 'dens'. Did you mean 'dense'? It has dense.\n"


@pytest.mark.slow
def test_ranks_of_torchrun_train_a_cell_together(tmp_path):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**DENSE, "arms": ["dense", "fixed-0.1"], "seeds": 1}))
    done = _command("run", tmp_path / "spec.yaml", "--out", tmp_path / "out", ranks=2)
    assert done.returncode == 0, done.stderr
    assert _done(tmp_path / "out") == 2


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_loses_no_finished_cell(tmp_path):
    endless = {**TINY["tasks"]["digits"], "training": {"steps": 10**6, "batch_size": 10, "lr": 0.05}}
    spec = {**DENSE, "tasks": {"digits": TINY["tasks"]["digits"], "endless": endless}, "seeds": 1}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    command = [
        sys.executable,
        "-m",
        "regimewrap",
        "study",
        "run",
        str(tmp_path / "spec.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert "digits  dense  seed 0  made" in run.stdout.readline()
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130
    deadline = time.monotonic() + 60  # the process that others are forked from ends by itself, a little later
    while _lives(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _lives(run.pid)
    assert _done(tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name == "failed"] == []
