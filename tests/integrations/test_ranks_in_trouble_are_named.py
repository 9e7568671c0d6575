"""What becomes of the other ranks when one of them is late, dead, stuck or elsewhere: one ratio, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import torch.distributed as dist
from tiny import POLICY, wrapped

from regimewrap import RegimeCycler, RegimePolicy, TopKGate
from regimewrap.errors import StateError

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
LOOP = Path(__file__).parent / "loops" / "trouble.py"
RANKS = 3
ADVICE = "Each rank must call RegimeCycler.step once per optimizer update; look into the log of that rank."


def _last_lines(job: processes.Job, ranks: int) -> list[dict[str, Any]]:
    return [json.loads(job.said(rank).splitlines()[-1]) for rank in range(ranks)]


def _ends(trouble: str, *args: str) -> list[dict[str, Any]]:
    with processes.Job(LOOP, trouble, *args, ranks=RANKS) as job:
        job.succeed()
        return _last_lines(job, RANKS)


def _ends_of_the_others(trouble: str) -> list[dict[str, Any]]:
    with processes.Job(LOOP, trouble, ranks=RANKS) as job:
        for process in job.processes[:-1]:
            process.join(60)
        return _last_lines(job, RANKS - 1)


def test_a_rank_that_comes_late_is_waited_for():
    ends = _ends("comes late")

    assert ends[0]["trace"]
    assert ends[0]["trace"] == ends[1]["trace"] == ends[2]["trace"]


def test_a_rank_that_dies_is_named_and_the_others_do_not_hang():
    for end in _ends_of_the_others("dies"):
        absence = "rank 2 did not come to it within 2.7 s, last seen at the decision at update 5"
        assert end["error"] == f"the decision at update 10 failed: {absence}. {ADVICE}"
        assert end["updates"] == 9


def test_a_rank_that_does_not_come_before_the_timeout_is_named():
    for end in _ends_of_the_others("is stuck"):
        assert "the decision at update 10 failed: rank 2 did not come to it" in end["error"]
        assert end["seconds"] < 15  # the process group's timeout is 3


def test_a_rank_that_trains_on_and_does_not_step_is_named():
    for end in _ends_of_the_others("does not step"):
        assert "the decision at update 5 failed: rank 2 did not come to it within 2.7 s" in end["error"]


def test_a_rank_that_does_not_come_to_check_sync_is_named():
    for end in _ends_of_the_others("does not check"):
        assert (
            "check_sync at update 0 failed: rank 2 did not come to it within 2.7 s, last seen nowhere" in end["error"]
        )


@pytest.mark.parametrize(
    ("trouble", "difference"),
    [
        ("another policy", "ranks 0, 1: cycle.strategy.decay 0.9; rank 2: cycle.strategy.decay 0.5."),
        ("another model", "ranks 0, 1: sites ['1']; rank 2: sites ['forward.relu']."),
    ],
)
def test_check_sync_says_which_rank_differs_in_what(trouble: str, difference: str):
    for end in _ends(trouble):
        assert end["error"].startswith(f"the ranks differ: {difference} Build model and cycler alike on all ranks")


def test_a_rank_that_alone_loaded_a_checkpoint_is_found_at_the_first_decision():
    cycler = RegimeCycler(wrapped())
    for _ in range(5):
        cycler.step(1.0)
    for end in _ends("loads alone", json.dumps(cycler.state_dict())):
        assert "ranks 0, 1: update 4, keep ratio 1.0, phase dense" in end["error"]
        assert "rank 2: update 9, keep ratio 0.9, phase compress" in end["error"]


def test_a_state_of_many_ranks_serves_another_number_of_them():
    cycler = RegimeCycler(TopKGate(POLICY))
    for loss in (3.0, 2.0):
        cycler.step(loss)
    state = cycler.state_dict()
    shares = [{"pending": [3.0, None], "skipped": 1}, {"pending": [1.0, 2.0], "skipped": 0}]

    cycler.load_state_dict({**state, "ranks": shares})

    assert cycler.state_dict()["pending"] == [2.0, 2.0]
    with pytest.raises(StateError, match="2 values wait for the next decision after 2 updates, it has 1"):
        cycler.load_state_dict({**state, "ranks": [{"pending": [1.0], "skipped": 0}]})
    with pytest.raises(StateError, match="saved by no rank"):
        cycler.load_state_dict({**state, "ranks": []})


def test_check_sync_without_other_ranks_does_nothing():
    RegimeCycler(TopKGate(RegimePolicy())).check_sync()
