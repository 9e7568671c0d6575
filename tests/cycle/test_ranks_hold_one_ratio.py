from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import PRESETS, CyclePolicy
from regimewrap.policy.strategies import EmaReset

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")

RANK = """
import json, math, sys, warnings
import torch, torch.distributed as dist
from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.errors import SignalError
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import CyclePolicy
from regimewrap.policy.strategies import EmaReset, Sawtooth

rank, meeting = int(sys.argv[1]), sys.argv[2]
warnings.simplefilter("ignore")
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
out = {}

policy = CyclePolicy(strategy=EmaReset(decay=0.9, tolerance=0.1, cooldown=1), every=3)
cycler = RegimeCycler(TopKGate(), policy)
for step in range(300):
    loss = 2 + math.sin(0.1 * step + rank) + 0.3 * rank
    if rank == 1 and step % 7 == 0 or 90 <= step < 96 or rank == 0 and 120 <= step < 130:
        loss = math.nan
    cycler.step(torch.tensor(loss, dtype=torch.float64))
out["trace"] = [[d.keep_ratio.hex(), d.signal, d.event, d.cycle] for d in cycler.history]
out["skipped"] = cycler.skipped
state = cycler.state_dict()
out["state"] = {key: value for key, value in state["state"].items() if key != "skipped"}

calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        return function(*args, **kwargs)
    return call
dist.all_reduce, dist.broadcast = counted(dist.all_reduce), counted(dist.broadcast)
for step in range(6):
    cycler.step(1.0)
out["collectives"] = calls
loop = RegimeCycler(TopKGate(), CyclePolicy(strategy=Sawtooth(), every=1))
loop.step()
out["collectives_open_loop"] = calls - out["collectives"]

strict = RegimeCycler(TopKGate(), policy.replace(on_nonfinite="raise"))
before = strict.step(1.0)
strict.step(math.nan if rank else 1.0)
try:
    strict.step(1.0)
except SignalError as error:
    out["refusal"] = str(error)
out["updates"] = strict.updates
strict.step(1.0)
out["after refusal"] = strict.history[0].signal

uneven = RegimeCycler(TopKGate(), policy.replace(every=4))
for value in (1.0, 2.0, 3.0) if rank == 0 else (3.0, 4.0, math.nan):
    uneven.step(value)
out["all ranks"] = uneven.state_dict(all_ranks=True)

from regimewrap.policy.policy import PRESETS
out["presets"] = {}
for name in PRESETS:
    cycler = RegimeCycler(TopKGate(), name, total_steps=200)
    for step in range(120):
        cycler.step(2 + math.sin(0.3 * step + rank), accuracy=0.5 + 0.4 * math.sin(0.3 * step + rank))
    cycler.check_sync()
    out["presets"][name] = [cycler.keep_ratio.hex(), cycler.state_dict()["state"]]

from torch.distributed.distributed_c10d import _get_default_store
before = _get_default_store().num_keys()
for step in range(60):
    cycler.check_sync()
dist.barrier()
out["keys"] = _get_default_store().num_keys() - before
print(json.dumps(out))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    meeting: Path = tmp_path_factory.mktemp("ranks") / "meeting"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(meeting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [json.loads(out) if out else pytest.fail(err) for out, err in answers]


def test_ranks_with_other_losses_and_nans_hold_the_same_ratios_bit_for_bit(ranks: list[dict[str, Any]]):
    assert ranks[0]["trace"] == ranks[1]["trace"]
    assert {event for _, _, event, _ in ranks[0]["trace"]} == {"compress", "hold", "reset"}
    assert ranks[0]["skipped"] != ranks[1]["skipped"]


def test_right_after_a_decision_the_ranks_states_are_the_same(ranks: list[dict[str, Any]]):
    assert ranks[0]["state"] == ranks[1]["state"]


def test_a_window_without_a_finite_value_on_any_rank_holds(ranks: list[dict[str, Any]]):
    before, first, second = ranks[0]["trace"][29:32]

    assert before[1] is not None
    assert (first[1:3], second[1:3]) == ([None, "hold"], [None, "hold"])


def test_the_first_signal_is_the_mean_over_ranks(ranks: list[dict[str, Any]]):
    alone = []
    for rank, steps in ((0, [0, 1, 2]), (1, [1, 2])):  # rank 1's first loss is NaN
        cycler = RegimeCycler(TopKGate(), CyclePolicy(strategy=EmaReset(), every=len(steps)))
        for step in steps:
            cycler.step(2 + math.sin(0.1 * step + rank) + 0.3 * rank)
        alone.append(cycler.history[0].signal)

    assert ranks[0]["trace"][0][1] == pytest.approx(sum(alone) / 2)


def test_a_decision_takes_one_reduction_and_one_broadcast_and_nothing_happens_in_between(ranks: list[dict[str, Any]]):
    assert [rank["collectives"] for rank in ranks] == [4, 4]  # two decisions
    assert [rank["collectives_open_loop"] for rank in ranks] == [0, 0]


def test_what_one_rank_refuses_raises_on_all_and_changes_none(ranks: list[dict[str, Any]]):
    assert ranks[1]["refusal"] == "loss was nan at update 2; expected a finite number."
    assert ranks[0]["refusal"] == "another rank refused its loss at update 3 or before."
    assert [rank["updates"] for rank in ranks] == [2, 2]


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_the_same_on_all_ranks_bit_for_bit(ranks: list[dict[str, Any]], name: str):
    one, other = (rank["presets"][name] for rank in ranks)
    assert one == other


def test_the_steps_after_a_refusal_work_on_all_ranks(ranks: list[dict[str, Any]]):
    assert [rank["after refusal"] for rank in ranks] == [1.0, 1.0]


def test_a_mean_over_ranks_is_over_those_that_have_a_value(ranks: list[dict[str, Any]]):
    only_rank_1 = [row[1] for row in ranks[0]["trace"][40:43]]  # rank 0 had nothing but NaN from 120 to 129

    assert all(1.9 < signal < 4 for signal in only_rank_1)


def test_another_number_of_ranks_goes_on_with_the_mean_of_what_all_had(ranks: list[dict[str, Any]]):
    state = ranks[0]["all ranks"]
    assert state == ranks[1]["all ranks"] | {"pending": state["pending"], "state": state["state"]}
    alone = RegimeCycler(TopKGate(), CyclePolicy(strategy=EmaReset(decay=0.9, tolerance=0.1, cooldown=1), every=4))

    alone.load_state_dict(state)

    assert alone.state_dict()["pending"] == [2.0, 3.0, 3.0]


def test_meetings_leave_no_keys_in_the_store(ranks: list[dict[str, Any]]):
    assert max(rank["keys"] for rank in ranks) <= 3
