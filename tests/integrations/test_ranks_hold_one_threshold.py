"""In network scope, ranks with data of their own hold one threshold, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import processes

LOOP = Path(__file__).parent / "loops" / "shared_threshold.py"
UPDATES = 60


def test_two_ranks_hold_one_threshold_from_the_scores_of_both():
    said = processes.run(LOOP, UPDATES, ranks=2)

    first, second = json.loads(said[0].splitlines()[-1])
    assert first["own"] != second["own"]  # their scores differ,
    assert first["thresholds"] == second["thresholds"]
    assert len(set(first["thresholds"])) > UPDATES // 2
    assert first["histogram"] == second["histogram"]
    assert first["ratio"] == second["ratio"]
    assert sum(first["histogram"]["counts"]) == 2 * 64 * 8  # ranks, samples, units
    for rank in (first, second):
        assert rank["reductions"] == UPDATES + rank["decisions"]


def test_a_rank_that_never_steps_is_named_at_the_first_step():
    said = processes.run(LOOP, 1, "absent", ranks=2)
    assert "the end of the step at update 1 failed: rank 1 did not come to it" in said[0]
