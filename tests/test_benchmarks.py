"""``tests/benchmarks/run_all.py``: a process a benchmark, one table of figures beside their targets."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regimewrap.errors import DataError

SCRIPT = Path(__file__).parent / "benchmarks" / "run_all.py"
FIGURES = """
from paired import arguments, show
options = arguments(None, slower=1.0)
row = {"size": 3, "speed": 4.5, "wrapped/dense": 1.054 * options.slower}
show([row], options, by=("size",), targets={"speed": ">= 4", "wrapped/dense": "<= 1.05"})
"""


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The runner, over a folder of made-up benchmarks beside the real ``paired.py``."""
    spec = importlib.util.spec_from_file_location("benchmarks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "paired.py").write_text(SCRIPT.with_name("paired.py").read_text())
    (folder / "figures.py").write_text(FIGURES)
    (folder / "broken.py").write_text("print('begins', flush=True)\nraise ValueError('no such machine')\n")
    monkeypatch.setattr(module, "HERE", folder)
    return module


def test_a_crash_is_reported_the_others_go_on_and_the_status_says_so(bench, tmp_path, capfd):
    assert bench.run_all(out=tmp_path / "out") == 3

    shown = capfd.readouterr().out
    assert "broken     " in shown
    assert "crashed, exit status 1: ValueError: no such machine" in shown
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [each["name"] for each in record["benchmarks"]] == ["broken", "figures"]
    assert "error" in record["benchmarks"][0]


@pytest.mark.slow
def test_the_table_has_each_figure_beside_its_target(bench, tmp_path, capfd):
    assert bench.run_all(["figures"], out=tmp_path / "out") == 0

    page = (tmp_path / "out" / "bench.md").read_text()
    assert "| figures | size 3 | speed | 4.5 | >= 4 | met |" in page
    assert "| figures | size 3 | wrapped/dense | 1.054 | <= 1.05 | missed |" in page
    assert "figures    size 3  wrapped/dense  1.054  <= 1.05  missed" in capfd.readouterr().out


def test_the_record_names_machine_versions_command_and_load(bench, tmp_path):
    bench.run_all(["figures"], quick=True, out=tmp_path / "out")

    (record,) = json.loads((tmp_path / "out" / "bench.json").read_text())["benchmarks"]
    assert record["command"] == record["machine"]["command"] == "python tests/benchmarks/figures.py --quick"
    assert record["machine"]["cores"] == os.cpu_count()
    assert {"processor", "torch", "python", "regimewrap", "seed", "threads"} <= record["machine"].keys()
    assert record["machine"]["rounds"] == 3
    assert {"load before", "load after"} <= record.keys()


@pytest.mark.slow
def test_variants_of_a_script_run_apart_and_all_by_its_name(bench, monkeypatch, tmp_path):
    variants = {"figures": {"fast": [], "slow": ["--slower", "2"]}}
    monkeypatch.setattr(bench, "VARIANTS", variants)
    assert list(bench.benchmarks()) == ["broken", "figures-fast", "figures-slow"]
    assert list(bench.choose(["figures"], quick=False)) == ["figures-fast", "figures-slow"]

    bench.run_all(["figures-slow"], out=tmp_path / "out")

    assert "| figures-slow | size 3 | wrapped/dense | 2.108 |" in (tmp_path / "out" / "bench.md").read_text()


def test_a_benchmark_that_writes_nothing_is_a_crash(bench, tmp_path):
    (bench.HERE / "silent.py").write_text("")
    assert bench.run_all(["silent"], out=tmp_path / "out") == 3
    assert "it said nothing" in (tmp_path / "out" / "bench.md").read_text()


def test_ctrl_c_keeps_what_had_ended(bench, monkeypatch, tmp_path):
    def interrupted(name, *_):
        if name == "figures":
            raise KeyboardInterrupt
        return {"name": name, "command": "", "error": "exit status 1"}

    monkeypatch.setattr(bench, "run_one", interrupted)

    assert bench.run_all(out=tmp_path / "out") == 130
    assert len(json.loads((tmp_path / "out" / "bench.json").read_text())["benchmarks"]) == 1


def test_an_unknown_name_is_met_with_the_nearest_before_anything_runs(bench, tmp_path):
    with pytest.raises(DataError, match=r"'figure'.*Did you mean 'figures'"):
        bench.run_all(["figure"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_runs_a_benchmark_of_this_checkout(tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--only", "decision_cost"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert "== decision_cost" in done.stdout
    assert "<= 20" in (tmp_path / "regimewrap-bench" / "bench.md").read_text()


def test_the_command_says_which_benchmarks_there_are(tmp_path):
    command = [sys.executable, SCRIPT, "--only", "step_sped"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Did you mean 'step_speed'?" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_what_needs_a_gpu_is_left_out_where_there_is_none_unless_it_is_named(bench, monkeypatch):
    monkeypatch.setattr(bench, "HERE", SCRIPT.parent)
    assert "gpu_speed" in bench.benchmarks()
    assert "gpu_speed" not in bench.choose([], quick=False)
    assert list(bench.choose(["gpu_speed"], quick=False)) == ["gpu_speed"]
