"""timm's task seam: a classification task that gives its loss to the cycler and saves it with timm's checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.task import ClassificationTask

from regimewrap import RegimeCycler, is_wrapped, wrap
from regimewrap.errors import PolicyError

from .open_loop import release

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regimewrap import Regime
    from regimewrap.policy import PolicyLike

#: The key of the task state under which the cycler is saved.
STATE_KEY = "regimewrap"


class RegimeTask(ClassificationTask):
    """timm's ``ClassificationTask`` over a wrapped model: in timm's loops, put this name in place of the other.

    Each forward pass in train mode keeps the loss, or the accuracy where the policy watches that. ``update_ema``,
    which timm's loops call once after each optimizer update, averages over the micro-batches since the last one and
    steps the cycler. The cycler's state travels in timm's checkpoints as task state. A checkpoint without it, from a
    run without regimewrap, loads too, and the cycle begins. With many ranks timm saves what rank 0 knows: when a run
    goes on between two decisions, the other ranks have rank 0's pending losses. The ranks still agree, bit for bit,
    but the run can differ from one that was not stopped.

    Attributes:
        cycler: the ``RegimeCycler``. An averaged model from ``setup_ema`` is bound to it.
        regime: what the last ``update_ema`` returned from ``cycler.step``; ``None`` before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        policy: PolicyLike | None = None,
        total_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Wrap the model, unless it is wrapped, and take over its keep ratio.

        Args:
            model: bare, or wrapped already.
            *args: for ``ClassificationTask``: criterion, device, dtype, ...
            policy: for ``wrap``: a policy, a preset's name, or the path of a policy file; the default policy if
                ``None``. Only for a bare model.
            total_steps: optimizer updates of the whole run, epochs × updates an epoch; see ``RegimeCycler``.
            **kwargs: for ``ClassificationTask``.

        Raises:
            AlreadyWrappedError: ``policy`` is given and the model is wrapped.
            PolicyError: the policy watches something other than the loss and the accuracy, or needs ``total_steps``.
            WrapError: the model cannot be wrapped.
        """
        super().__init__(model, *args, **kwargs)
        if policy is not None or not is_wrapped(model):
            wrap(model, policy)
        release(model)
        self.cycler = RegimeCycler(model, total_steps=total_steps)
        self.regime: Regime | None = None
        self._values: list[Tensor] = []
        cycle = self.cycler.policy
        if cycle.strategy.needs_signal and cycle.monitor not in ("loss", "accuracy"):
            raise PolicyError(f"RegimeTask knows loss and accuracy; the policy monitors {cycle.monitor!r}.")

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 - timm's names
        """Return what ``ClassificationTask`` returns, and keep what the policy watches."""
        result: dict[str, Tensor] = super().forward(input, target)
        cycle = self.cycler.policy
        if cycle.strategy.needs_signal and self.trainable_module.training:
            with torch.no_grad():
                watched = result["loss"] if cycle.monitor == "loss" else _accuracy(result["output"], target)
                self._values.append(watched.detach().clone())  # timm divides the loss in place
        return result

    def update_ema(self, step: int | None = None) -> None:
        """Update the averaged model, if there is one, and step the cycler.

        Raises:
            SignalError: see ``RegimeCycler.step``.
        """
        super().update_ema(step)
        values, self._values = self._values, []
        mean = {self.cycler.policy.monitor: torch.stack(values).mean()} if values else {}
        self.regime = self.cycler.step(**mean)

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Make the averaged model, and let the cycler drive its gate too."""
        averaged: nn.Module = super().setup_ema(*args, **kwargs)
        self.cycler.bind(averaged)
        return averaged

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return timm's task state, with the cycler's; the averaged model has none of its own."""
        state: dict[str, Any] = super().get_task_state(module=module, ema=ema)
        return state if ema else {**state, STATE_KEY: self.cycler.state_dict()}

    def load_checkpoint_state(
        self,
        state_dict: dict[str, Any],
        task_state: dict[str, Any] | None = None,
        ema: bool = False,
        strict: bool = True,
    ) -> None:
        """Load weights and the cycler's state, or neither.

        Raises:
            StateError: the state belongs to another policy, model or version, or is damaged.
        """
        before = self.cycler.state_dict()
        if not ema and task_state and STATE_KEY in task_state:
            self.cycler.load_state_dict(task_state[STATE_KEY])
        try:
            super().load_checkpoint_state(state_dict, task_state, ema=ema, strict=strict)
        except BaseException:
            self.cycler.load_state_dict(before)
            raise


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    output = output[0] if isinstance(output, tuple | list) else output
    labels = target.argmax(dim=-1) if target.dim() > 1 else target  # mixup's targets have a share for each class
    return (output.argmax(dim=-1) == labels).float().mean()
