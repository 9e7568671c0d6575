"""RegimeCallback counts updates as the trainer does, takes the monitored value where it is, and says what is wrong."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import POLICY, bare, batch, sgd, wrapped
from torch import Tensor
from torch.nn.functional import mse_loss

import regimewrap
from regimewrap import RegimePolicy
from regimewrap.errors import NotWrappedError, PolicyError, SignalError, StateError, WrapError

pytest.importorskip("lightning")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger
    from regimewrap.integrations.lightning import RegimeCallback

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
EVERY_UPDATE = POLICY.replace(cycle={"every": 1, "smoothing": 0.0})


class Module(LightningModule):
    def __init__(self, kind: str = "modules") -> None:
        super().__init__()
        self.net = bare(kind)

    def loss(self, number: int) -> Tensor:
        x, y = batch(number)
        return mse_loss(self.net(x), y)

    def training_step(self, number: int) -> Any:
        return self.loss(int(number))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)

    def train_dataloader(self) -> list[int]:
        return list(range(10))


class _Validated(Module):
    def validation_step(self, number: int) -> None:
        self.loss(int(number))

    def val_dataloader(self) -> list[int]:
        return [0]


class Losses(Callback):
    """Keeps the loss of each micro-batch, as it came out of the criterion."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: object) -> None:
        del pl_module
        self.seen.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


def trainer_with(*callbacks: Callback, folder: Path | None = None, **settings: Any) -> Trainer:
    default: dict[str, Any] = {"max_steps": 8, "logger": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**default, **settings},
    )


def signals(callback: RegimeCallback) -> list[float | None]:
    return [decision.signal for decision in callback.cycler.history]


def test_a_bare_module_is_wrapped_with_the_policy_and_keeps_its_class():
    callback, module = RegimeCallback(EVERY_UPDATE), Module()

    trainer_with(callback).fit(module)

    assert regimewrap.gate_of(module).policy == EVERY_UPDATE
    assert type(module) is Module
    assert len(callback.cycler.history) == 8
    assert float(regimewrap.gate_of(module).keep_ratio) == callback.cycler.keep_ratio
    assert min(decision.keep_ratio for decision in callback.cycler.history) < 1


def test_the_signal_of_an_update_is_the_mean_loss_of_its_micro_batches_also_at_the_end_of_an_epoch():
    callback, losses = RegimeCallback(EVERY_UPDATE), Losses()

    trainer_with(callback, losses, accumulate_grad_batches=4, max_steps=6).fit(Module())

    one, two = [losses.seen[:4], losses.seen[4:8], losses.seen[8:10]], [losses.seen[10:14], losses.seen[14:18]]
    means = [sum(group) / len(group) for group in [*one, *two, losses.seen[18:20]]]
    assert signals(callback) == pytest.approx(means, rel=1e-6)


def test_a_value_that_training_step_returns_or_logs_can_be_monitored():
    class Returns(Module):
        def training_step(self, number: int) -> Any:
            return {"loss": self.loss(int(number)), "accuracy": 0.1 + 0.05 * int(number)}

    class Logs(Module):
        def training_step(self, number: int) -> Any:
            self.log("accuracy", 0.1 + 0.05 * int(number), on_step=True, on_epoch=True, batch_size=1)
            return self.loss(int(number))

    policy = EVERY_UPDATE.replace(cycle={"monitor": "accuracy", "mode": "max"})
    for module in (Returns(), Logs()):
        callback = RegimeCallback(policy)
        trainer_with(callback).fit(module)
        assert signals(callback) == pytest.approx([0.1 + 0.05 * number for number in range(8)])


