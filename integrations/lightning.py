"""Lightning: a callback that wraps the module, counts updates as the trainer does, and is in its checkpoints.

::

    trainer = Trainer(..., callbacks=[RegimeCallback(policy)])

Training, saving and resuming stay the trainer's business; what steers the ratio stays ``RegimeCycler``'s. Nothing is
reduced over ranks here: the cycler does that, once a decision.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regimewrap import RegimeCycler, RegimePolicy, TopKGate, gate_of, wrap
from regimewrap.errors import NotWrappedError, PolicyError, SignalError, WrapError

from .requires import require, run_length

require("lightning", "2.5", "lightning")

from lightning.pytorch import Callback  # noqa: E402 - only once it is known to be there
from lightning.pytorch.utilities.model_helpers import is_overridden  # noqa: E402

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class RegimeCallback(Callback):
    """Wraps the trainer's module and moves its keep ratio, once per optimizer update.

    The module is wrapped in place when ``fit`` begins, unless it is wrapped already. Modules that build or shard
    themselves in ``configure_model`` wrap there, before ``fully_shard``. The monitored value is taken from what
    ``training_step`` returns or logs, as the mean over the micro-batches of an update; the mean over ranks is taken
    when a decision is due. The ratio is logged as ``keep_ratio``. The state is in the trainer's checkpoints, those with
    ``save_weights_only`` excepted, and resumes exactly, on all ranks and between two decisions; a checkpoint made
    without this callback begins a new cycle.
    """

    def __init__(self, policy: dict[str, Any] | RegimePolicy | str | os.PathLike[str] | None = None) -> None:
        """Choose a policy.

        Args:
            policy: what to gate, how, and how to cycle: a policy, a preset's name, the path of a policy file, or its
                settings as a mapping, as in LightningCLI's files. A preset is scaled to the trainer's
                ``estimated_stepping_batches`` when ``fit`` begins. ``None``: the one that the module is wrapped with,
                and for a bare module the default.

        Raises:
            PolicyError: it is none of these.
        """
        if isinstance(policy, dict):
            policy = RegimePolicy.model_validate(policy)
        self._policy = None if policy is None else RegimePolicy.of(policy)
        self._trainer: Trainer | None = None
        self._module: LightningModule | None = None
        self._gate: TopKGate | None = None
        self._cycler: RegimeCycler | None = None
        self._values: list[Tensor | float] = []  # of this update's micro-batches
        self._updates = 0  # the trainer's global_step when the last update was counted

    @property
    def cycler(self) -> RegimeCycler:
        """The cycler of the latest ``fit``; its ``history`` has every decision.

        Raises:
            WrapError: there has been none.
        """
        if self._cycler is None:
            raise WrapError("RegimeCallback has no cycler before trainer.fit() is called.")
        return self._cycler

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the module; begin a new cycle with a new ``fit``."""
        self._trainer = trainer
        if pl_module is not self._module:
            self._module, self._gate, self._cycler = pl_module, None, None
        if stage == "fit" and trainer.global_step == 0:
            self._cycler = None
        if not is_overridden("configure_model", pl_module):
            self._attach(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the ratio.

        Raises:
            NotWrappedError: the module overrides ``configure_model`` and did not wrap there.
        """
        self._attach(pl_module)
        if self._cycler is None:
            self._cycler = RegimeCycler(
                pl_module, total_steps=run_length(pl_module, trainer.estimated_stepping_batches)
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that all ranks begin alike."""
        del pl_module
        self._values, self._updates = [], trainer.global_step
        self.cycler.check_sync()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in a micro-batch; count an update if this was its last.

        Raises:
            SignalError: the monitored value is neither returned nor logged by ``training_step``; or as
                ``RegimeCycler.step``.
            SyncError: as ``RegimeCycler.step``.
        """
        del batch, batch_idx
        cycler = self.cycler
        if cycler.policy.strategy.needs_signal:
            self._values.append(self._value(trainer, pl_module, outputs))
        if trainer.global_step == self._updates:
            return
        values, self._values, self._updates = self._values, [], trainer.global_step
        known = {cycler.policy.monitor: sum(values[1:], values[0]) / len(values)} if values else {}
        cycler.step(**known)
        if not trainer.barebones:
            pl_module.log("keep_ratio", cycler.keep_ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return all running state of all ranks, for the trainer's checkpoint; all ranks call this together."""
        return {} if self._cycler is None else self._cycler.state_dict(all_ranks=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state in a checkpoint.

        Raises:
            StateError: it belongs to another policy, model or version, or is damaged.
        """
        if self._module is None:
            raise WrapError("RegimeCallback loads its state from the trainer's checkpoints: pass ckpt_path to fit().")
        self._attach(self._module)
        cycler = RegimeCycler(self._module, total_steps=self._length_for(self._module, state_dict))
        cycler.load_state_dict(state_dict)
        self._cycler = cycler

    def _length_for(self, module: LightningModule, state: dict[str, Any]) -> int | None:
        """Return the length of the run; outside of ``fit``, as in ``validate``, that of the saved run."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            return run_length(module, self._trainer.estimated_stepping_batches)
        policy = state.get("policy")
        length = policy.get("cycle", {}).get("scaled_to") if isinstance(policy, dict) else None
        return length if isinstance(length, int) else None

    def _attach(self, module: LightningModule) -> None:
        """Wrap a module, or check that it is wrapped as the policy says."""
        try:
            gate = gate_of(module)
        except NotWrappedError:
            if is_overridden("configure_model", module):
                raise NotWrappedError(
                    f"{type(module).__name__} overrides configure_model and is not wrapped; "
                    "call regimewrap.wrap in configure_model, before fully_shard if it shards."
                ) from None
            gate = gate_of(wrap(module, self._policy))
        if self._policy not in (None, gate.policy):
            raise PolicyError(
                "the module is wrapped with another policy than the one given to RegimeCallback. "
                "Pass RegimeCallback() to use the module's, or regimewrap.unwrap(module) first."
            )
        if gate is not self._gate:
            self._gate, self._cycler = gate, None

    def _value(self, trainer: Trainer, module: LightningModule, outputs: Any) -> Tensor | float:
        """Return the monitored value of a micro-batch."""
        name = self.cycler.policy.monitor
        outputs = outputs if isinstance(outputs, dict) else {}
        value = outputs.get(name)
        if value is not None:
            if name == "loss" and module.automatic_optimization:
                # The trainer has divided it by the number of micro-batches, also in an update that has fewer.
                value = value * trainer.accumulate_grad_batches
            return value.detach() if isinstance(value, Tensor) else value
        logged = trainer.callback_metrics
        for each in (name, f"{name}_step"):
            if each in logged:
                return logged[each].detach()
        if name == "loss" and module.automatic_optimization:  # training_step returned None to skip this batch
            return math.nan
        raise SignalError(
            f"the policy monitors {name!r}, which training_step neither returned nor logged; "
            f"return it in its dict, or call self.log({name!r}, value)."
        )
