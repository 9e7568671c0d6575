"""Hugging Face's Trainer, killed and resumed: nothing changes; and what cannot be resumed is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from processes import Job, preload, run, run_with_kills

from regimewrap import RegimePolicy
from regimewrap.errors import StateError, WrapError

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers_run as example
from regimewrap.integrations.transformers import RegimeCallback, RegimeTrainerMixin, last_checkpoint
from transformers import PrinterCallback, Trainer, TrainerCallback

SCRIPT = Path(__file__).with_name("transformers_run.py")
preload("transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "accelerate")


class RegimeTrainer(RegimeTrainerMixin, Trainer):
    pass


def _result(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"result-{rank}.json").read_text())


@pytest.mark.parametrize("adapter", ["mixin", "callback"])
def test_three_kills_and_resumes_change_neither_weights_nor_ratios(adapter: str, tmp_path: Path):
    # Neither decisions nor the logs that are asked for fall on the saves; an epoch has 8 updates of 2 batches.
    options = json.dumps({"adapter": adapter, "args": {"gradient_accumulation_steps": 2}})
    run(SCRIPT, tmp_path / "straight", options)
    run_with_kills(SCRIPT, tmp_path / "killed", options, lines=60)

    straight, killed = _result(tmp_path / "straight"), _result(tmp_path / "killed")

    assert len(straight["trace"]) == 15
    assert {event for _, _, event, _ in straight["trace"]} == {"compress", "hold", "reset"}
    if adapter == "mixin":  # the trainer forgets at a resume what the updates since its last log lost
        del straight["logs"], killed["logs"]
    assert killed == straight


def test_ranks_resume_exactly_from_the_one_state_that_rank_0_saves(tmp_path: Path):
    options = json.dumps({"steps": 26, "model": "mlp"})  # saved at 7, 14, 21: between two decisions
    run(SCRIPT, tmp_path / "straight", options, ranks=2)
    with Job(SCRIPT, tmp_path / "killed", options, ranks=2) as job:
        job.wait_for_lines(16)
    assert not list((tmp_path / "killed").glob("result*"))
    run(SCRIPT, tmp_path / "killed", options, ranks=2)

    for rank in range(2):
        straight, killed = _result(tmp_path / "straight", rank), _result(tmp_path / "killed", rank)
        assert [killed[name] for name in ("trace", "weights", "state")] == [
            straight[name] for name in ("trace", "weights", "state")
        ]


# The rest needs no kills.


def _trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, **changes: Any) -> Trainer:
    trainer = Trainer(
        model=model or example.model_of("mlp"),
        args=example.arguments(folder, **{"max_steps": 8, "save_steps": 6, **changes}),
        train_dataset=example.tokens(),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _files(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint after 6 updates."""
    _trainer(tmp_path, RegimeCallback(example.policy("ema-reset"))).train()
    return tmp_path / "checkpoint-6"


def test_a_checkpoint_made_without_the_callback_resumes_into_a_new_cycle(tmp_path: Path):
    _trainer(tmp_path).train()
    callback = RegimeCallback(example.policy("ema-reset"))

    _trainer(tmp_path, callback, max_steps=12).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))

    assert callback.cycler.updates == 6
    kept = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert kept["stateful_callbacks"]["RegimeCallback"]["attributes"]["regime"]["updates"] == 6


@pytest.mark.parametrize("mixin", [False, True])
def test_the_trainers_own_way_to_restore_callbacks_resumes_too(mixin: bool, checkpoint: Path):
    straight = RegimeCallback(example.policy("ema-reset"))
    _trainer(checkpoint.parent / "straight", straight).train()
    trainer = (RegimeTrainer if mixin else Trainer)(
        model=example.model_of("mlp"),
        args=example.arguments(checkpoint.parent, max_steps=8, restore_callback_states_from_checkpoint=True),
        train_dataset=example.tokens(),
        callbacks=[RegimeCallback(example.policy("ema-reset"))],
    )

    trainer.train(resume_from_checkpoint=str(checkpoint))

    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, RegimeCallback))
    assert callback.cycler.updates == 8
    if mixin:
        assert trainer.regime is callback
    else:
        assert callback.cycler.history == straight.cycler.history


def test_each_call_of_train_begins_a_new_cycle(tmp_path: Path):
    callback = RegimeCallback(example.policy("ema-reset"))
    trainer = _trainer(tmp_path, callback)
    trainer.train()
    first = callback.cycler
    trainer.train()

    assert (first.updates, callback.cycler.updates) == (8, 8)
    assert callback.cycler is not first


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", 3, "the state has version 3; this regimewrap reads versions 1 and 2"),
        ("sites", ["layers.7"], r"gates 1 activations \(layers.7\); this one gates 1 activations \(layers.1\)"),
        ("updates", "six", "damaged: updates"),
        ("policy", None, "expected a state from RegimeCycler.state_dict"),
        (None, None, "damaged"),
        (None, {"args": {}, "attributes": {}}, "damaged: expected attributes with a regime"),
        (None, "text", "damaged: expected attributes with a regime"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_the_files_stay(
    name: str | None, value: Any, message: str, checkpoint: Path
):
    path = checkpoint / "trainer_state.json"
    content = json.loads(path.read_text())
    if name is None:
        content["stateful_callbacks"]["RegimeCallback"] = value
    elif value is None:
        del content["stateful_callbacks"]["RegimeCallback"]["attributes"]["regime"][name]
    else:
        content["stateful_callbacks"]["RegimeCallback"]["attributes"]["regime"][name] = value
    path.write_text(json.dumps(content))
    before = _files(checkpoint.parent)
    trainer = _trainer(checkpoint.parent, RegimeCallback(example.policy("ema-reset")))

    if name is None and value is None:
        trainer.train(resume_from_checkpoint=str(checkpoint))  # as if made without the callback
        return
    with pytest.raises(StateError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert _files(checkpoint.parent) == before


def test_a_state_of_another_policy_is_refused_with_both_sides_shown(checkpoint: Path):
    other = example.policy("ema-reset").replace(gate={"score": "value"}, cycle={"every": 5})
    trainer = _trainer(checkpoint.parent, RegimeCallback(other))

    with pytest.raises(StateError) as refusal:
        trainer.train(resume_from_checkpoint=str(checkpoint))

    assert "gate.score is 'magnitude' in the state and 'value' here" in str(refusal.value)
    assert "cycle.every is 4 in the state and 5 here" in str(refusal.value)


def test_a_truncated_checkpoint_is_refused_and_passed_over_in_the_search_for_one(checkpoint: Path):
    path = checkpoint.parent / "checkpoint-8" / "trainer_state.json"
    path.write_text(path.read_text()[:200])
    (checkpoint.parent / "checkpoint-10").mkdir()
    (checkpoint.parent / "checkpoint-best").mkdir()
    before = _files(checkpoint.parent)

    assert last_checkpoint(checkpoint.parent) == str(checkpoint)
    with pytest.raises(ValueError, match=r"Unterminated|delimiter|Expecting"):
        _trainer(checkpoint.parent, RegimeCallback(RegimePolicy())).train(resume_from_checkpoint=str(path.parent))
    assert _files(checkpoint.parent) == before
    assert last_checkpoint(checkpoint.parent / "nothing") is None


def test_two_callbacks_are_one_too_many(tmp_path: Path):
    trainer = _trainer(tmp_path, *(RegimeCallback(example.policy("ema-reset")) for _ in range(2)))

    with pytest.raises(WrapError, match=re.escape("the trainer has 2 callbacks RegimeCallback")):
        trainer.train()