def test_manual_optimization_counts_a_batch_in_which_the_optimizer_stepped_once():
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, number: int) -> Any:
            loss = self.loss(int(number))
            self.manual_backward(loss)
            if int(number) % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return loss

    callback, losses = RegimeCallback(EVERY_UPDATE), Losses()

    trainer_with(callback, losses, max_steps=5).fit(Manual())

    assert signals(callback) == pytest.approx([sum(losses.seen[n : n + 2]) / 2 for n in range(0, 10, 2)], rel=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # pytest.warns passes on Lightning's own
def test_a_batch_that_training_step_skips_is_left_out_and_warned_about():
    class Skips(Module):
        def training_step(self, number: int) -> Any:
            return None if int(number) == 3 else self.loss(int(number))

    callback = RegimeCallback(EVERY_UPDATE)

    with pytest.warns(RuntimeWarning, match="1 of the last 1 values of loss were not finite"):
        trainer_with(callback).fit(Skips())

    assert signals(callback)[3] is None
    assert callback.cycler.skipped == 1


def test_the_ratio_is_logged(tmp_path: Path):
    callback = RegimeCallback(EVERY_UPDATE)
    logger = CSVLogger(tmp_path, name="", version="")

    trainer_with(callback, logger=logger, log_every_n_steps=1).fit(Module())

    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("keep_ratio")
    logged = [float(row.split(",")[column]) for row in rows[1:]]
    assert logged == pytest.approx([decision.keep_ratio for decision in callback.cycler.history])


def test_a_trainer_without_logging_says_nothing():
    trainer = trainer_with(RegimeCallback(EVERY_UPDATE), barebones=True, enable_checkpointing=None, logger=None)
    trainer.fit(Module())


def test_a_second_fit_begins_a_new_cycle_and_a_continued_one_goes_on():
    callback, module = RegimeCallback(EVERY_UPDATE), Module()
    trainer = trainer_with(callback, max_steps=4)
    trainer.fit(module)
    first = callback.cycler

    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module)
    assert callback.cycler is first
    assert [decision.step for decision in first.history] == list(range(1, 9))

    trainer_with(callback, max_steps=4).fit(module)
    assert callback.cycler is not first
    assert len(callback.cycler.history) == 4


def _checkpoint(folder: Path, policy: RegimePolicy = EVERY_UPDATE) -> Path:
    callback = RegimeCallback(policy)
    trainer = trainer_with(callback, max_steps=4)
    trainer.fit(Module())
    trainer.save_checkpoint(folder / "saved.ckpt")
    return folder / "saved.ckpt"


@pytest.mark.parametrize(
    ("module", "policy", "message"),
    [
        (Module, POLICY, "the state belongs to another policy: cycle.every is 1 in the state and 5 here"),
        (
            lambda: Module("functions"),
            EVERY_UPDATE,
            r"the state belongs to another model: it gates 1 activations \(net.1\); "
            r"this one gates 1 activations \(net.forward.relu\)",
        ),
    ],
)
def test_a_state_of_another_policy_or_model_is_refused_with_both_sides_shown(
    module: Any, policy: RegimePolicy, message: str, tmp_path: Path
):
    checkpoint = _checkpoint(tmp_path)
    before = checkpoint.read_bytes()
    other = module()
    if policy is EVERY_UPDATE:
        other.strict_loading = False

    with pytest.raises(StateError, match=message):
        trainer_with(RegimeCallback(policy)).fit(other, ckpt_path=checkpoint)

    assert checkpoint.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved.ckpt"]


def test_a_state_of_another_version_and_a_damaged_one_are_refused(tmp_path: Path):
    checkpoint = torch.load(_checkpoint(tmp_path), weights_only=True)
    state = checkpoint["callbacks"]["RegimeCallback"]
    for change, message in [
        ({"version": 7}, "version 7; this regimewrap reads versions 1 and 2"),
        ({"updates": 3}, "the state is damaged: 3 updates make 3 decisions"),
        ({"sites": None}, "another model: it gates None"),
    ]:
        checkpoint["callbacks"]["RegimeCallback"] = {**state, **change}
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        with pytest.raises(StateError, match=message):
            trainer_with(RegimeCallback(EVERY_UPDATE)).fit(Module(), ckpt_path=tmp_path / "changed.ckpt")


def test_a_truncated_checkpoint_is_refused_and_left_alone(tmp_path: Path):
    checkpoint = _checkpoint(tmp_path)
    half = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    checkpoint.write_bytes(half)

    with pytest.raises(RuntimeError, match="zip archive"):
        trainer_with(RegimeCallback(EVERY_UPDATE)).fit(Module(), ckpt_path=checkpoint)

    assert checkpoint.read_bytes() == half
    assert [path.name for path in tmp_path.iterdir()] == ["saved.ckpt"]


def test_a_checkpoint_made_without_the_callback_begins_a_new_cycle(tmp_path: Path):
    trainer = trainer_with(max_steps=4)
    trainer.fit(Module())
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    callback = RegimeCallback(EVERY_UPDATE)

    trainer_with(callback).fit(Module(), ckpt_path=tmp_path / "without.ckpt")

    assert [decision.step for decision in callback.cycler.history] == [1, 2, 3, 4]


