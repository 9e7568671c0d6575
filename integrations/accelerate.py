"""Hugging Face Accelerate: a cycler that counts updates as the accelerator does, and is in its checkpoints.

::

    cycler = AccelerateCycler(accelerator, model)
    ...
    cycler.step(loss)

Preparing, accumulating, saving and resuming stay the accelerator's business; what steers the ratio stays
``RegimeCycler``'s. Nothing is reduced over processes here: the cycler does that, once a decision.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regimewrap import CyclePolicy, Regime, RegimeCycler, TopKGate, gate_of
from regimewrap.errors import StateError

from .requires import require

require("accelerate", "1.3", "accelerate")

if TYPE_CHECKING:
    from accelerate import Accelerator

    from regimewrap.policy import PolicyLike


class AccelerateCycler:
    """A ``RegimeCycler`` for loops with an ``Accelerator``; registers itself for the accelerator's checkpoints.

    Call ``step`` once for each micro-batch, with the loss as it came out of the criterion. An update is counted when
    the accelerator synchronises gradients, with the mean over its micro-batches; the mean over processes is taken when
    a decision is due. ``save_state`` and ``load_state`` resume exactly, on all processes and between two decisions. As
    Accelerate demands, all processes must call them; a checkpoint made without an ``AccelerateCycler`` does not load.

    Attributes:
        cycler: the ``RegimeCycler``; its ``history`` has every decision.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        policy: CyclePolicy | PolicyLike | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Drive a model.

        Args:
            accelerator: the loop's.
            model: wrapped with ``regimewrap.wrap``, then prepared by the accelerator.
            policy: how to cycle: a policy, a preset's name, or the path of a policy file; by default the policy that
                the model was wrapped with.
            total_steps: optimizer updates of the whole run, on one process; see ``RegimeCycler``.

        Raises:
            NotWrappedError: the model is not wrapped.
            PolicyError: as ``RegimeCycler``.
            SyncError: the processes have different policies or models.
        """
        self.cycler = RegimeCycler(model, policy, total_steps)
        self.cycler.check_sync()
        self._accelerator = accelerator
        self._model = model
        self._values: list[Tensor | float] = []
        accelerator.register_for_checkpointing(self)
        accelerator.register_load_state_pre_hook(self._check_file)

    @property
    def keep_ratio(self) -> float:
        """The keep ratio for the next forward pass, in (0, 1]."""
        return self.cycler.keep_ratio

    def step(self, loss: Tensor | float | None = None, **metrics: Tensor | float) -> Regime | None:
        """Take in a micro-batch; count an update if this was its last.

        Args:
            loss: the micro-batch's own loss, not divided by the number of micro-batches.
            **metrics: other values of this micro-batch, such as ``accuracy`` as a fraction.

        Returns:
            What is in force from the next forward pass on; ``None`` if the update goes on.

        Raises:
            SignalError: as ``RegimeCycler.step``.
            SyncError: as ``RegimeCycler.step``.
        """
        name = self.cycler.policy.monitor
        value = loss if name == "loss" else metrics.get(name)
        if value is not None:
            self._values.append(value.detach().clone() if isinstance(value, Tensor) else value)
        if not self._accelerator.sync_gradients:
            return None
        values, self._values = self._values, []
        known = {name: sum(values[1:], values[0]) / len(values)} if values else {}
        return self.cycler.step(**known)

    def state_dict(self) -> dict[str, Any]:
        """Return all running state of all processes as plain JSON types; all of them must call this.

        Raises:
            SyncError: one of them does not; the message names it.
        """
        return self.cycler.state_dict(all_ranks=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateError: it belongs to another policy, model or version, or is damaged. Nothing changed.
        """
        self.cycler.load_state_dict(state)
        self._values = []

    def _check_file(self, models: list[nn.Module], folder: str) -> None:
        """Refuse a checkpoint whose state is not ours before anything of it is loaded."""
        del models
        objects: list[object] = self._accelerator._custom_objects
        number = next(number for number, known in enumerate(objects) if known is self)
        path = Path(folder) / f"custom_checkpoint_{number}.pkl"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise StateError(
                f"{path} is not there: the checkpoint was saved without an AccelerateCycler. "
                "Load it before making one; a new cycle begins then."
            ) from None
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise StateError(f"{path} is damaged: {reason}. Resume from an older checkpoint.") from None
        try:
            gate = gate_of(self._model)
            trial = TopKGate(gate.policy)
            trial.sites = gate.sites
            RegimeCycler(trial, self.cycler.policy, self.cycler.total_steps).load_state_dict(state)
        except StateError as error:
            raise StateError(f"{path}: {error}") from None
