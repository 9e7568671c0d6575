"""Ranks with data of their own hold one ratio, bit for bit, however the model is shared between them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import processes
import pytest

processes.preload("accelerate", "lightning.pytorch")
LOOP = Path(__file__).parent / "loops" / "traces.py"
UPDATES = 1200  # 240 decisions, all of which the history keeps
WAYS = ["ddp", "fsdp2-functions", *(name for name in ("accelerate", "lightning") if find_spec(name))]


def _holds(way: dict[str, Any], ranks: int, updates: int) -> None:
    first, *others = way["ranks"]
    assert len(others) == ranks - 1
    for other in others:
        assert (other["trace"], other["ratio"]) == (first["trace"], first["ratio"])
    assert len(first["trace"]) == updates // 5
    assert {event for _, _, event, _, _ in first["trace"]} == {"compress", "hold", "reset"}
    assert [rank["skipped"] > 0 for rank in way["ranks"]] == [number == 1 for number in range(ranks)]  # the NaN
    weights = {rank["digest"] for rank in way["ranks"]}
    assert len(weights) == (ranks if way["way"].startswith("fsdp2") else 1)  # sharded, or the same everywhere


@pytest.mark.slow
def test_two_ranks_under_torchrun_hold_one_trace():
    said = processes.under(processes.torchrun(2), LOOP, UPDATES, *WAYS, timeout=600)

    ways = [json.loads(line) for line in said.splitlines() if line.startswith('{"way"')]
    assert [way["way"] for way in ways] == WAYS
    for way in ways:
        _holds(way, 2, UPDATES)


@pytest.mark.parametrize("way", WAYS)
def test_four_ranks_hold_one_trace(way: str):
    said = processes.run(LOOP, 300, way, ranks=4, timeout=600)

    _holds(json.loads(said[0].splitlines()[-1]), 4, 300)


def test_fsdp2_shards_models_whose_activations_are_modules_too():
    said = processes.run(LOOP, 50, "fsdp2-modules", "ddp-functions", ranks=2)

    for line in said[0].splitlines():
        first, second = json.loads(line)["ranks"]
        assert first["trace"] == second["trace"]
        assert len(first["trace"]) == 10
