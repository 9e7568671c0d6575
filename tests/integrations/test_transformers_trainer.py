"""What Hugging Face's Trainer offers keeps working with the callback, and what it should do happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from regimewrap import RegimePolicy, at_keep_ratio, gate_of, unwrap, wrap
from regimewrap.errors import PolicyError, SignalError, WrapError
from regimewrap.policy.strategies import Sawtooth

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers_run as example
from regimewrap.integrations.transformers import RegimeCallback, RegimeTrainerMixin
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CYCLING = example.policy("ema-reset").replace(
    cycle={"strategy": Sawtooth(decisions=4, floor=0.25), "every": 1, "full_share": 0}
)


class RegimeTrainer(RegimeTrainerMixin, Trainer):
    pass


class Losses(TrainerCallback):
    """Keeps the keep ratio at the beginning and the training loss at the end of each update."""

    def __init__(self) -> None:
        self.keep_ratios: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control
        self.keep_ratios.append(float(gate_of(kwargs["model"]).keep_ratio))


def _trained(folder: Path, policy: RegimePolicy = CYCLING, *, mixin: bool = True, **changes: Any) -> Trainer:
    model = changes.pop("model", None) or example.tiny_model()
    extra = changes.pop("callbacks", [])
    settings = {"max_steps": 6, "save_strategy": "no", "logging_steps": 1, **changes}
    trainer = (RegimeTrainer if mixin else Trainer)(
        model=model,
        args=example.arguments(folder, **settings),
        train_dataset=example.tokens(),
        eval_dataset=example.tokens(8, seed=2),
        callbacks=[RegimeCallback(policy), *extra],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def _logged(trainer: Trainer, name: str) -> list[Any]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_preset_is_scaled_to_the_trainers_run_and_half_of_each_batch_stays_dense(tmp_path: Path):
    policy = RegimePolicy.preset("sawtooth").replace(gate={"scope": "position"})
    trainer = _trained(tmp_path, policy, max_steps=12)

    cycler = trainer.regime.cycler
    assert (cycler.total_steps, cycler.updates) == (12, 12)
    assert cycler.policy == RegimePolicy.preset("sawtooth", total_steps=12).cycle
    densities = zip(_logged(trainer, "density"), [1.0, *_logged(trainer, "keep_ratio")], strict=False)
    for density, ratio in densities:
        assert density == pytest.approx((1 + int(32 * ratio) / 32) / 2, abs=0.02)


def test_a_policy_that_was_scaled_by_hand_stays_as_it_is(tmp_path: Path):
    policy = RegimePolicy.preset("sawtooth", total_steps=24).replace(gate={"scope": "position"})
    assert _trained(tmp_path, policy, max_steps=4).regime.cycler.policy == policy.cycle


@pytest.mark.parametrize("adapter", ["mixin", "callback"])
def test_with_the_policy_dense_losses_and_weights_are_those_of_a_run_without_the_adapter(adapter: str, tmp_path: Path):
    results = []
    for name in (None, adapter):
        folder = tmp_path / str(name)
        example.main(folder, {"adapter": name, "strategy": "dense", "steps": 12, "args": {"logging_steps": 1}})
        results.append(json.loads((folder / "result-0.json").read_text()))
    without, attached = results

    assert [entry["loss"] for entry in attached["logs"]] == [entry["loss"] for entry in without["logs"]]
    assert attached["weights"] == without["weights"]
    assert attached["trace"]


def test_gating_changes_the_losses(tmp_path: Path):
    dense = _trained(tmp_path, example.policy("dense"))
    assert _logged(_trained(tmp_path), "loss")[2:] != _logged(dense, "loss")[2:]


def test_the_ratio_changes_between_updates_only_and_the_logs_tell_it(tmp_path: Path):
    seen = Losses()
    trainer = _trained(tmp_path, gradient_accumulation_steps=2, callbacks=[seen])

    after = [each.keep_ratio for each in trainer.regime.cycler.history]
    assert seen.keep_ratios == [1.0, *after[:-1]]
    assert _logged(trainer, "keep_ratio") == after
    assert len(set(after)) > 2
    assert set(_logged(trainer, "phase")) == {1, 2}
    assert _logged(trainer, "cycle") == [each.cycle for each in trainer.regime.cycler.history]
    # GELU's outputs are not zero, so what is left is the share that the gate keeps: of 32 units at each position.
    assert _logged(trainer, "density") == pytest.approx([int(32 * ratio) / 32 for ratio in seen.keep_ratios])


@pytest.mark.parametrize("mixin", [True, False])
def test_the_loss_that_steers_is_the_one_the_trainer_logs(mixin: bool, tmp_path: Path):
    # 16 batches of 4 are 6 updates of 3 batches, the last of which has one.
    policy = example.policy("ema-reset").replace(cycle={"every": 1, "smoothing": 0.0})
    trainer = _trained(tmp_path, policy, mixin=mixin, gradient_accumulation_steps=3, max_steps=12)

    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, RegimeCallback))
    assert [each.signal for each in callback.cycler.history] == pytest.approx(_logged(trainer, "loss"))


def test_without_the_mixin_a_log_is_made_at_each_decision_and_each_save(tmp_path: Path):
    trainer = _trained(
        tmp_path,
        example.policy("ema-reset"),
        mixin=False,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=5,
        max_steps=12,
    )

    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [4, 5, 8, 10, 12]


@pytest.mark.parametrize("mixin", [True, False])
def test_open_loop_policies_need_no_log(mixin: bool, tmp_path: Path):
    none = {"logging_strategy": "no", "logging_steps": 0}
    trainer = _trained(tmp_path, mixin=mixin, save_strategy="steps", save_steps=5, **none)

    assert [entry for entry in trainer.state.log_history if "loss" in entry] == []


def test_reporters_get_ratio_phase_and_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = _trained(tmp_path, report_to=["tensorboard"])

    events = event_accumulator.EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    for name in ("keep_ratio", "phase", "cycle", "density"):
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert written == [(step, pytest.approx(value)) for step, value in enumerate(_logged(trainer, name), 1)]


def test_gradient_checkpointing_changes_nothing(tmp_path: Path):
    plain = _trained(tmp_path)
    checkpointed = _trained(tmp_path, gradient_checkpointing=True)

    assert _same(_weights(plain.model), _weights(checkpointed.model))
    assert _logged(checkpointed, "density") == _logged(plain, "density")


def test_bf16_trains(tmp_path: Path):
    trainer = _trained(tmp_path, bf16=True)

    assert _logged(trainer, "density") == pytest.approx([1.0, *_logged(trainer, "keep_ratio")[:-1]], abs=1 / 32)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


class Compilations(TrainerCallback):
    """Counts the graphs compiled up to the end of each update."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo reads gradients that are not there
