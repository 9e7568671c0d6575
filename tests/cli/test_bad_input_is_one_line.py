from __future__ import annotations

import re

import pytest

from regimewrap import cli

POLICIES = {
    "scope.yaml": ("gate: {scope: sampel}", "'sampel'.* Did you mean 'sample'"),
    "strategy.yaml": ("cycle: {strategy: {kind: ema-rest}}", "'ema-rest'.* Did you mean 'ema-reset'"),
    "ratio.yaml": ("gate: {eval_keep_ratio: 1.5}", r"gate\.eval_keep_ratio.*1\.5"),
    "tag.yaml": ("!!python/object/apply:os.system [ls]", "remove the tag"),
    "broken.yaml": ("gate: {scope: [", "not YAML: line 1"),
    "empty.yaml": ("", "the policy is empty"),
    "list.yaml": ("- gate", "a policy is a mapping"),
    "broken.json": ("{", "not JSON"),
}


@pytest.fixture
def fails(regimewrap, tmp_path):
    """Run a command line that must fail with one line, and leave no new file."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = regimewrap(*arguments)
        assert outcome.status == 2
        assert outcome.err.startswith("Error: ")
        assert outcome.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return outcome.err

    return run


TRAIN = ("train", "pictures", "--model", "test_resnet")


@pytest.mark.parametrize("arguments", [("policy", "show", "los-reset"), (*TRAIN, "--policy", "los-reset")])
def test_an_unknown_preset_names_the_nearest(fails, arguments):
    assert "Did you mean 'loss-reset'" in fails(*arguments)


def test_a_name_that_no_file_could_have_is_an_unknown_preset(fails):
    assert "preset must be one of" in fails("policy", "show", "x" * 5000)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("command", [("policy", "validate"), (*TRAIN, "--policy")], ids=" ".join)
def test_a_bad_policy_file_says_where_and_what(fails, tmp_path, name, command):
    text, message = POLICIES[name]
    (tmp_path / name).write_text(text)

    error = fails(*command, name)

    assert error.startswith(f"Error: {name}: ")
    assert re.search(message, error)


@pytest.mark.parametrize("command", [("policy", "validate"), (*TRAIN, "--policy")], ids=" ".join)
def test_a_policy_file_that_is_not_there_or_is_a_folder_is_named(fails, tmp_path, command):
    (tmp_path / "folder.yaml").mkdir()

    assert "nowhere.yaml: cannot read a policy file here: No such file" in fails(*command, "nowhere.yaml")
    assert "folder.yaml: cannot read a policy file here: Is a directory" in fails(*command, "folder.yaml")


def test_an_out_that_cannot_be_written_is_found_before_training(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "train_jobs", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("x")

    assert "cannot write to file/below" in fails("demo", "--out", "file/below")
    assert "cannot write to file: it is a file" in fails("demo", "--out", "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", "0"), "Invalid value for '--epochs'"),
        (("--epochs", "many"), "Invalid value for '--epochs'"),
        (("--sede", "5"), "No such option"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(fails, options, message):
    assert message in fails(*TRAIN, *options)


def test_a_command_that_does_not_exist_is_refused(fails):
    assert "No such command 'demos'" in fails("demos")


def test_a_missing_option_is_named(fails):
    assert "'--model'" in fails("train", "pictures")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("nn.Linear(2, 2)", "users_models_bad:model has no activation that is known"),
        ("nn.Sequential(nn.Linear(2, 2), nn.Softmax(1))", "the policy selects none of these activations"),
        ("torch.jit.script(nn.ReLU())", "TorchScript module, whose code cannot be gated"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_model_that_cannot_be_planned_says_why(regimewrap, tmp_path, monkeypatch, code, message):
    monkeypatch.setattr("sys.path", list(cli.sys.path))
    monkeypatch.delitem(cli.sys.modules, "users_models_bad", raising=False)
    (tmp_path / "users_models_bad.py").write_text(f"import torch\nfrom torch import nn\nmodel = {code}\n")

    outcome = regimewrap("plan", "users_models_bad:model")

    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_an_unknown_model_names_the_nearest(fails):
    assert "Did you mean 'resnet18'" in fails("plan", "torchvision:resnet81")
