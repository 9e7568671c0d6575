"""Loops that are killed at random moments and started again end where an undisturbed run ends, bit for bit."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import processes
import pytest

processes.preload("accelerate", "lightning.pytorch")
LOOPS = Path(__file__).parent / "loops"
LINES = 80  # fewer than a run prints, so that it is not over before the third kill


def _ends(said: list[str]) -> list[dict[str, Any]]:
    return [json.loads(each.splitlines()[-1]) for each in said]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loop", ["plain", "accelerate", "lightning"])
def test_three_kills_change_nothing(loop: str, ranks: int, tmp_path: Path):
    if loop != "plain" and find_spec(loop) is None:
        pytest.skip(f"{loop} is not installed")
    script = LOOPS / f"{loop}_run.py"
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()

    straight = _ends(processes.run(script, tmp_path / "straight", "reset", ranks=ranks))
    killed = _ends(processes.run_with_kills(script, tmp_path / "killed", "reset", lines=LINES, ranks=ranks))

    assert killed == straight
    assert {event for _, _, event, _, _ in straight[0]["trace"]} == {"compress", "hold", "reset"}
