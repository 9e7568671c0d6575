"""python -m regimewrap.integrations.timm.train trains timm's models, writes what timm writes, says what is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from processes import preload, run_with_kills, torchrun, under
from regimewrap.integrations.timm.train import main
from timm_runs import SMALL, UPDATES, differences, last_of, trace_of
from torchvision.transforms.functional import to_pil_image

preload("timm", "torchvision", "sklearn.datasets", "regimewrap.integrations.timm.train")

# Two ranks, each of which also writes what its own cycler has seen.
TELLING = """\
import json, sys
from regimewrap.integrations.timm import run, train

class Telling(run.Run):
    def train(self):
        super().train()
        state = self.task.cycler.state_dict()
        weights = [each.sum().item() for each in self.task.trainable_module.state_dict().values()]
        (self.args.out / f"rank-{self.args.rank}.json").write_text(json.dumps([state["history"], weights]))

train.Run = Telling
sys.exit(train.main())
"""


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_policy_dense_is_bit_equal_to_a_run_without_regimewrap(tmp_path: Path):
    for policy in ("dense", "none"):
        assert main([*SMALL, "--policy", policy, "--out", str(tmp_path / policy)]) == 0
    gated, bare = last_of(tmp_path / "dense"), last_of(tmp_path / "none")
    for part in ("state_dict", "state_dict_ema", "optimizer"):
        assert differences(gated[part], bare[part]) == []
    of_bare = _rows(tmp_path / "none")
    assert [{name: row[name] for name in of_bare[0]} for row in _rows(tmp_path / "dense")] == of_bare
    assert "regimewrap" not in bare["task_state"]


def test_the_summary_has_columns_for_the_ratio(tmp_path: Path):
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    rows = _rows(tmp_path / "run")
    ratios = dict(trace_of(tmp_path / "run"))
    assert [float(row["train_keep_ratio"]) for row in rows] == [ratios[8], ratios[16], ratios[24]]
    assert float(rows[1]["train_keep_ratio_min"]) == min(ratios[step] for step in range(8, 16, 2))
    assert {"train_phase", "train_cycle", "train_bound", "train_density", "eval_top1_at_keep_ratio"} <= rows[0].keys()
    assert any(row["eval_top1"] != row["eval_top1_at_keep_ratio"] for row in rows)


def test_its_checkpoints_load_into_timms_own_models(tmp_path: Path):
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 0
    checkpoint = str(tmp_path / "run" / "model_best.pth.tar")
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1, checkpoint_path=checkpoint)
    assert differences(dict(model.state_dict()), torch.load(checkpoint, weights_only=False)["state_dict_ema"]) == []


def test_two_ranks_under_torchrun_hold_one_ratio(tmp_path: Path):
    script = tmp_path / "train_timm.py"
    script.write_text(TELLING)
    under(torchrun(2), script, *SMALL, "--batch-size", "5", "--out", tmp_path / "run")
    (first, weights), (second, same_weights) = (
        json.loads((tmp_path / "run" / f"rank-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert len(first) == UPDATES // 2
    assert len({each["keep_ratio"] for each in first}) > 2
    assert first == second
    assert weights == same_weights

    # The same two ranks, killed and resumed: each goes on with its own pending losses and random numbers.
    options = (*SMALL, "--batch-size", "5", "--resume", "--out", tmp_path / "again")
    run_with_kills(script, *options, lines=UPDATES, kills=1, ranks=2)
    one, other = last_of(tmp_path / "run"), last_of(tmp_path / "again")
    for saved in (one, other):
        saved.pop("args")
    assert differences(one, other) == []


@pytest.mark.parametrize("augment", [("none",), ("crop-flip",), ("timm", "--aa", "rand-m9-mstd0.5")])
def test_it_trains_on_a_folder_of_images(augment: tuple[str, ...], tmp_path: Path):
    pixels = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8, generator=pixels)
                to_pil_image(image).save(folder / f"{number}.png")
    settings = (
        "--model",
        "test_vit",
        "--model-kwargs",
        "img_size=16",
        "patch_size=8",
        "--img-size",
        "16",
        "--opt",
        "lamb",
    )
    options = ("--batch-size", "4", "--epochs", "2", "--lr", "0.001", "--policy", "sawtooth", "--device", "cpu")
    run = ("--data", str(tmp_path / "images"), *settings, *options, "--augment", *augment)
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    assert len(_rows(tmp_path / "run")) == 2


@pytest.mark.parametrize("schedule", ["cosine", "step", "poly"])
def test_every_learning_rate_schedule_goes_on_where_it_was(schedule: str, tmp_path: Path):
    options = (*SMALL, "--sched", schedule, "--warmup-epochs", "1")
    options = tuple(each for each in options if each != "--sched-on-updates")
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    straight = (tmp_path / "run" / "summary.csv").read_bytes()
    for later in ("last", "checkpoint-2", "model_best"):
        (tmp_path / "run" / f"{later}.pth.tar").unlink(missing_ok=True)
    assert main([*options, "--resume", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "summary.csv").read_bytes() == straight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "resnet"), "timm refused --model resnet: "),
        (("--opt", "sdg"), "timm refused --opt sdg: "),
        (("--sched", "cosin"), "timm refused --sched cosin: "),
        (("--sched", "plateau"), "cannot be resumed exactly"),
        (
            ("--model", "test_vit", "--model-kwargs", "img_size=160"),
            "timm refused images of 1×8×8 for --model test_vit",
        ),
        (("--batch-size", "151"), "150 training images do not fill one batch of 151"),
        (("--data", "nowhere"), "nowhere doesn't exist"),
        (("--policy", "loss-rest"), "Did you mean 'loss-reset'?"),
        (
            ("--model", "regimewrap_auto", "--model-kwargs", "base=test_resnet", "--policy", "dense"),
            "is wrapped already",
        ),
        (("--model", "regimewrap_auto", "--model-kwargs"), "pass base"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*SMALL, *options, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [("--epochs", "0"), ("--lr", "-1"), ("--model-kwargs", "img_size")])
def test_a_value_that_cannot_be_is_refused_by_the_parser(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_status:
        main([*SMALL, *options, "--out", "run"])
    assert exit_status.value.code == 2
    assert options[0] in capsys.readouterr().err
