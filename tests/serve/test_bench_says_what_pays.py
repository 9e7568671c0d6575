"""``bench`` times a model by its rivals, in turn, and says so when serving is not worth it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from regimewrap import cli
from regimewrap.errors import ServeError
from regimewrap.serve import bench as room
from regimewrap.serve.bench import Bench, Rival, bench, with_memory


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """Compiling takes half a minute and is torch's business."""
    monkeypatch.setattr(room, "_compiled", lambda model, args, kwargs: lambda: model(*args, **kwargs))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))


def test_rivals_are_timed_and_the_model_stays_as_it_is():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = bench(model, torch.randn(2, 8), 0.1, rounds=3)
    times = {each.name: each.ms for each in result.rivals}
    assert result.batch == 2
    assert times["dense eager"] > 0
    assert times["served at 0.1"] > 0
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "median ms" in str(result)
    assert result.verdict in str(result)


def test_a_rival_that_cannot_run_says_why_and_the_others_go_on(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(room, "_int8", broken)
    result = bench(net(), torch.randn(1, 8), rounds=3)
    rival = next(each for each in result.rivals if each.name == "int8 dynamic")
    assert math.isnan(rival.ms)
    assert rival.note == "RuntimeError: no such thing"


@pytest.mark.parametrize(
    ("sparse", "word"),
    [(Rival("served", 2.0, 0.1), "2.00 times as fast as dense compiled"), (Rival("served", 5.0), "not worth it")],
)
def test_the_verdict_compares_with_the_best_dense_rival(sparse, word):
    result = Bench(
        1, 0.1, (Rival("dense eager", 9.0), Rival("dense compiled", 4.0), Rival("int8 dynamic", 1.0), sparse)
    )
    assert word in result.verdict


def test_nothing_to_serve_is_a_verdict_too():
    result = bench(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(1, 8), rounds=3)
    assert "nothing to serve" in result.verdict


def test_too_few_rounds_are_refused():
    with pytest.raises(ServeError, match="at least 3"):
        bench(net(), torch.randn(1, 8), rounds=2)


def test_models_without_memory_get_finite_outputs():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
        ).eval()
    with torch.no_grad():
        assert with_memory(model)(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_the_command_prints_a_table_a_batch(capsys, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda _: net())
    assert cli.run(["bench", "mine:net", "--batch", "1,2", "--input", "8", "--rounds", "3"]) == 0
    out = capsys.readouterr().out
    assert "batch 1" in out
    assert "batch 2" in out
    assert cli.run(["bench", "mine:net", "--batch", "0"]) == 2
    assert cli.run(["bench", "mine:net", "--keep-ratio", "7"]) == 2
