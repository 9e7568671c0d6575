from __future__ import annotations

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

import regimewrap as package
from regimewrap import cli
from regimewrap.policy.policy import PRESETS, RegimePolicy
from regimewrap.report.results import Experiment, Run

COMMANDS = ("demo", "train", "predict", "sweep", "export", "plan", "policy")


def test_the_version_is_printed():
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"regimewrap {package.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_no_command_shows_the_commands(arguments):
    result = CliRunner().invoke(cli.app, arguments)

    assert result.exit_code == 0
    assert all(name in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("preset", PRESETS)
def test_policy_show_prints_yaml_that_is_the_policy(preset):
    result = CliRunner().invoke(cli.app, ["policy", "show", preset])

    assert RegimePolicy.from_yaml(result.stdout) == RegimePolicy.preset(preset)


def test_policy_show_rescales_a_preset():
    result = CliRunner().invoke(cli.app, ["policy", "show", "loss-reset", "--steps", "800"])

    assert RegimePolicy.from_yaml(result.stdout) == RegimePolicy.preset("loss-reset", 800)


def test_policy_validate_says_what_a_good_file_holds(regimewrap, tmp_path):
    RegimePolicy.preset("accuracy-relax").to_file(tmp_path / "mine.yaml")

    outcome = regimewrap("policy", "validate", "mine.yaml")

    assert outcome == (0, "mine.yaml is valid: ema-relax on accuracy, a decision every 50 updates.\n", "")


def test_policy_schema_prints_the_json_schema(regimewrap):
    assert json.loads(regimewrap("policy", "schema").out) == json.loads(json.dumps(RegimePolicy.json_schema()))


def test_plan_prints_a_row_for_each_activation(regimewrap):
    outcome = regimewrap("plan", "torchvision:resnet18")

    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("ResNet: 9 of 9 activations gated\n")
    assert "layer4.1.relu" in outcome.out


def test_plan_reaches_the_activation_of_densenet_that_is_a_function(regimewrap):
    outcome = regimewrap("plan", "torchvision:densenet121")

    assert outcome.out.startswith("DenseNet: 121 of 121 activations gated\n")
    assert "F.relu" in outcome.out


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_plan_says_when_wrap_would_refuse(regimewrap, monkeypatch):
    half_scripted = torch.nn.Sequential(torch.nn.ReLU(), torch.jit.script(torch.nn.ReLU()))
    monkeypatch.setattr(cli, "load_model", lambda _: half_scripted)

    outcome = regimewrap("plan", "mine:model")

    assert outcome.status == 0
    assert outcome.out.endswith(
        "wrap would refuse: 1 selected cannot be gated. Exclude them, or pass it strict=False.\n"
    )


def test_plan_takes_a_policy(regimewrap, tmp_path):
    (tmp_path / "deep.yaml").write_text("sites: {include: ['layer4.*']}")

    assert regimewrap("plan", "torchvision:resnet18", "--policy", "deep.yaml").out.startswith("ResNet: 2 of 9")


def fake_runs(jobs, _work, _workers, stop_after):
    for number, job in enumerate(jobs):
        if number == stop_after:
            raise KeyboardInterrupt
        figures = {"1.0": 0.9, "0.2": 0.8, "0.1": 0.7, "0.05": 0.6}
        yield job, Run(arm=job.arm, seed=job.seed, accuracy=figures, trace=[], cycles=1, bound_share=0, train_seconds=1)


def test_demo_interrupted_after_some_runs_reports_those(regimewrap, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "train_jobs", lambda *arguments: fake_runs(*arguments, stop_after=3))

    outcome = regimewrap("demo", "--seeds", 2, "--out", "out")

    assert outcome.status == 130
    experiment = Experiment.model_validate_json((tmp_path / "out" / "results.json").read_text())
    assert [(run.arm, run.seed) for run in experiment.runs] == [
        ("dense", 0),
        ("dense", 1),
        ("mixed", 0),
    ]
    assert experiment.settings["interrupted"] == "only the runs that had ended are shown"


def test_demo_interrupted_before_any_run_ended_leaves_nothing(regimewrap, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "train_jobs", lambda *arguments: fake_runs(*arguments, stop_after=0))

    outcome = regimewrap("demo", "--out", "out")

    assert outcome.status == 130
    assert "nothing was written" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_demo_tells_each_run_and_ends_with_a_table_and_a_sentence(regimewrap, monkeypatch):
    monkeypatch.setattr(cli, "train_jobs", lambda *arguments: fake_runs(*arguments, stop_after=None))

    outcome = regimewrap("demo", "--seeds", 2, "--out", "out")

    assert outcome.status == 0
    assert "  4/4  mixed, seed 1" in outcome.out
    assert "keep ratio 0.05" in outcome.out
    assert "Over 2 seeds: " in outcome.out
    assert outcome.out.endswith("Report: out/report.html\n")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line_on_standard_error(regimewrap, monkeypatch):
    def load(_name):
        warnings.warn("two\nlines", UserWarning, stacklevel=1)
        return torch.nn.ReLU()

    monkeypatch.setattr(cli, "load_model", load)

    assert regimewrap("plan", "mine:model").err == "Warning: two lines\n"
