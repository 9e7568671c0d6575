"""python -m regimewrap.integrations.timm.train goes on exactly where it was killed, and from nothing else."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from processes import preload, run, run_with_kills
from regimewrap.integrations.timm.train import main
from timm.utils import CheckpointSaver
from timm_runs import SMALL, UPDATES, differences, last_of, script_in, trace_of

preload("timm", "torchvision", "sklearn.datasets", "regimewrap.integrations.timm.train")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    run(script_in(folder), *SMALL, "--out", folder / "run")
    return folder / "run"


@pytest.fixture
def stopped(straight: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, for tests that spoil it."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


def _assert_same(straight: Path, resumed: Path) -> None:
    one, other = last_of(straight), last_of(resumed)
    for saved in (one, other):
        saved.pop("args")  # they have another --out
    assert differences(one, other) == []
    assert (resumed / "summary.csv").read_bytes() == (straight / "summary.csv").read_bytes()
    assert sorted(path.name for path in resumed.iterdir()) == sorted(path.name for path in straight.iterdir())


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _refused(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    """Resume a run that must not go on; return the one line that says why."""
    before = _contents(folder)
    assert main([*SMALL, "--out", str(folder), *(options or ("--resume",))]) == 2
    assert _contents(folder) == before
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    return said


def test_three_kills_and_resumes_change_no_bit(straight: Path, tmp_path: Path):
    options = (*SMALL, "--resume", "--out", tmp_path / "run")
    run_with_kills(script_in(tmp_path), *options, lines=UPDATES, kills=3)
    _assert_same(straight, tmp_path / "run")
    ratios = [ratio for _, ratio in trace_of(straight)]
    assert len(ratios) == UPDATES // 2
    assert any(later > before for before, later in pairwise(ratios))  # it was reset
    assert min(ratios) < 0.5


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_run_goes_on_from_within_an_epoch(
    saves: int, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save, left = CheckpointSaver.save_recovery, iter(range(saves - 1, -1, -1))

    def save_and_leave(saver: CheckpointSaver, *place: int) -> None:
        save(saver, *place)
        if next(left) == 0:
            raise KeyboardInterrupt

    options = [*SMALL, "--out", str(tmp_path / "run"), "--resume"]
    monkeypatch.setattr(CheckpointSaver, "save_recovery", save_and_leave)
    assert main(options) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(options) == 0
    epoch, update = divmod(3 * saves, 8)
    assert f"from epoch {epoch}, update {update}." in capsys.readouterr().err
    _assert_same(straight, tmp_path / "run")


def test_the_same_files_are_left(straight: Path, stopped: Path):
    (stopped / "last.pth.tar").unlink()
    best = sorted(stopped.glob("checkpoint-*"))[0]
    for later in sorted(stopped.glob("checkpoint-*"))[1:]:
        later.unlink()
    assert main([*SMALL, "--out", str(stopped), "--resume", str(best)]) == 0
    assert sorted(_contents(stopped)) == sorted(_contents(straight))
    assert (stopped / "summary.csv").read_bytes() == (straight / "summary.csv").read_bytes()


def test_a_finished_run_has_nothing_left_to_do(straight: Path, stopped: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*SMALL, "--out", str(stopped), "--resume"]) == 0
    assert "update 1" not in capsys.readouterr().err
    _assert_same(straight, stopped)


def test_what_timm_had_not_ranked_when_it_was_killed_is_ranked(tmp_path: Path):
    options = [*SMALL, "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(options) == 0
    whole = Path(shutil.copytree(tmp_path / "run", tmp_path / "whole"))
    for name in ("checkpoint-0.pth.tar", "model_best.pth.tar"):  # it had got as far as last.pth.tar
        (tmp_path / "run" / name).unlink()
    assert main([*options, "--resume"]) == 0
    _assert_same(whole, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # how torch starts workers on Linux
def test_workers_change_no_bit(straight: Path, tmp_path: Path):
    assert main([*SMALL, "--workers", "2", "--out", str(tmp_path / "run")]) == 0
    assert differences(last_of(straight)["state_dict"], last_of(tmp_path / "run")["state_dict"]) == []


def test_a_new_run_does_not_write_into_an_old_ones_folder(stopped: Path, capsys: pytest.CaptureFixture[str]):
    assert "--resume" in _refused(capsys, stopped, "--seed", "1")


def test_a_truncated_checkpoint_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]):
    last = stopped / "last.pth.tar"
    last.write_bytes(last.read_bytes()[:-2000])
    assert f"{last} is damaged or truncated" in _refused(capsys, stopped)


def test_an_altered_byte_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]):
    last = stopped / "last.pth.tar"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.unlink()  # another name leads to the same bytes
    last.write_bytes(content)
    assert "checksum" in _refused(capsys, stopped)


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        (("--model", "test_vit"), ("model is 'test_resnet' there and 'test_vit' here",)),
        (("--lr", "0.01", "--epochs", "4"), ("lr is 0.1 there and 0.01 here", "epochs is 3 there and 4 here")),
        (("--limit", "140"), ("limit is 150 there and 140 here", "checksum")),
        (("--policy", "none"), ("gated is True there and False here",)),
        (("--policy", "accuracy-reset"), ("cycle.monitor is 'loss' in the state and 'accuracy' here",)),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_checkpoint_of_another_run_is_refused_with_both_sides(
    options: tuple[str, ...], sides: tuple[str, ...], stopped: Path, capsys: pytest.CaptureFixture[str]
):
    model = ("--model-kwargs", "img_size=8", "patch_size=4") if "test_vit" in options else ()
    said = _refused(capsys, stopped, "--resume", *options, *model)
    assert all(side in said for side in sides), said


def test_a_checkpoint_of_another_version_is_refused_with_both_sides(
    stopped: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    newer = tmp_path / "newer.pth.tar"
    saved = last_of(stopped)
    saved["task_state"]["regimewrap_train"]["version"] = 2
    torch.save(saved, newer)
    assert "has version 2; this regimewrap reads version 1" in _refused(capsys, stopped, "--resume", str(newer))


def test_a_checkpoint_of_timms_own_training_is_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    foreign = tmp_path / "foreign.pth.tar"
    torch.save({"state_dict": {}, "optimizer": {}}, foreign)
    assert "was not written by" in _refused(capsys, stopped, "--resume", str(foreign))


def test_what_cannot_be_resumed_from_is_named(stopped: Path, capsys: pytest.CaptureFixture[str]):
    assert "no checkpoint" in _refused(capsys, stopped, "--resume", str(stopped / "nowhere.pth.tar"))
