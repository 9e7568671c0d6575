"""What only a process of its own can show: exit statuses, signals, pipes, missing packages, the demo for real."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import regimewrap as package
from regimewrap import _command
from regimewrap.report.results import Experiment

COMMAND = [sys.executable, "-m", "regimewrap"]


@pytest.fixture
def start():
    """Start a command line whose output can be read while it runs."""
    with contextlib.ExitStack() as processes:

        def start(*arguments: object) -> subprocess.Popen[str]:
            command = [*COMMAND, *map(str, arguments)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield start


def test_the_module_and_the_script_are_the_command_line():
    script = Path(sys.executable).with_name("regimewrap")

    for command in (COMMAND, [str(script)]):
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout.startswith("regimewrap ")


def test_an_error_is_a_line_on_standard_error_and_status_2():
    result = subprocess.run([*COMMAND, "policy", "show", "desne"], capture_output=True, text=True, check=False)

    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: preset must be one of")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["typer"])
def test_a_missing_command_line_package_names_the_extra(package):
    code = f"import sys; sys.modules['{package}'] = None; import regimewrap.__main__ as m; sys.exit(m.main())"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert result.returncode == 2
    assert result.stderr == (
        f"Error: the command line needs {package}; run `pip install -e '.[cli]'` in a checkout of regimewrap.\n"
    )


@pytest.mark.slow
def test_a_reader_that_leaves_early_gets_no_error_text(start):
    process = start("policy", "schema")
    process.stdout.close()

    assert process.wait(300) == 1
    assert process.stderr.read() == ""


@pytest.mark.slow
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        result = subprocess.run(
            [*COMMAND, "policy", "show"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert result.returncode == 2
    assert result.stderr == "Error: standard output cannot be used: No space left on device.\n"


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_takes_a_part_of_the_output_is_one_line(tmp_path, unbuffered):
    with (tmp_path / "schema.json").open("w") as file:
        result = subprocess.run(
            [*COMMAND, "policy", "schema"],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
        )

    assert result.returncode == 2
    assert result.stderr == "Error: standard output cannot be used: File too large.\n"


@pytest.mark.parametrize(("program", "is_quiet"), [("/usr/bin/regimewrap", True), ("/srv/train.py", False)])
def test_ctrl_c_while_torch_is_imported_ends_the_command_without_a_traceback_and_no_other_program(program, is_quiet):
    file = Path(_command.__file__)
    code = (
        f"import signal, sys; sys.argv[0] = {program!r}; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"exec(open({str(file)!r}).read())\nprint(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout == f"{is_quiet}\n"
    assert "import regimewrap._command" in Path(package.__file__).read_text().partition("from ")[0]  # before torch


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_training_leaves_a_checkpoint_that_its_last_line_goes_on_from(start, tmp_path, number):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for each in range(6):
            Image.new("RGB", (20, 20), (9 * each, 0, 0)).save(tmp_path / "data" / name / f"{each}.png")
    out = tmp_path / "out"
    options = ("--model", "test_resnet", "--img-size", 32, "--epochs", 100_000, "--workers", 1, "--out", out)
    process = start("train", tmp_path / "data", *options)
    while "epoch " not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)

    output, errors = process.communicate(timeout=300)

    assert (process.returncode, errors) == (128 + number, "")
    assert output.splitlines()[-1].startswith(f"Go on with: regimewrap train {tmp_path}")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["run"]["update"] > 0
    assert not any(path.name.startswith(".") for path in out.iterdir())


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_half_written_and_no_process(start, tmp_path):
    out = tmp_path / "out"
    process = start("demo", "--out", out)
    assert "16 runs" in process.stdout.readline()
    time.sleep(1)  # let workers start
    process.send_signal(signal.SIGINT)

    output, errors = process.communicate(timeout=300)

    assert process.returncode == 130
    assert errors == ""
    assert "nothing was written" in output
    assert not out.exists()
    # The pipes' other ends are closed, so no worker holds them: communicate has returned.


@pytest.mark.slow
def test_the_demo_visits_all_budgets_and_shows_a_gain_at_small_ones(start, tmp_path):
    out = tmp_path / "report"
    process = start("demo", "--seeds", 1, "--out", out)

    output, errors = process.communicate(timeout=900)

    assert (process.returncode, errors) == (0, "")
    assert "One seed: " in output
    assert {path.name for path in out.iterdir()} >= {
        "report.html",
        "results.json",
        "policy.yaml",
        "keep-ratio-trace.svg",
    }
    experiment = Experiment.model_validate_json((out / "results.json").read_text())
    dense, mixed = (experiment.runs_of(arm)[0] for arm in ("dense", "mixed"))
    assert {point.keep_ratio for point in dense.trace} == {1.0}
    assert dense.bound_share == 0
    ratios = [point.keep_ratio for point in mixed.trace]
    assert min(ratios) < 0.07
    assert max(ratios) > 0.7
    assert mixed.bound_share > 0.25
    assert min(dense.accuracy["1.0"], mixed.accuracy["1.0"]) > 0.85
    assert mixed.accuracy["0.1"] > dense.accuracy["0.1"] + 0.05
