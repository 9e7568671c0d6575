from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from regimewrap import gate_of
from regimewrap.train import saved, uses


@pytest.fixture
def run(train, tmp_path):
    assert train("--ema", 0.5).status == 0
    return tmp_path / "out"


def test_the_file_is_plain_data_and_weights_that_fit_the_bare_model(run):
    content = torch.load(run / "model.pt", weights_only=True)

    assert content["classes"] == ["circle", "square"]
    assert content["model"] == "test_resnet"
    assert content["look"]["input_size"] == (3, 32, 32)
    assert {"mean", "std", "interpolation", "crop_pct"} <= content["look"].keys()
    assert content["policy"]["cycle"]["strategy"]["kind"] == "ema-reset"
    assert content["accuracy"].keys() == {1.0, 0.5, 0.2, 0.1}
    timm.create_model("test_resnet", num_classes=2).load_state_dict(content["weights"])


@pytest.mark.filterwarnings("ignore:.*BatchNorm, whose running statistics")
def test_loaded_it_is_wrapped_and_as_accurate_as_it_was(regimewrap, run):
    trained = saved.load(run)
    assert gate_of(trained.model).sites
    assert not trained.model.training

    outcome = regimewrap("sweep", run, "--keep-ratios", "1,0.5,0.2,0.1", "--workers", 0, "--save", "sweep.json")

    assert outcome.status == 0
    found = json.loads((run.parent / "sweep.json").read_text())
    assert found == {f"{ratio:g}": value for ratio, value in trained.about["accuracy"].items()}


def test_sweep_re_estimates_batchnorm_for_each_budget_when_asked(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        uses, "recalibrate_batchnorm", lambda _model, batches, ratio: seen.append((len(batches), ratio))
    )
    monkeypatch.setattr(uses, "sweep_model", lambda _model, _accuracy, ratios: uses.Sweep({ratios[0]: 0.5}))

    swept = uses.sweep(saved.load(run), (1.0, 0.1), recalibrate=True)

    assert seen == [(1, 1.0), (1, 0.1)]
    assert swept.values == {1.0: 0.5, 0.1: 0.5}


@pytest.mark.filterwarnings("ignore:.*BatchNorm, whose running statistics")
def test_sweep_takes_another_folder_whole_and_refuses_unknown_classes(regimewrap, run, tmp_path):
    for name in ("square", "ring"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "other" / name / "1.png")

    refused = regimewrap("sweep", run, "other")
    (tmp_path / "other" / "ring" / "1.png").unlink()
    (tmp_path / "other" / "ring").rmdir()
    outcome = regimewrap("sweep", run, "other", "--keep-ratios", "1", "--workers", 0)

    assert refused.status == 2
    assert "other has class ring, which the model does not know; it knows circle, square" in refused.err
    assert outcome.status == 0
    assert outcome.out.split()[-1] in ("0.0000", "1.0000")  # one picture


def test_predict_says_the_likeliest_classes_at_any_budget(regimewrap, run, shapes):
    pictures = (shapes / "circle" / "3.png", shapes / "square" / "4.png")
    dense, small = (regimewrap("predict", run, *pictures, "--top", 5, "--keep-ratio", ratio) for ratio in (1.0, 0.05))

    assert dense.status == small.status == 0
    assert dense.out != small.out
    first = dense.out.splitlines()[0]
    assert first.startswith(f"{pictures[0]}: ")
    shares = [float(word) for word in first.replace("%", "").split() if word.replace(".", "").isdecimal()]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert shares == sorted(shares, reverse=True)


def test_what_cannot_be_used_is_named(regimewrap, run, shapes):
    picture = shapes / "circle" / "1.png"
    for arguments, message in (
        ((run, "none.png"), "none.png cannot be opened"),
        (("none", picture), "there is no none"),
        (("quick.yaml", picture), "quick.yaml is damaged, or not a file of regimewrap train"),
        ((run, picture, "--keep-ratio", 2), "a fraction in (0, 1]; got 2"),
    ):
        outcome = regimewrap("predict", *arguments)
        assert outcome.status == 2
        assert message in outcome.err
        assert outcome.err.count("\n") == 1


def test_a_file_that_is_cut_short_is_named(regimewrap, run):
    path = run / "model.pt"
    path.write_bytes(path.read_bytes()[:9000])

    assert "model.pt is damaged" in regimewrap("sweep", run).err


@pytest.mark.parametrize("keep_ratio", [1.0, 0.2])
@pytest.mark.filterwarnings("default")
def test_exported_it_computes_the_same_for_any_number_of_pictures(regimewrap, run, tmp_path, keep_ratio):
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")

    outcome = regimewrap("export", run, "--onnx", "m.onnx", "--keep-ratio", keep_ratio)

    assert outcome.status == 0
    trained = saved.load(run)
    x = torch.randn(3, 3, 32, 32)
    (found,) = reference.ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"x": x.numpy()})
    assert found.shape == (3, 2)
    if keep_ratio == 1.0:
        np.testing.assert_allclose(found, trained.model(x).detach().numpy(), atol=1e-5)