def test_evaluating_a_checkpoint_sets_its_ratio(tmp_path: Path):
    class Evaluates(Module):
        def validation_step(self, _: int) -> None:
            self.ratio = float(regimewrap.gate_of(self).keep_ratio)

        def val_dataloader(self) -> list[int]:
            return [0]

    module, patient = (
        Evaluates(),
        EVERY_UPDATE.replace(cycle={"tolerance_kind": "absolute", "strategy": {"tolerance": 100.0}}),
    )

    trainer_with(RegimeCallback(patient)).validate(module, ckpt_path=_checkpoint(tmp_path, patient), verbose=False)

    assert module.ratio == pytest.approx(0.9**4)


def test_a_module_that_builds_itself_in_configure_model_wraps_there():
    class Late(Module):
        def __init__(self) -> None:
            LightningModule.__init__(self)
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = self.build()

        def build(self) -> torch.nn.Module:
            return wrapped(policy=EVERY_UPDATE)

    class Forgets(Late):
        def build(self) -> torch.nn.Module:
            return bare()

    callback = RegimeCallback()
    trainer_with(callback).fit(Late())
    assert len(callback.cycler.history) == 8
    with pytest.raises(NotWrappedError, match="Forgets overrides configure_model and is not wrapped"):
        trainer_with(RegimeCallback()).fit(Forgets())


def test_a_presets_name_is_scaled_to_the_trainers_run():
    for settings, updates in (({}, 8), ({"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 2}, 15)):
        callback = RegimeCallback("sawtooth")
        trainer_with(callback, **settings).fit(Module())
        assert callback.cycler.total_steps == callback.cycler.updates == updates
        assert callback.cycler.policy == RegimePolicy.preset("sawtooth", total_steps=updates).cycle


def test_a_resume_into_a_longer_run_is_refused_with_both_sides(tmp_path: Path):
    trainer = trainer_with(RegimeCallback("sawtooth"), folder=tmp_path)
    trainer.fit(Module())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with pytest.raises(StateError, match="a run of 8 updates; this cycler is made for 12"):
        trainer_with(RegimeCallback("sawtooth"), max_steps=12).fit(Module(), ckpt_path=tmp_path / "saved.ckpt")
    trainer_with(RegimeCallback("sawtooth")).validate(_Validated(), ckpt_path=tmp_path / "saved.ckpt", verbose=False)


def test_the_default_goes_on_in_a_longer_run(tmp_path: Path):
    trainer = trainer_with(RegimeCallback(), folder=tmp_path)
    trainer.fit(Module())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    callback = RegimeCallback()
    trainer_with(callback, max_steps=12).fit(Module(), ckpt_path=tmp_path / "saved.ckpt")
    assert callback.cycler.updates == 12


def test_what_is_wrong_is_said(tmp_path: Path):
    with pytest.raises(PolicyError, match=r"got 'los-reset'\. Did you mean 'loss-reset'"):
        RegimeCallback("los-reset")
    with pytest.raises(PolicyError, match="policy must be a RegimePolicy, a preset's name"):
        RegimeCallback(3)  # type: ignore[arg-type]
    with pytest.raises(WrapError, match=r"no cycler before trainer\.fit"):
        _ = RegimeCallback().cycler
    module = Module()
    regimewrap.wrap(module)
    with pytest.raises(PolicyError, match="wrapped with another policy"):
        trainer_with(RegimeCallback(EVERY_UPDATE)).fit(module)
    policy = EVERY_UPDATE.replace(cycle={"monitor": "accuracy", "mode": "max"})
    with pytest.raises(SignalError, match=r"monitors 'accuracy', which training_step neither returned nor logged"):
        trainer_with(RegimeCallback(policy), folder=tmp_path).fit(Module())


@pytest.mark.parametrize("policy", ["null", "{}", "{gate: {scope: batch}}", "sawtooth", "policy.yaml"])
def test_lightnings_command_line_takes_a_policy_in_every_form(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text("cycle: {full_share: 0.25}\n")
    (tmp_path / "run.yaml").write_text(
        "trainer: {max_steps: 2, accelerator: cpu, logger: false, enable_progress_bar: false, "
        "enable_checkpointing: false, enable_model_summary: false, callbacks: [{class_path: "
        f"regimewrap.integrations.lightning.RegimeCallback, init_args: {{policy: {policy}}}}}]}}\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(Module, args=["fit", "--config", "run.yaml"], save_config_callback=None)

    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, RegimeCallback))
    assert callback.cycler.updates == 2
    assert (callback.cycler.policy.full_share == 0.25) == (policy == "policy.yaml")
    assert (callback.cycler.policy.strategy.kind == "sawtooth") == (policy == "sawtooth")
