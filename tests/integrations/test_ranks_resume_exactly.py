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


@pytest.mark.parametrize(
    ("loop", "ranks"),
    [
        ("plain", 1),
        ("plain", 2),
        ("plain fsdp2", 2),
        *((name, n) for name in ("accelerate", "lightning") for n in (1, 2)),
    ],
)
def test_three_kills_change_nothing(loop: str, ranks: int, tmp_path: Path):
    name, *more = loop.split()
    if name != "plain" and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    script = LOOPS / f"{name}_run.py"
    for folder in ("straight", "killed"):
        (tmp_path / folder).mkdir()

    straight = _ends(processes.run(script, tmp_path / "straight", "reset", *more, ranks=ranks))
    killed = _ends(processes.run_with_kills(script, tmp_path / "killed", "reset", *more, lines=LINES, ranks=ranks))

    assert killed == straight
    assert {event for _, _, event, _, _ in straight[0]["trace"]} == {"compress", "hold", "reset"}
