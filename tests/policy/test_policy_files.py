from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from regimewrap.errors import PolicyError
from regimewrap.policy.policy import PRESETS, CyclePolicy, GatePolicy, RegimePolicy, SitePolicy
from regimewrap.policy.strategies import Constant, EmaReset, Sawtooth

if TYPE_CHECKING:
    from pathlib import Path

ratios = st.floats(0, 1, exclude_min=True)
names = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable())
policies = st.builds(
    RegimePolicy,
    gate=st.builds(
        GatePolicy,
        scope=st.sampled_from(["sample", "position", "batch"]),
        eval_keep_ratio=ratios | st.just("current"),
        channel_dim=st.integers(-4, 4) | st.just("auto"),
    ),
    sites=st.builds(
        SitePolicy,
        include=st.lists(names, max_size=3).map(tuple),
        multipliers=st.dictionaries(names, st.floats(0, 1e9, exclude_min=True), max_size=3),
    ),
    cycle=st.builds(
        CyclePolicy,
        strategy=st.builds(EmaReset, decay=ratios, cooldown=st.integers(0, 9))
        | st.builds(Constant, keep_ratio=ratios)
        | st.builds(Sawtooth, floor=ratios),
        every=st.integers(1, 10**12),
        monitor=names,
    ),
)


@given(policy=policies)
def test_a_policy_survives_yaml_and_json(policy: RegimePolicy):
    assert RegimePolicy.from_yaml(policy.to_yaml()) == policy
    assert RegimePolicy.from_json(policy.to_json()) == policy
    assert hash(RegimePolicy.from_yaml(policy.to_yaml())) == hash(policy)


@pytest.mark.parametrize("name", ["policy.yaml", "policy.yml", "policy.json", "POLICY.JSON"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_policy_survives_a_file(tmp_path: Path, name: str, preset: str):
    path, policy = tmp_path / name, RegimePolicy.preset(preset)

    policy.to_file(path)

    assert RegimePolicy.from_file(str(path)) == policy
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_the_suffix_decides_the_format(tmp_path: Path):
    RegimePolicy().to_file(tmp_path / "policy.json")
    RegimePolicy().to_file(tmp_path / "policy.yaml")

    assert json.loads((tmp_path / "policy.json").read_text()) == yaml.safe_load((tmp_path / "policy.yaml").read_text())


def test_what_a_file_leaves_out_has_its_default(tmp_path: Path):
    path = tmp_path / "policy.yaml"
    path.write_text("\ufeffcycle: {strategy: {kind: spread, floor: 5e-2}}\n", encoding="utf-8")

    assert RegimePolicy.from_file(path) == RegimePolicy()


NO_YAML = [
    ("", "the policy is empty; for one with all defaults write {}"),
    ("# nothing", "the policy is empty"),
    ("- 1", r"a policy is a mapping of settings \(schema_version, gate, sites, cycle\); got \[1\]"),
    ("gate", "a policy is a mapping of settings"),
    ("gate: [", "this is not YAML: line 1, column 8"),
    ("gate: {}\n---\ngate: {}", "this is not YAML: line 2"),
    ("a: !!python/object/apply:os.system [echo]", r"python/object/apply:os.system.*remove the tag"),
    ("!policy {}", "line 1, column 1: could not determine a constructor for the tag '!policy'"),
    ("? [gate]\n: 1", "this YAML cannot be used: line 1"),
    ("gate: 2020-13-45", "this YAML has a value that cannot be read"),
    ("\0", "this is not YAML"),
    ("[" * 3000, "a policy is nested three levels deep at most"),
    ("&a {gate: *a}", "gate.gate is not a setting"),
    ("1: 2", "1: Keys should be strings"),
    ("gate: {scope: postion}", "gate.scope should be .* Did you mean 'position'"),
]
NO_JSON = [
    ("", "this is not JSON: Expecting value"),
    ("{", "this is not JSON"),
    ("null", "the policy is empty"),
    ('{"cycle": {"smoothing": NaN}}', "cycle.smoothing should be a finite number"),
    ("[" * 100_000, "a policy is nested three levels deep at most"),
    ('{"cycle": {"every": ' + "9" * 5000 + "}}", "this is not JSON"),
]
NO_POLICIES = [*(("policy.yaml", *each) for each in NO_YAML), *(("policy.json", *each) for each in NO_JSON)]


@pytest.mark.parametrize(("name", "text", "message"), NO_POLICIES, ids=lambda value: value[:24])
def test_a_file_that_is_no_policy_is_refused_on_one_line_that_names_it(
    tmp_path: Path, name: str, text: str, message: str
):
    path = tmp_path / name
    path.write_text(text)

    with pytest.raises(PolicyError, match=message) as caught:
        RegimePolicy.from_file(path)

    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "policy.yaml",
            "cycle: {every: 64}\nsites: {}\ncycle: {smoothing: 0.5}\n",
            "line 3, column 1: 'cycle' stands twice",
        ),
        ("policy.yaml", "cycle: {every: 64, every: 32}", "'every' stands twice in one mapping: merge the two"),
        ("policy.json", '{"cycle": {"every": 64, "every": 32}}', "'every' stands twice in one mapping: merge the two"),
    ],
)
def test_a_name_that_stands_twice_is_refused_instead_of_dropped(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)

    with pytest.raises(PolicyError, match=message):
        RegimePolicy.from_file(tmp_path / name)