def test_a_compiled_run_sees_every_ratio_and_is_compiled_once(tmp_path: Path):
    torch._dynamo.reset()
    small = {"n_layer": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    counted = Compilations()
    eager = _trained(tmp_path, model=example.tiny_model(**small))
    compiled = _trained(
        tmp_path, model=example.tiny_model(**small), torch_compile_backend="aot_eager", callbacks=[counted]
    )

    assert len(set(_logged(eager, "keep_ratio"))) == 4
    assert _logged(compiled, "loss") == pytest.approx(_logged(eager, "loss"), rel=1e-4)
    assert _logged(compiled, "keep_ratio") == _logged(eager, "keep_ratio")
    assert "density" not in compiled.state.log_history[0]
    assert counted.graphs[0] > 0
    assert counted.graphs[-1] == counted.graphs[0]


def test_evaluation_is_dense_unless_the_policy_says_otherwise(tmp_path: Path):
    trainer = _trained(tmp_path, CYCLING.replace(cycle={"strategy": Sawtooth(decisions=8)}))
    dense = trainer.evaluate()["eval_loss"]
    assert trainer.regime.cycler.keep_ratio < 0.5
    unwrap(trainer.model)
    assert trainer.evaluate()["eval_loss"] == dense

    current = _trained(tmp_path, CYCLING.replace(gate={"eval_keep_ratio": "current"}))
    with at_keep_ratio(current.model, 1.0):
        dense = current.evaluate()["eval_loss"]
    assert current.evaluate()["eval_loss"] != dense


def test_the_best_models_ratio_comes_back_with_its_weights(tmp_path: Path):
    trainer = _trained(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.5,  # so that it gets worse
        lr_scheduler_type="constant",
    )

    best = trainer.state.best_global_step
    history = trainer.regime.cycler.history
    assert history[best - 1].keep_ratio != history[-1].keep_ratio
    assert float(gate_of(trainer.model).keep_ratio) == history[best - 1].keep_ratio


def test_generation_with_a_cache_is_generation_without_one(tmp_path: Path):
    model = _trained(tmp_path).model.eval()
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with at_keep_ratio(model, 0.25):
        cached = model.generate(prompt, use_cache=True, **settings)
        uncached = model.generate(prompt, use_cache=False, **settings)

    assert cached.shape == (1, 13)
    assert torch.equal(cached, uncached)


def test_a_saved_model_comes_back_bare_and_is_wrapped_again_with_the_policy_in_its_config(tmp_path: Path):
    model = _trained(tmp_path / "run").model.eval()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    prompt = torch.tensor([[3, 1, 4, 1, 5]])

    assert torch.equal(again(prompt).logits, model(prompt).logits)
    wrap(again, RegimePolicy.model_validate(again.config.regimewrap))
    assert gate_of(again).policy == CYCLING
    with at_keep_ratio(model, 0.2), at_keep_ratio(again, 0.2):
        assert torch.equal(again(prompt).logits, model(prompt).logits)

    more = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    Trainer(model=more, args=example.arguments(tmp_path / "more"), callbacks=[RegimeCallback()])
    assert gate_of(more).policy == CYCLING


def test_lora_adapters_train_and_resume_exactly(tmp_path: Path):
    peft = pytest.importorskip("peft")

    def adapted() -> torch.nn.Module:
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        return peft.get_peft_model(example.tiny_model(), config)

    policy = example.policy("ema-reset")
    straight = _trained(tmp_path / "straight", policy, model=adapted(), max_steps=10)
    _trained(tmp_path / "resumed", policy, model=adapted(), max_steps=10, save_strategy="steps", save_steps=6)
    assert not (tmp_path / "resumed" / "checkpoint-6" / "model.safetensors").exists()
    trainer = RegimeTrainer(
        model=adapted(),
        args=example.arguments(tmp_path / "resumed", max_steps=10),
        train_dataset=example.tokens(),
        callbacks=[RegimeCallback(policy)],
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-6"))

    assert trainer.regime.cycler.history == straight.regime.cycler.history
    assert _same(_weights(trainer.model), _weights(straight.model))
    before = adapted().state_dict()
    changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all("lora" in name for name in changed)


def test_a_model_made_by_model_init_is_wrapped_too(tmp_path: Path):
    trainer = RegimeTrainer(
        model_init=lambda: example.tiny_model(),  # the trainer passes a trial to what takes arguments
        args=example.arguments(tmp_path, max_steps=3, save_strategy="no"),
        train_dataset=example.tokens(),
        callbacks=[RegimeCallback(CYCLING)],
    )
    trainer.train()

    assert float(gate_of(trainer.model).keep_ratio) == trainer.regime.cycler.keep_ratio < 1


def test_a_model_wrapped_with_another_policy_is_refused(tmp_path: Path):
    model = wrap(example.tiny_model(), example.policy("dense"))

    with pytest.raises(PolicyError, match="another policy than the one given to RegimeCallback"):
        Trainer(model=model, args=example.arguments(tmp_path), callbacks=[RegimeCallback(CYCLING)])
    trainer = Trainer(model=model, args=example.arguments(tmp_path), callbacks=[RegimeCallback()])
    assert trainer.model.config.regimewrap == example.policy("dense").model_dump(mode="json")


def test_a_policy_that_is_none_is_refused():
    with pytest.raises(PolicyError, match="preset must be one of mixed, sawtooth"):
        RegimeCallback("los-reset")


def test_a_signal_that_is_not_in_the_logs_is_named_with_those_that_are(tmp_path: Path):
    policy = RegimePolicy.preset("accuracy-reset").replace(gate={"scope": "position"})

    with pytest.raises(SignalError, match=r"monitors 'accuracy', .* they have loss, grad_norm, learning_rate"):
        _trained(tmp_path, policy)


def test_another_signal_comes_from_the_logs(tmp_path: Path):
    policy = example.policy("ema-reset").replace(cycle={"monitor": "grad_norm", "every": 2, "smoothing": 0.0})
    trainer = _trained(tmp_path, policy)

    assert [each.signal for each in trainer.regime.cycler.history] == _logged(trainer, "grad_norm")[1::2]


def test_the_mixin_asks_for_its_callback_and_the_callback_for_training(tmp_path: Path):
    with pytest.raises(WrapError, match="pass callbacks="):
        RegimeTrainer(model=example.tiny_model(), args=example.arguments(tmp_path)).train()
    with pytest.raises(WrapError, match="no cycler before"):
        _ = RegimeCallback().cycler
