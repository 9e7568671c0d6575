from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from regimewrap.errors import DataError, PolicyError
from regimewrap.recipes.study.arms import ARMS, trial
from regimewrap.recipes.study.spec import FIRST_TRIAL_SEED, Study, load_study, pick

from .conftest import TINY

TRAINING = {"steps": 1, "batch_size": 1, "lr": 0.1}
SPECS = Path(__file__).parents[3] / "docs" / "evidence" / "specs"


def spec(tmp_path, **changes) -> str:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": ["dense", "sawtoth"]}, "Did you mean 'sawtooth'?"),
        ({"arms": ["mixed"]}, "dense must be among the arms"),
        ({"arms": ["dense", "dense"]}, "named twice"),
        ({"seds": 3}, "seds is not a setting; got 3. Did you mean 'seeds'?"),
        ({"budgets": [0.5, 0.1]}, "budgets must start with 1 and fall"),
        ({"tasks": {}}, "tasks should have at least 1 item; got {}."),
        ({"budgets": []}, "budgets should have at least 1 item"),
        ({"arms": "dense"}, "arms should be a list; got 'dense'"),
        (
            {"tasks": {"a": {"kind": "images", "data": "digits", "arch": "wrn-11-1", "training": TRAINING}}},
            "Nearest: 10",
        ),
        ({"tasks": {"a": {"kind": "mnist2d"}}}, "Did you mean 'mnist1d'?"),
        ({"tasks": {"a": {"kind": "mnist1d", "training": {"steps": 0}}}}, "tasks.a.training.steps should be"),
        ({"tasks": {"a/b": TINY["tasks"]["text"]}}, "a/b"),
        ({"arms": ["dense", "l1"], "tasks": {"a": {**TINY["tasks"]["text"], "activation": "gelu"}}}, "l1 needs"),
    ],
)
def test_each_mistake_is_named_with_the_file(tmp_path, changes, said):
    with pytest.raises(PolicyError) as caught:
        load_study(spec(tmp_path, **changes))
    assert said in str(caught.value)
    assert all(line.startswith(str(tmp_path)) for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("- 1", "a study is a mapping"),
        ("", "a mapping"),
        ("seeds: 1\nseeds: 2", "'seeds' stands twice in one mapping: merge the two"),
    ],
)
def test_a_file_that_is_no_study_is_said_to_be_none(tmp_path, text, said):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(PolicyError, match=said):
        load_study(str(tmp_path / "spec.yaml"))


def test_a_name_near_a_built_in_study_is_suggested():
    with pytest.raises(DataError, match="Did you mean 'cifar10-paper'"):
        load_study("cifar10-papers")
    with pytest.raises(DataError, match="no study was named"):
        load_study("")


def test_arms_and_tasks_asked_for_must_be_in_the_study():
    assert pick(["a", "b", "c"], "c,a", "arm") == ("a", "c")
    with pytest.raises(PolicyError, match=r"no task was named; the study has a\."):
        pick(["a"], " ,", "task")
    with pytest.raises(PolicyError, match=r"no arm called 'dens'. Did you mean 'dense'\?"):
        pick(["dense"], "dens", "arm")


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_specs_are_valid(path):
    assert load_study(str(path)).name == path.stem


def test_the_paper_s_recipe_has_its_numbers_and_states_its_cost():
    study = load_study("cifar10-paper")
    training = study.tasks["wrn-28-4"].training
    assert (training.steps, training.batch_size, training.lr) == (500 * 390, 128, 0.1)
    assert "H100" in study.cost


def test_final_seeds_never_reach_those_of_trials():
    with pytest.raises(PolicyError, match="seeds should be"):
        Study.model_validate({**TINY, "seeds": FIRST_TRIAL_SEED})


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_gets_other_numbers_in_each_trial_within_its_span(name):
    arm = ARMS[name]
    tried = [trial(arm, 0.1, number) for number in range(8)]
    assert len(set(tried)) == 8
    assert all(0.1 / 4 <= lr <= 0.1 * 4 for lr, _ in tried)
    assert all((knob is None) == (arm.knob is None) for _, knob in tried)
    assert all(arm.knob.low <= knob <= arm.knob.high for _, knob in tried if arm.knob is not None)
    assert [lr for lr, _ in tried] == [trial(ARMS["dense"], 0.1, number)[0] for number in range(8)]
