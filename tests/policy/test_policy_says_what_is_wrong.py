from __future__ import annotations

import copy
from typing import Any

import pytest

from regimewrap.errors import PolicyError, RegimewrapError
from regimewrap.policy.policy import CyclePolicy, GatePolicy, RegimePolicy, SitePolicy, require_ratio
from regimewrap.policy.strategies import EmaReset

KINDS = "constant, dense, ema-relax, ema-reset, plateau-reset, sawtooth, spread"

MISTAKES = [
    ({"gat": {}}, "gat is not a setting; got {}. Did you mean 'gate'? Settings: schema_version, gate, sites, cycle."),
    (
        {"gate": {"scope": "samples"}},
        "gate.scope should be 'sample', 'position', 'batch' or 'network'; got 'samples'. Did you mean 'sample'?",
    ),
    (
        {"cycle": {"strategy": {"kind": "ema-reset", "decya": 0.9}}},
        "cycle.strategy.decya is not a setting; got 0.9. Did you mean 'decay'? "
        "Settings: kind, decay, tolerance, cooldown, floor.",
    ),
    (
        {"cycle": {"strategy": {"kind": "ema-rest"}}},
        f"cycle.strategy.kind must be one of {KINDS}; got 'ema-rest'. Did you mean 'ema-reset'?",
    ),
    ({"cycle": {"strategy": {"decay": 0.9}}}, f"cycle.strategy.kind is missing; expected one of {KINDS}."),
    (
        {"cycle": {"strategy": "dense"}},
        "cycle.strategy should be a mapping; got 'dense'.",
    ),
    (
        {"cycle": {"strategy": {"kind": "constant"}}},
        "cycle.strategy.keep_ratio is missing.",
    ),
    (
        {"cycle": {"strategy": {"kind": "constant", "keep_ratio": 20}}},
        "cycle.strategy.keep_ratio should be less than or equal to 1; got 20. If you meant 20%, pass keep_ratio=0.2.",
    ),
    (
        {"gate": {"eval_keep_ratio": 50}},
        "gate.eval_keep_ratio should be less than or equal to 1, or should be 'current'; got 50. "
        "If you meant 50%, pass eval_keep_ratio=0.5.",
    ),
    (
        {"gate": {"eval_keep_ratio": "curent"}},
        "gate.eval_keep_ratio should be a valid number, unable to parse string as a number, or should be 'current'; "
        "got 'curent'. Did you mean 'current'?",
    ),
    (
        {"gate": {"eval_keep_ratio": 0.0}},
        "gate.eval_keep_ratio should be greater than 0, or should be 'current'; got 0.0.",
    ),
    (
        {"gate": {"eval_keep_ratio": True}},
        "gate.eval_keep_ratio should be a number, not a boolean, or should be 'current'; got True.",
    ),
    (
        {"gate": {"channel_dim": 1.5}},
        "gate.channel_dim should be 'auto', or should be a valid integer, got a number with a fractional part; "
        "got 1.5.",
    ),
    ({"cycle": {"every": 0}}, "cycle.every should be greater than or equal to 1; got 0."),
    ({"cycle": {"every": True}}, "cycle.every should be a number, not a boolean; got True."),
    (
        {"cycle": {"every": "often"}},
        "cycle.every should be a valid integer, unable to parse string as an integer; got 'often'.",
    ),
    ({"cycle": {"smoothing": 1}}, "cycle.smoothing should be less than 1; got 1."),
    ({"cycle": {"smoothing": float("nan")}}, "cycle.smoothing should be a finite number; got nan."),
    ({"cycle": {"mode": "mini"}}, "cycle.mode should be 'min' or 'max'; got 'mini'. Did you mean 'min'?"),
    ({"cycle": {"monitor": ""}}, "cycle.monitor: String should have at least 1 character; got ''."),
    ({"sites": {"include": "block.*"}}, "sites.include should be a list; got 'block.*'."),
    ({"sites": {"kinds": ["relu", 3]}}, "sites.kinds.1 should be a valid string; got 3."),
    ({"sites": {"multipliers": {"stem": -1}}}, "sites.multipliers.stem should be greater than 0; got -1."),
    ({"sites": {"multipliers": {"": 1}}}, "sites.multipliers.[key]: String should have at least 1 character; got ''."),
    ({"sites": 3}, "sites should be a mapping; got 3."),
    ({"schema_version": 3}, "schema_version: expected 2, or 1, which is migrated; got 3."),
    ({"cycle": {"full_share": 1}}, "cycle.full_share should be less than 1; got 1."),
    ({"cycle": {"full_share": -0.1}}, "cycle.full_share should be greater than or equal to 0; got -0.1."),
    ({"cycle": {"scaled_to": 0}}, "cycle.scaled_to should be null, 'run' or a whole number ≥ 1; got 0."),
    ({"cycle": {"scaled_to": "Run"}}, "cycle.scaled_to should be null, 'run' or a whole number ≥ 1; got 'Run'."),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_one_line_with_path_value_expectation_and_remedy(settings: dict[str, Any], message: str):
    for build in (lambda: RegimePolicy(**settings), lambda: RegimePolicy.model_validate(settings)):
        with pytest.raises(PolicyError) as caught:
            build()

        assert str(caught.value) == message
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_each_problem_has_its_line():
    with pytest.raises(PolicyError) as caught:
        RegimePolicy(gate={"scope": "x", "score": "y"}, cycle={"every": -1})

    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "gate.scope",
        "gate.score",
        "cycle.every",
    ]


