"""Writers: one protocol, whole files after a kill and a resume, and no package that has to be there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from regimewrap.integrations import requires
from regimewrap.integrations.writers import CsvWriter, JsonLinesWriter, TensorBoardWriter, WandbWriter, Writer
from torch import nn

from regimewrap import CyclePolicy, RegimeCycler, RegimePolicy, wrap
from regimewrap.errors import DataError, MissingExtraError, UnsupportedVersionError
from regimewrap.strategies import Sawtooth

FILES = [CsvWriter, JsonLinesWriter]


def _cycler() -> RegimeCycler:
    cycle = CyclePolicy(strategy=Sawtooth(decisions=3, floor=0.25), every=2)
    return RegimeCycler(wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), RegimePolicy(cycle=cycle)))


def _follow(log: Writer, updates: int) -> list[float]:
    """Write a loop's regime at each of its updates, and return the keep ratios."""
    cycler = _cycler()
    ratios = []
    with log:
        for update in range(updates):
            regime = cycler.step()
            log.write(cycler.updates, loss=torch.tensor(1 / (update + 1)), **regime._asdict())
            ratios.append(regime.keep_ratio)
    return ratios


def test_json_lines_hold_what_was_written(tmp_path: Path):
    ratios = _follow(JsonLinesWriter(tmp_path / "run.jsonl"), 8)

    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["keep_ratio"] for row in rows] == ratios
    assert rows[0] == {"step": 1, "loss": 1.0, "keep_ratio": 1.0, "phase": "dense", "cycle": 0, "event": None}
    assert rows[5]["event"] == "reset"


def test_csv_holds_what_was_written_under_a_header(tmp_path: Path):
    ratios = _follow(CsvWriter(tmp_path / "run.csv"), 8)

    header, *rows = [line.split(",") for line in (tmp_path / "run.csv").read_text().splitlines()]
    assert header == ["step", "loss", "keep_ratio", "phase", "cycle", "event"]
    assert [float(row[2]) for row in rows] == ratios  # to the last bit
    assert rows[0] == ["1", "1.0", "1.0", "dense", "0", ""]


def test_a_name_that_comes_later_adds_a_column_to_csv(tmp_path: Path):
    with CsvWriter(tmp_path / "run.csv") as log:
        log.write(1, loss=2.0)
        log.write(2, loss=1.0, accuracy=0.5)
        log.write(3, accuracy=0.75)

    assert (tmp_path / "run.csv").read_text() == "step,loss,accuracy\n1,2.0,\n2,1.0,0.5\n3,,0.75\n"


def test_json_lines_stay_json_when_a_loss_is_not_finite(tmp_path: Path):
    with JsonLinesWriter(tmp_path / "run.jsonl") as log:
        log.write(1, loss=math.nan, bound=-math.inf, keep_ratio=0.5)

    assert (tmp_path / "run.jsonl").read_text() == '{"step": 1, "loss": null, "bound": null, "keep_ratio": 0.5}\n'


@pytest.mark.parametrize("kind", FILES)
def test_each_line_is_on_disk_as_soon_as_it_is_written(kind: type[Writer], tmp_path: Path):
    log = kind(tmp_path / "run")
    log.write(1, loss=2.0)
    log.write(2, loss=1.0)

    assert "1.0" in (tmp_path / "run").read_text()
    log.close()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("torn", ["", "7,0.1", '{"step": 7, "lo'])
def test_a_run_that_was_killed_and_resumed_leaves_the_log_of_one_that_was_not(
    kind: type[Writer], torn: str, tmp_path: Path
):
    def write(path: Path, steps: range, resume_after: int | None = None) -> None:
        with kind(path, resume_after=resume_after) as log:
            for step in steps:
                log.write(step, loss=1 / step, phase="compress")

    write(tmp_path / "straight", range(1, 11))
    write(tmp_path / "killed", range(1, 7))
    with (tmp_path / "killed").open("a") as file:
        file.write(torn)  # the kill came in the middle of a line
    write(tmp_path / "killed", range(5, 11), resume_after=4)

    assert (tmp_path / "killed").read_text() == (tmp_path / "straight").read_text()


@pytest.mark.parametrize("kind", FILES)
def test_resuming_before_the_first_checkpoint_begins_anew(kind: type[Writer], tmp_path: Path):
    with kind(tmp_path / "run", resume_after=0) as log:
        log.write(1, loss=2.0)
    with kind(tmp_path / "run", resume_after=0) as log:
        log.write(1, loss=3.0)

    assert "3.0" in (tmp_path / "run").read_text()
    assert "2.0" not in (tmp_path / "run").read_text()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    ("text", "resume_after", "message"),
    [
        ("step,loss\n1,2.0\n", None, "there is a log already. To go on with it pass resume_after=cycler.updates"),
        ("something else\nentirely\n", 3, "every line of which should have a step"),
    ],
)
def test_a_file_that_cannot_be_gone_on_with_is_refused_and_stays(
    kind: type[Writer], text: str, resume_after: int | None, message: str, tmp_path: Path
):
    (tmp_path / "run").write_text(text)

    with pytest.raises(DataError, match=message):
        kind(tmp_path / "run", resume_after=resume_after)
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]


@pytest.mark.parametrize("kind", FILES)
def test_a_path_that_cannot_be_written_is_named(kind: type[Writer], tmp_path: Path):
    with pytest.raises(DataError, match=r"missing.run: cannot write a log here: No such file or directory"):
        kind(tmp_path / "missing" / "run")


def test_tensorboard_gets_curves_and_hides_what_a_killed_run_wrote_after_its_checkpoint(tmp_path: Path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ratios = _follow(TensorBoardWriter(tmp_path), 6)
    with TensorBoardWriter(tmp_path, resume_after=4) as log:
        log.write(5, keep_ratio=0.125)

    events = reading.EventAccumulator(str(tmp_path))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("keep_ratio")]
    assert curve == [*enumerate(ratios[:4], 1), (5, 0.125)]
    assert "phase/text_summary" in events.Tags()["tensors"]


def test_weights_and_biases_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _follow(WandbWriter("regimewrap", dir=str(tmp_path), config={"preset": "sawtooth"}), 6)

    wandb.teardown()  # its service writes behind our back
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert all(text in record.read_bytes() for text in (b"keep_ratio", b"compress", b"sawtooth"))


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda folder: TensorBoardWriter(folder / "board"), "tensorboard"),
        (lambda folder: WandbWriter("regimewrap", dir=str(folder)), "wandb"),
    ],
)
def test_a_writer_without_its_package_names_the_extra_and_writes_nothing(
    make, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(requires, "find_spec", lambda _: None)

    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; .*regimewrap\[{package}\]"):
        make(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found", ["2.9.1", "1.15.0", "2.9.0rc1"])
def test_a_package_that_is_too_old_is_named_with_what_is_supported(found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requires, "find_spec", lambda name: name)
    monkeypatch.setattr(requires, "version", lambda _: found)

    with pytest.raises(UnsupportedVersionError, match=rf"some {found} is installed and regimewrap supports 2.10 or"):
        requires.require("some", "2.10", "some")


@pytest.mark.parametrize("found", ["2.10", "2.10.1", "3", "10.0.0.dev3"])
def test_a_package_that_is_new_enough_passes(found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requires, "find_spec", lambda name: name)
    monkeypatch.setattr(requires, "version", lambda _: found)

    requires.require("some", "2.10", "some")