def test_an_alias_bomb_is_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    started = time.perf_counter()

    with pytest.raises(PolicyError, match="a0 is not a setting"):
        RegimePolicy.from_yaml("\n".join(lines))

    assert time.perf_counter() - started < 2


def test_a_bare_star_is_answered_with_quotes():
    with pytest.raises(PolicyError, match=r'Quote a pattern: "\*"'):
        RegimePolicy.from_yaml("sites: {include: [*]}")


def test_a_policy_of_version_1_is_read_as_it_was_meant_and_said_so():
    old = "schema_version: 1\ngate: {scope: position}\ncycle: {every: 64, strategy: {kind: sawtooth}}\n"

    with pytest.warns(UserWarning, match="schema_version 1 and is read as it was meant then"):
        policy = RegimePolicy.from_yaml(old)

    assert policy.cycle == CyclePolicy(strategy=Sawtooth(), every=64, full_share=0, guarded=False)
    assert (policy.schema_version, policy.gate.scope) == (2, "position")
    assert RegimePolicy.from_yaml(policy.to_yaml()) == policy


def test_a_policy_of_version_1_without_a_cycle_meant_loss_reset_as_it_was():
    with pytest.warns(UserWarning, match="schema_version 1"):
        policy = RegimePolicy.from_json('{"schema_version": 1}')

    assert policy.cycle == CyclePolicy(strategy=EmaReset(), full_share=0, guarded=False)


def test_a_policy_of_version_1_with_a_setting_of_version_2_is_refused():
    with pytest.raises(PolicyError, match=r"cycle.full_share is a setting of schema_version 2"):
        RegimePolicy.from_yaml("{schema_version: 1, cycle: {full_share: 0.5}}")


def test_each_problem_of_a_file_names_the_file(tmp_path: Path):
    path = tmp_path / "policy.yaml"
    path.write_text("gat: 1\nsite: 2\n")

    with pytest.raises(PolicyError) as caught:
        RegimePolicy.from_file(path)

    assert [line.split(" ")[:2] for line in str(caught.value).splitlines()] == [
        [f"{path}:", "gat"],
        [f"{path}:", "site"],
    ]


def test_a_path_that_holds_no_text_is_refused(tmp_path: Path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")

    with pytest.raises(PolicyError, match=r"folder.yaml: cannot read a policy file here: Is a directory"):
        RegimePolicy.from_file(tmp_path / "folder.yaml")
    with pytest.raises(PolicyError, match=r"missing.yaml: cannot read a policy file here: No such file"):
        RegimePolicy.from_file(tmp_path / "missing.yaml")
    with pytest.raises(PolicyError, match=r"binary.yaml: expected UTF-8 text"):
        RegimePolicy.from_file(tmp_path / "binary.yaml")
    with pytest.raises(PolicyError, match=r"ends in .yaml, .yml or .json; got '.txt'"):
        RegimePolicy.from_file(tmp_path / "policy.txt")
    with pytest.raises(PolicyError, match="expected a policy as text"):
        RegimePolicy.from_yaml(tmp_path / "policy.yaml")  # type: ignore[arg-type]


def test_a_path_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path: Path):
    (tmp_path / "folder.yaml").mkdir()

    for path, message in (
        (tmp_path / "folder.yaml", "Is a directory"),
        (tmp_path / "missing" / "policy.yaml", "No such file"),
        (tmp_path / "policy", "ends in .yaml"),
    ):
        with pytest.raises(PolicyError, match=message):
            RegimePolicy().to_file(path)

    assert [found.name for found in tmp_path.iterdir()] == ["folder.yaml"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "policy.yaml"
    RegimePolicy.preset("dense").to_file(path)
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )

    with pytest.raises(PolicyError, match="cannot be written: No space left on device"):
        RegimePolicy().to_file(path)

    assert RegimePolicy.from_file(path) == RegimePolicy.preset("dense")
    assert [found.name for found in tmp_path.iterdir()] == ["policy.yaml"]
