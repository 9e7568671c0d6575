from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.errors import StateError
from regimewrap.gate.gate import TopKGate
from regimewrap.policy.policy import CyclePolicy
from regimewrap.policy.strategies import EmaReset

if TYPE_CHECKING:
    from collections.abc import Callable

POLICY = CyclePolicy(strategy=EmaReset(decay=0.5), every=2, guarded=False)


def used_cycler() -> RegimeCycler:
    cycler = RegimeCycler(TopKGate(), POLICY)
    for loss in (1.0, torch.tensor(0.9), 0.8, 5.0, torch.tensor(math.nan)):
        cycler.step(loss)
    return cycler


def test_a_state_is_plain_json_also_with_a_tensor_or_nan_pending():
    state = used_cycler().state_dict()

    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert state["pending"] == [None]


@pytest.mark.parametrize("change", [{"updates": 10**30}, {"updates": 1 << 53}, {"ratio": 0.9}])
def test_a_state_of_the_default_policy_that_was_tampered_with_is_refused_and_changes_nothing(change):
    cycler, state = RegimeCycler(TopKGate()), RegimeCycler(TopKGate()).state_dict()
    state["updates"] = change.get("updates", state["updates"])
    state["state"]["keep_ratio"] = change.get("ratio", state["state"]["keep_ratio"])
    with pytest.raises(StateError, match="damaged"):
        cycler.load_state_dict(state)
    assert (cycler.updates, cycler.keep_ratio) == (0, 1.0)


def test_loading_sets_every_gate():
    cycler, other = RegimeCycler(TopKGate(), POLICY), TopKGate()
    cycler.bind(other)

    cycler.load_state_dict(used_cycler().state_dict())

    assert (
        cycler.keep_ratio == float(cycler._gates[0].keep_ratio) == float(other.keep_ratio) == used_cycler().keep_ratio
    )


def test_a_loaded_state_is_not_shared():
    state, cycler = used_cycler().state_dict(), RegimeCycler(TopKGate(), POLICY)
    before = copy.deepcopy(state)

    cycler.load_state_dict(state)
    with pytest.warns(RuntimeWarning):
        cycler.step(1.0)

    assert state == before


def test_what_was_warned_about_before_is_not_warned_about_again():
    cycler, state = RegimeCycler(TopKGate(), POLICY), used_cycler()
    with pytest.warns(RuntimeWarning):
        state.step(1.0)

    cycler.load_state_dict(state.state_dict())
    cycler.step(math.nan)
    cycler.step(math.nan)

    assert cycler.skipped == 3


def test_a_state_of_another_policy_is_refused_with_both_sides_shown():
    policy = POLICY.replace(every=4, strategy={"decay": 0.25})

    with pytest.raises(StateError, match=r"cycle.strategy.decay is 0.5 in the state and 0.25 here") as caught:
        RegimeCycler(TopKGate(), policy).load_state_dict(used_cycler().state_dict())

    assert "cycle.every is 2 in the state and 4 here" in str(caught.value)


def test_a_state_of_another_version_is_refused_with_both_sides_shown():
    with pytest.raises(StateError, match=r"version 7; this regimewrap reads versions 1 and 2"):
        RegimeCycler(TopKGate(), POLICY).load_state_dict({**used_cycler().state_dict(), "version": 7})


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: Any) -> None:
        for step in path[:-1]:
            state = state[step]
        state[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: Any) -> None:
        for step in path[:-1]:
            state = state[step]
        del state[path[-1]]

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("policy"), "expected a state from RegimeCycler.state_dict"),
        (drop("version"), "expected a state from RegimeCycler.state_dict"),
        (drop("history"), "history: Field required"),
        (drop("history", 1), "5 updates make 2 decisions, its history has 1"),
        (drop("state", "keep_ratio"), "keep_ratio: Field required"),
        (put("extra", value=1), "extra: Unexpected keyword argument"),
        (put("updates", value="5"), "updates: Input should be a valid integer"),
        (put("updates", value=6), "6 updates make 3 decisions"),
        (put("updates", value=4), "0 values wait"),
        (put("pending", value=[]), "1 values wait for the next decision after 5 updates, it has 0"),
        (put("pending", value=[math.nan]), "expected plain JSON types"),
        (put("pending", value=[torch.ones(())]), "expected plain JSON types"),
        (put("state", "keep_ratio", value=0.0), "keep_ratio: Input should be greater than 0"),
        (put("state", "keep_ratio", value=0.3), "its running state is not where its history ends"),
        (put("state", "phase", value="melt"), "phase: Input should be 'dense'"),
        (put("state", "last_raise", value=2), "it counts more than has happened"),
        (put("state", "held", value=3), "it counts more than has happened"),
        (put("state", "first", value=None), "of smoothed, first and best some are missing"),
        (put("history", 0, "step", value=1), "its history is not one decision every 2 updates"),
        (put("history", 0, "event", value="melt"), "history.0.event"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Callable[[Any], None], message: str):
    state, cycler = used_cycler().state_dict(), used_cycler()
    damage(state)
    before = cycler.state_dict()

    with pytest.raises(StateError, match=message):
        cycler.load_state_dict(state)

    assert cycler.state_dict() == before
    assert float(cycler._gates[0].keep_ratio) == cycler.keep_ratio


@pytest.mark.parametrize("state", [None, [], "state", {}, 3])
def test_what_is_not_a_state_is_refused(state: Any):
    with pytest.raises(StateError, match="expected a state from RegimeCycler"):
        used_cycler().load_state_dict(state)
