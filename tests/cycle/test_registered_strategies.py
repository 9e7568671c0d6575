from __future__ import annotations

from typing import Any, Literal, final

import pytest

from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.errors import PolicyError
from regimewrap.gate.gate import TopKGate
from regimewrap.policy import strategies
from regimewrap.policy.policy import CyclePolicy, RegimePolicy
from regimewrap.policy.settings import Ratio
from regimewrap.policy.strategies import EmaReset, Move, Situation, Strategy, register


@final
class HalveUntil(Strategy):
    kind: Literal["halve-until"] = "halve-until"
    floor: Ratio = 0.1

    def next_move(self, now: Situation) -> Move:
        lower = now.keep_ratio / 2
        return Move(lower, "compress") if lower >= self.floor else Move(1.0, "reset")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategies, "_KINDS", dict(strategies._KINDS))
    yield
    strategies._union.cache_clear()


def test_a_users_strategy_goes_through_yaml_and_drives_the_cycler():
    assert register(HalveUntil) is HalveUntil
    policy = RegimePolicy(cycle=CyclePolicy(strategy=HalveUntil(floor=0.2), every=1))

    again = RegimePolicy.from_yaml(policy.to_yaml())
    cycler = RegimeCycler(TopKGate(), again)

    assert again == policy
    assert [cycler.step(1.0).keep_ratio for _ in range(5)] == [0.5, 0.25, 1.0, 0.5, 0.25]


def test_its_mistakes_are_explained_like_those_of_the_built_in_ones():
    register(HalveUntil)

    with pytest.raises(PolicyError, match=r"cycle.strategy.flor is not a setting; got 0.2. Did you mean 'floor'\?"):
        RegimePolicy(cycle={"strategy": {"kind": "halve-until", "flor": 0.2}})
    with pytest.raises(PolicyError, match=r"Did you mean 'halve-until'\?"):
        RegimePolicy(cycle={"strategy": {"kind": "halve_until"}})
    assert (
        "halve-until"
        in RegimePolicy.json_schema()["$defs"]["CyclePolicy"]["properties"]["strategy"]["discriminator"]["mapping"]
    )


def test_one_that_is_not_registered_is_refused():
    with pytest.raises(PolicyError, match=r"got 'halve-until'\. Register its class first"):
        CyclePolicy(strategy=HalveUntil())


def test_registering_twice_is_no_mistake():
    register(register(HalveUntil))


def hold(_: Strategy, now: Situation) -> Move:
    return Move(now.keep_ratio, "hold")


def mistaken(**body: Any) -> type:
    return final(type("Mistaken", (Strategy,), {"next_move": hold, **body}))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (3, "expects a subclass of Strategy; got 3"),
        (int, "expects a subclass of Strategy"),
        (EmaReset(), "expects a subclass of Strategy"),
        (Strategy, "must define next_move and be marked @final"),
        (
            type("Open", (Strategy,), {"next_move": hold}),
            "must define next_move and be marked @final",
        ),
        (mistaken(), "needs a name of its own"),
        (mistaken(__annotations__={"kind": str}, kind="x"), "needs a name of its own"),
        (
            mistaken(__annotations__={"kind": Literal["dense"]}, kind="dense"),
            "kind 'dense', which Dense has already; choose another",
        ),
        (
            mistaken(
                __annotations__={"kind": Literal["x"], "f": type(len)},
                kind="x",
                model_config={"arbitrary_types_allowed": True},
            ),
            "has a setting that cannot be written to a file",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused(cls: Any, message: str):
    known = strategies.kinds()

    with pytest.raises(PolicyError, match=message):
        register(cls)

    assert strategies.kinds() == known


@pytest.mark.parametrize(
    "move", [Move(0.0, "compress"), Move(1.5, "reset"), Move(float("nan"), "hold"), Move(1.0, "melt"), 0.5, None]
)
def test_a_rule_that_answers_nonsense_is_caught_and_changes_nothing(move: Any):
    @register
    @final
    class Nonsense(Strategy):
        kind: Literal["nonsense"] = "nonsense"

        def next_move(self, now: Situation) -> Move:  # noqa: ARG002
            return move

    cycler = RegimeCycler(TopKGate(), CyclePolicy(strategy=Nonsense(), every=1))
    before = cycler.state_dict()

    with pytest.raises(PolicyError, match="strategy 'nonsense' must"):
        cycler.step(1.0)

    assert cycler.state_dict() == before