def test_a_part_names_its_own_settings():
    with pytest.raises(PolicyError, match=r"^scope should be"):
        GatePolicy(scope="x")
    with pytest.raises(PolicyError, match=r"^strategy.decay should be"):
        CyclePolicy(strategy={"kind": "ema-reset", "decay": 2})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gate": {"score": "value"}}, r"^gate: score must be 'magnitude' with scope='network'; got 'value'"),
        ({"gate": {"ties": "exact"}}, r"^gate: ties must be 'keep' with scope='network'; got 'exact'"),
        ({"sites": {"multipliers": {"*": 2.0}}}, r"^sites.multipliers must be empty with gate.scope='network'.*2.0"),
    ],
)
def test_network_scope_refuses_what_one_threshold_cannot_do(wrong: dict[str, Any], message: str):
    with pytest.raises(PolicyError, match=message):
        RegimePolicy(gate={"scope": "network", **wrong.get("gate", {})}, sites=wrong.get("sites", {}))
    with pytest.raises(PolicyError, match=message):
        RegimePolicy().replace(**wrong).replace(gate={"scope": "network"})


def test_long_values_are_cut_short():
    with pytest.raises(PolicyError) as caught:
        RegimePolicy(gate="x" * 10_000)

    assert len(str(caught.value)) < 300


def test_policy_errors_are_value_errors_of_ours():
    assert issubclass(PolicyError, ValueError)
    assert issubclass(PolicyError, RegimewrapError)


@pytest.mark.parametrize(
    "build",
    [
        lambda: RegimePolicy.model_validate(3),
        lambda: RegimePolicy.model_validate_json('{"gate": 3}'),
        lambda: RegimePolicy.model_validate_json("{"),
        lambda: RegimePolicy.model_validate_strings({"gate": "3"}),
        lambda: RegimePolicy({"gate": {}}),
        lambda: RegimePolicy().replace(gat={}),
        lambda: RegimePolicy().replace(gate=3),
        lambda: RegimePolicy().model_copy(update={"bogus": 1}),
        lambda: RegimePolicy().model_copy(update={"gate": {"scope": "bogus"}}),
        lambda: setattr(RegimePolicy(), "gate", GatePolicy()),
        lambda: setattr(RegimePolicy(), "bogus", 1),
        lambda: delattr(RegimePolicy(), "gate"),
    ],
)
def test_every_way_to_a_wrong_policy_ends_in_a_policy_error(build: Any):
    with pytest.raises(PolicyError):
        build()


def test_numbers_may_come_as_text_as_yaml_gives_them():
    assert CyclePolicy(strategy={"kind": "ema-reset", "floor": "1e-3"}).strategy == EmaReset(floor=0.001)
    assert GatePolicy(eval_keep_ratio="0.5").eval_keep_ratio == 0.5


def test_replace_checks_changes_parts_and_leaves_the_original():
    policy = RegimePolicy(gate=GatePolicy(scope="position", ties="exact"))
    before = copy.deepcopy(policy)

    changed = policy.replace(gate={"scope": "batch"}, cycle=CyclePolicy(every=5), sites={"exclude": ["head.*"]})

    assert changed.gate == GatePolicy(scope="batch", ties="exact")
    assert changed.cycle == CyclePolicy(every=5)
    assert changed.sites == SitePolicy(exclude=("head.*",))
    assert policy == before


def test_replace_with_another_kind_of_strategy_starts_from_its_defaults():
    cycle = CyclePolicy(strategy=EmaReset(decay=0.5, tolerance=0.3), every=7)

    assert cycle.replace(strategy={"decay": 0.6}).strategy == EmaReset(decay=0.6, tolerance=0.3)
    assert cycle.replace(strategy={"kind": "ema-reset", "decay": 0.6}).strategy == EmaReset(decay=0.6, tolerance=0.3)
    assert cycle.replace(strategy={"kind": "ema-relax"}).strategy.tolerance == 0.01


def test_equal_policies_hash_alike():
    one, two = ({"a": 1.0, "b": 2.0}, {"b": 2, "a": 1})

    assert RegimePolicy(sites={"multipliers": one}) == RegimePolicy(sites={"multipliers": two})
    assert hash(RegimePolicy(sites={"multipliers": one})) == hash(RegimePolicy(sites={"multipliers": two}))
    assert len({RegimePolicy(), RegimePolicy(), RegimePolicy.preset("dense")}) == 2


def test_the_schema_forbids_unknown_names_and_lists_the_strategies():
    schema = RegimePolicy.json_schema()

    assert all(part["additionalProperties"] is False for part in [schema, *schema["$defs"].values()])
    assert (
        ", ".join(sorted(schema["$defs"]["CyclePolicy"]["properties"]["strategy"]["discriminator"]["mapping"])) == KINDS
    )


@pytest.mark.parametrize("ratio", [1, 1.0, 0.5, 5e-324])
def test_a_ratio_in_range_is_returned_as_a_float(ratio: float):
    assert require_ratio("keep_ratio", ratio) == ratio
    assert type(require_ratio("keep_ratio", ratio)) is float


@pytest.mark.parametrize("value", [0, -0.0, 1.0000001, float("nan"), float("inf"), True, "0.5", None, [0.5], 10**400])
def test_what_is_no_ratio_is_refused(value: Any):
    with pytest.raises(PolicyError, match=r"keep_ratio must be a fraction in \(0, 1\]; got"):
        require_ratio("keep_ratio", value)


def test_a_percentage_gets_a_hint():
    with pytest.raises(PolicyError, match=r"got 20\. If you meant 20%, pass keep_ratio=0\.2\."):
        require_ratio("keep_ratio", 20)


def test_completion_shows_our_names_and_not_pydantics():
    names = [name for name in dir(RegimePolicy()) if not name.startswith("_")]
    assert {"gate", "sites", "cycle", "replace", "preset", "to_file"} <= set(names)
    assert not [name for name in names if name.startswith(("model_", "parse_"))]
