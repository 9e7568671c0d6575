from __future__ import annotations

import csv
import errno

import pytest
import torch
from PIL import Image

from regimewrap.train import folder


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_it_leaves_one_model_and_one_row_an_epoch(train, tmp_path):
    outcome = train()

    assert (outcome.status, outcome.err) == (0, "")
    assert "20 pictures to train on and 4 to validate, 2 classes; one picture in 5" in outcome.out
    assert "6 updates, 3 an epoch. The policy (ema-reset) moves the keep ratio 3 times." in outcome.out
    assert "\x1b" not in outcome.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt", "summary.csv"}
    first, last = rows(tmp_path / "out" / "summary.csv")
    assert [first["epoch"], last["epoch"], last["updates"]] == ["1", "2", "6"]
    assert first["accuracy_at_0.5"] == ""
    assert all(0 <= float(last[f"accuracy_at_{ratio}"]) <= 1 for ratio in ("1", "0.5", "0.2", "0.1"))
    assert float(last["keep_ratio_min"]) < float(first["keep_ratio_min"]) <= 1
    assert 0 < float(last["density_at_0.1"]) < 0.2
    assert float(last["bound_at_0.1"]) == 1


def test_the_default_policy_needs_no_length_and_moves_at_each_update(train):
    outcome = train("--policy", "mixed")

    assert outcome.status == 0
    assert "The policy (spread) moves the keep ratio 6 times." in outcome.out


def test_each_seed_is_a_run_and_each_run_has_a_dense_twin_of_the_same_weights(train, tmp_path, monkeypatch):
    begins = []
    build = folder.Run.__init__

    def seen(self, *arguments):
        build(self, *arguments)
        begins.append((self.seed, self.model.fc.weight.detach().clone()))

    monkeypatch.setattr(folder.Run, "__init__", seen)

    outcome = train("--compare", "--seed", 3, "--seeds", 2, "--epochs", 1)

    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.pt",
        "dense.pt",
        "model-seed-4.pt",
        "dense-seed-4.pt",
        "summary.csv",
    }
    summary = rows(tmp_path / "out" / "summary.csv")
    order = [("regimewrap", "3"), ("dense", "3"), ("regimewrap", "4"), ("dense", "4")]
    assert [(row["arm"], row["seed"]) for row in summary] == order
    assert {row["keep_ratio_mean"] for row in summary if row["arm"] == "dense"} == {"1.0"}
    assert torch.equal(begins[0][1], begins[1][1])
    assert not torch.equal(begins[1][1], begins[2][1])
    assert "over 2 seeds" in outcome.out


def test_an_earlier_run_is_replaced_only_when_asked(train, tmp_path):
    train("--epochs", 1)
    before = (tmp_path / "out" / "model.pt").read_bytes()

    refused = train("--epochs", 1, "--seed", 1)
    unusable = train("--epochs", 1, "--overwrite", "--policy", "none.yaml")
    assert (refused.status, unusable.status) == (2, 2)
    assert "holds a run already (summary.csv). Go on with --resume, replace it with --overwrite" in refused.err
    assert (tmp_path / "out" / "model.pt").read_bytes() == before

    assert train("--epochs", 1, "--seed", 1, "--overwrite").status == 0
    assert (tmp_path / "out" / "model.pt").read_bytes() != before
    assert [row["seed"] for row in rows(tmp_path / "out" / "summary.csv")] == ["1"]


@pytest.mark.parametrize("options", [("test_vit",), ("test_convnext", "--amp"), ("test_efficientnet", "--no-augment")])
def test_other_kinds_of_networks_train(train, options):
    assert train("--epochs", 1, "--model", *options).status == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "test_resnett"), "timm has no model 'test_resnett'. Did you mean 'test_resnet'?"),
        (("--model-kwargs", "drop_rat=0.1"), "timm cannot build test_resnet: TypeError"),
        (("--model-kwargs", "drop_rate"), "--model-kwargs takes NAME=VALUE; got 'drop_rate'"),
        (("--opt", "sgdd"), "timm has no use for --opt sgdd"),
        (("--aa", "rnd"), "timm has no use for --aa rnd"),
        (("--lr", "nan"), "--lr must be a positive number; got nan"),
        (("--keep-ratios", "1,2"), "expected 1,0.5,0.2,0.1 or the like; got 1,2"),
        (("--policy", "mixd"), "Did you mean 'mixed'?"),
        (("--device", "cudaa"), "'--device'"),
        (("--model", "test_vit", "--img-size", "33"), "Change --img-size"),
        (("--out", "quick.yaml"), "cannot write to quick.yaml: it is a file"),
        (("--lr", "1e30", "--policy", "mixed"), "choose a smaller --lr"),
        (("--epoch", "1"), "No such option"),
    ],
)
def test_a_mistake_is_one_line(train, tmp_path, options, message):
    outcome = train(*options)

    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out" / "model.pt").exists()


def test_a_run_too_short_for_the_policy_is_refused_before_it_starts(train, tmp_path):
    (tmp_path / "slow.yaml").write_text("cycle: {strategy: {kind: ema-reset}, every: 7}")

    outcome = train("--policy", "slow.yaml")

    assert outcome.status == 2
    assert "its 6 updates end before the policy decides for the first time, after 7." in outcome.err
    assert not (tmp_path / "out").exists()


def test_torchrun_is_refused_with_another_way(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    outcome = train()

    assert outcome.status == 2
    assert "runs in one process; torchrun started 2" in outcome.err


def test_a_full_disk_is_said_in_plain_words(train, monkeypatch):
    def full(_content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.torch, "save", full)

    outcome = train()

    assert outcome.status == 2
    assert "out/checkpoint.pt cannot be written: No space left on device. Free some space" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_damaged_inside_is_named(regimewrap, tmp_path, workers):
    data = tmp_path / "data"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((64, 64), 90).save(data / name / f"{number}.jpg")
    whole = (data / "cat" / "2.jpg").read_bytes()
    for number in range(3):
        (data / "dog" / f"{number}.jpg").write_bytes(whole[: len(whole) // 2])

    outcome = regimewrap("train", data, "--model", "test_resnet", "--img-size", 32, "--workers", workers)

    assert outcome.status == 2
    assert "dog" in outcome.err
    assert ".jpg is damaged" in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_folder_for_the_run_among_the_classes_is_refused(train, shapes):
    outcome = train("--out", shapes / "out")

    assert outcome.status == 2
    assert "would be taken for a class" in outcome.err
    assert not (shapes / "out").exists()
