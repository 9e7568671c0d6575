"""Hugging Face's Trainer: a callback that wraps and cycles, and a mixin that feeds it every update's loss.

::

    trainer = Trainer(..., callbacks=[RegimeCallback(policy)])

    class RegimeTrainer(RegimeTrainerMixin, Trainer): ...

The callback alone takes the loss from the trainer's logs. With the mixin it gets the loss of each update, and keep
ratio, phase and density are logged. Only what passes between the trainer and regimewrap is here.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regimewrap import RegimeCycler, RegimePolicy, gate_of, watch, wrap
from regimewrap.errors import NotWrappedError, PolicyError, SignalError, StateError, WrapError

from .requires import require, run_length

require("transformers", "4.50", "transformers")
require("accelerate", "1.3", "transformers")

from transformers import PretrainedConfig, TrainerCallback  # noqa: E402 - only once it is known to be there
from transformers.trainer_callback import ExportableState  # noqa: E402

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from regimewrap.measure.telemetry import Watch
    from regimewrap.policy import PolicyLike
else:
    Trainer = object

#: The phases, as the numbers they are logged as: not every reporter takes text.
PHASES = ("dense", "compress", "recover", "spread")

_log = logging.getLogger(__name__)


class RegimeCallback(TrainerCallback, ExportableState):
    """Wraps the trainer's model and moves its keep ratio, once per optimizer update.

    The model is wrapped in place when the trainer is built, unless it is wrapped already; its config gets the policy
    as ``config.regimewrap``, which ``save_pretrained`` keeps. Each call of ``train`` begins a new cycle, except where
    it resumes: the state is in the trainer's own checkpoints. From a checkpoint that has none, a new cycle begins.

    A policy that watches the loss gets it from the logs, where it is the mean over ranks and over the updates since the
    log before. So that decisions come when they are due and every checkpoint resumes exactly, a log is made at each
    decision and each save, whatever ``logging_steps`` says. ``RegimeTrainerMixin`` needs none of that.

    With ``restore_callback_states_from_checkpoint=True`` the trainer puts a callback of its own making in the place of
    this one when it resumes: ask ``trainer.callback_handler.callbacks`` for it, or the mixin for ``trainer.regime``.
    """

    def __init__(self, policy: PolicyLike | None = None) -> None:
        """Choose a policy.

        Args:
            policy: what to gate, how, and how to cycle: a policy, a preset's name, or the path of a policy file. A
                preset is scaled to the trainer's ``max_steps`` when training begins. ``None``: the one that the model
                is wrapped with; for a bare model the one in its ``config.regimewrap``, else the default. A causal
                language model needs ``scope="position"``.

        Raises:
            PolicyError: it is none of these.
        """
        self._policy = None if policy is None else RegimePolicy.of(policy)
        self._cycler: RegimeCycler | None = None
        self._shared: dict[str, Any] | None = None  # the latest state of all ranks
        self._loss: Tensor | None = None  # of this update, summed over its micro-batches
        self._gets_each_loss = False
        self._logged = 0  # the trainer's global_step up to which the logs have been counted

    @property
    def cycler(self) -> RegimeCycler:
        """The cycler of the latest call of ``train``; its ``history`` has every decision.

        Raises:
            WrapError: training has not begun.
        """
        if self._cycler is None:
            raise WrapError("RegimeCallback has no cycler before trainer.train() is called.")
        return self._cycler

    def state(self) -> dict[str, Any]:
        """Return what the trainer puts into its checkpoints: no arguments, the running state as an attribute."""
        if self._cycler is None:
            return {"args": {}, "attributes": {}}
        # Only rank 0 is asked, so what the others had to add was gathered when the save became due.
        known = self._shared is not None and self._shared["updates"] == self._cycler.updates
        return {"args": {}, "attributes": {"regime": self._shared if known else self._cycler.state_dict()}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wrap the model."""
        del args, state, control
        self._attach(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a cycle, or go on with the one in the checkpoint.

        Raises:
            StateError: the checkpoint's state belongs to another policy, model, version or length of the run, or is
                damaged.
            SyncError: the ranks do not begin alike.
            WrapError: the trainer has two of these callbacks.
        """
        del args, control
        name = type(self).__name__
        entries: Any = state.stateful_callbacks  # a mapping, whatever its annotation says
        kept = entries.get(name)
        if isinstance(kept, list):
            raise WrapError(f"the trainer has {len(kept)} callbacks {name}; one drives the model: remove the others.")
        self._attach(kwargs["model"])  # a trainer with model_init has just made a new one
        self._cycler = RegimeCycler(kwargs["model"], total_steps=run_length(kwargs["model"], state.max_steps))
        self._shared, self._loss, self._gets_each_loss, self._logged = None, None, False, state.global_step
        # At step 0 what is kept is only what the trainer has asked this object itself.
        if state.global_step > 0:
            if kept is None:
                _log.info("The checkpoint of step %d has no regime: a new cycle begins.", state.global_step)
            else:
                self._cycler.load_state_dict(_regime(kept, name))
        self._cycler.check_sync()
        entries[name] = self.state()  # the trainer fails to save what is not there yet

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an optimizer update, with its loss if that is known."""
        del kwargs
        cycler = self.cycler
        if not cycler.policy.strategy.needs_signal:
            cycler.step()
        elif self._gets_each_loss:
            cycler.step(self._loss)
            self._loss = None
        elif (cycler.updates + state.global_step - self._logged) % cycler.policy.every == 0:
            control.should_log = True
        self._before_save(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Get ready for a save at the end of an epoch."""
        del state, kwargs
        self._before_save(args, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the signal from the logs."""
        del args, control, kwargs
        self.observe(logs or {}, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model the keep ratio of the checkpoint that ``load_best_model_at_end`` took its weights from."""
        del control
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        name = type(self).__name__
        try:
            kept = _state_file(state.best_model_checkpoint)["stateful_callbacks"][name]
            gate_of(kwargs["model"]).set_keep_ratio(_ratio(_regime(kept, name)))
        except (OSError, KeyError, StateError) as error:  # the training is done and must not be lost
            _log.warning("The keep ratio is not that of %s: %s", state.best_model_checkpoint, error)

    def add_loss(self, loss: Tensor) -> None:
        """Take a micro-batch's share of the loss of the update that is being made.

        ``RegimeTrainerMixin`` calls it. A policy that monitors the loss then no longer looks at the logs.

        Args:
            loss: 0-d, detached. The shares of one update add up to its loss.
        """
        cycle = self.cycler.policy
        if cycle.strategy.needs_signal and cycle.monitor == "loss":
            self._gets_each_loss = True
            self._loss = loss if self._loss is None else self._loss + loss

    def observe(self, logs: dict[str, Any], global_step: int) -> None:
        """Count the updates since the last training log, with what this one says; the same log twice counts once.

        Args:
            logs: as the trainer logs them; those without a ``loss`` are not of training.
            global_step: the trainer's optimizer updates so far.

        Raises:
            SignalError: the monitored value is not in it.
        """
        if self._gets_each_loss or "loss" not in logs or not self.cycler.policy.strategy.needs_signal:
            return
        monitor = self.cycler.policy.monitor
        if monitor not in logs:
            raise SignalError(
                f"the policy monitors {monitor!r}, which is not in the trainer's logs: they have {', '.join(logs)}. "
                "Monitor one of these, or add it in an override of Trainer.log."
            )
        for _ in range(global_step - self._logged):
            self.cycler.step(**{monitor: logs[monitor]})
        self._logged = global_step

    def _attach(self, model: nn.Module) -> None:
        """Wrap a model, or check that it is wrapped as the policy says."""
        config = getattr(model, "config", None)
        config = config if isinstance(config, PretrainedConfig) else None
        try:
            gate = gate_of(model)
        except NotWrappedError:
            kept = getattr(config, "regimewrap", None)
            policy = self._policy or (RegimePolicy() if kept is None else RegimePolicy.model_validate(kept))
            gate = gate_of(wrap(model, policy))
        if self._policy not in (None, gate.policy):
            raise PolicyError(
                "the model is wrapped with another policy than the one given to RegimeCallback. "
                "Pass RegimeCallback() to use the model's, or regimewrap.unwrap(model) first."
            )
        if config is not None:
            config.regimewrap = gate.policy.model_dump(mode="json")

    def _before_save(self, args: TrainingArguments, control: TrainerControl) -> None:
        best = control.should_evaluate and args.save_strategy == "best"  # decided only after the evaluation
        if not (control.should_save or best) or not self.cycler.policy.strategy.needs_signal:
            return
        if self._gets_each_loss:
            self._shared = self.cycler.state_dict(all_ranks=True)
        else:
            control.should_log = True


class RegimeTrainerMixin(Trainer):
    """For a trainer with a ``RegimeCallback``: each update's own loss steers it, and what it does is logged.

    It comes before the trainer's class: ``class RegimeTrainer(RegimeTrainerMixin, Trainer): ...``. Logs with a training
    loss, and with them ``log_history`` and every reporter, gain

    - ``keep_ratio``, of the next update;
    - ``phase``: 0 dense, 1 compress, 2 recover, 3 spread;
    - ``cycle``: how often the ratio was raised;
    - ``density``: the share of units that were not zero after the gate, in a forward pass of this rank since the log
      before: the last one where ``logging_steps`` divides the step, else the first. Not with ``torch_compile``.
    """

    _seen: Watch | None = None

    @property
    def regime(self) -> RegimeCallback:
        """The trainer's ``RegimeCallback``.

        Raises:
            WrapError: it has none.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RegimeCallback):
                return callback
        raise WrapError("RegimeTrainerMixin needs a RegimeCallback; pass callbacks=[RegimeCallback(policy)].")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, once it is clear that there is a ``RegimeCallback``."""
        self._seen = None
        _ = self.regime
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's; the loss goes to the callback too."""
        every = self.state.logging_steps
        due = self._seen is None or (every > 0 and (self.state.global_step + 1) % every == 0)
        model: Any = self.model
        with watch(model) if due and not self.args.torch_compile else nullcontext(self._seen) as self._seen:
            loss = super().training_step(*args, **kwargs)
        self.regime.add_loss(loss)
        return loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As the trainer's, with keep ratio, phase, cycle and density in the logs of training."""
        if "loss" in logs:
            self.regime.observe(logs, self.state.global_step)
            regime = self.regime.cycler.regime
            logs |= {"keep_ratio": regime.keep_ratio, "phase": PHASES.index(regime.phase), "cycle": regime.cycle}
            if self._seen is not None:
                logs["density"] = self._seen.density
                self._seen = None
        super().log(logs, *args, **kwargs)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return a run's newest whole checkpoint, to resume from after a crash.

    The trainer writes a checkpoint's ``trainer_state.json`` last. Where a process was killed before that was done,
    ``resume_from_checkpoint=True`` would take what is there and fail.

    Args:
        output_dir: the trainer's ``output_dir``.

    Returns:
        The folder, for ``resume_from_checkpoint``; ``None`` if there is none, which begins a new run.
    """
    folders = sorted(Path(output_dir).glob("checkpoint-*"), key=_number, reverse=True)
    for folder in folders:
        try:
            _state_file(folder)
        except (OSError, StateError):
            continue
        return str(folder)
    return None


def _number(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _state_file(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(checkpoint) / "trainer_state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StateError(f"{path} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise StateError(f"{path} is damaged: expected a mapping; got {type(content).__name__}.")
    return content


def _regime(kept: object, name: str) -> Any:
    try:
        return kept["attributes"]["regime"]  # type: ignore[index]
    except (KeyError, TypeError):
        raise StateError(
            f"the checkpoint's state of {name} is damaged: expected attributes with a regime. "
            "Resume from another checkpoint, or delete that entry from its trainer_state.json to begin a new cycle."
        ) from None


def _ratio(regime: dict[str, Any]) -> float:
    """Return the keep ratio of a saved state, of version 1 too."""
    return float(regime["cycler"]["state"]["keep_ratio"] if "cycler" in regime else regime["state"]["keep_ratio"])
