from __future__ import annotations

import os
import signal

import pytest
import torch

from regimewrap.train import commands

# Everything that draws: dropout, crops, flips, colours, auto-augment, erased parts, mixup; and everything with a state.
RICH = (
    *("--epochs", 3, "--ema", 0.9, "--mixup", 0.3, "--aa", "rand-m5-mstd0.5", "--re-prob", 0.3, "--color-jitter", 0.2),
    *("--model-kwargs", "drop_rate=0.3", "--model-kwargs", "drop_path_rate=0.2", "--smoothing", 0.1, "--compare"),
)
FIRST, LAST = 3, 18  # updates of an epoch, and of both runs


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def summary(folder):
    lines = (folder / "summary.csv").read_text().splitlines()
    place = lines[0].split(",").index("train_seconds")
    return [[cell for number, cell in enumerate(line.split(",")) if number != place] for line in lines]


def stopping_at(monkeypatch, number, *updates):
    """Send this process a signal when the command says that it has made an update."""
    seen = []

    def show(line):
        seen.append(line)
        if len(seen) in updates:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(commands, "_show", show)


@pytest.fixture
def unbroken(train, tmp_path):
    assert train(*RICH, "--out", "unbroken").status == 0
    return tmp_path / "unbroken"


def test_from_any_place_it_leaves_what_an_unbroken_run_leaves_bit_for_bit(train, tmp_path, monkeypatch, unbroken):
    for stops in ((1, 2, FIRST), (FIRST + 1, 3 * FIRST), (3 * FIRST + 2,)):
        out = tmp_path / f"stopped-{stops[0]}"
        made = 0
        for stop in stops:
            stopping_at(monkeypatch, signal.SIGTERM, stop - made)
            outcome = train(*RICH, "--out", out, "--resume")
            assert outcome.status == 143
            made = stop
        stopping_at(monkeypatch, signal.SIGTERM)
        assert train(*RICH, "--out", out, "--resume").status == 0

        assert summary(out) == summary(unbroken)
        for name in ("model.pt", "dense.pt"):
            one, other = (torch.load(folder / name, weights_only=True) for folder in (out, unbroken))
            assert same(one, other)
        assert {path.name for path in out.iterdir()} == {"model.pt", "dense.pt", "summary.csv"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_the_command_that_goes_on(train, tmp_path, monkeypatch, number, status):
    stopping_at(monkeypatch, number, 2)

    outcome = train("--overwrite")

    assert (outcome.status, outcome.err) == (status, "")
    assert outcome.out.endswith(" --resume\n")
    assert "Stopped after update 2 of 6" in outcome.out
    assert "--overwrite" not in outcome.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint.pt"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_second_signal_stops_at_once(train, monkeypatch):
    monkeypatch.setattr(commands, "_show", lambda _: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert train().status == 130


def test_a_run_of_other_settings_policy_or_pictures_is_not_gone_on_with(train, tmp_path, monkeypatch):
    stopping_at(monkeypatch, signal.SIGTERM, 2)
    train()
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()

    other = train("--resume", "--lr", 0.1)

    assert other.status == 2
    assert "belongs to another run: settings.lr is 0.001 in the state and 0.1 here" in other.err
    assert other.err.count("\n") == 1
    assert "policy." in train("--resume", "--policy", "dense").err
    assert (tmp_path / "out" / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_named(train, tmp_path, monkeypatch):
    stopping_at(monkeypatch, signal.SIGTERM, 2)
    train()
    path = tmp_path / "out" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])

    outcome = train("--resume")

    assert outcome.status == 2
    assert "checkpoint.pt is damaged" in outcome.err


def test_resume_begins_where_there_is_nothing_and_says_when_all_is_done(train):
    assert train("--resume").status == 0
    again = train("--resume")
    assert again.status == 0
    assert "has ended; there is nothing to go on with" in again.out
