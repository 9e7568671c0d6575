"""Keep ratios that follow from the number of updates alone, for loops that pass a count or nothing.

``RegimeScheduler`` has the shape of timm's schedulers. ``drive_from_optimizer`` is for a loop that cannot be changed:
it counts the steps of the optimizer over the model's parameters. Policies that watch a signal are refused.
"""

from __future__ import annotations

import weakref
from typing import Any, final

from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from regimewrap import RegimeCycler, gate_of
from regimewrap.errors import PolicyError, StateError

#: The key, in the first of an optimizer's parameter groups, under which the count travels through its checkpoints.
GROUP_KEY = "regimewrap"

_BELONGING = ("version", "policy", "sites")


@final
class RegimeScheduler:
    """A keep ratio schedule in the shape of timm's learning rate schedulers, for policies that need no signal.

    Call ``step_update`` where the loop calls that of its learning rate scheduler, after each update with the number of
    updates made so far. The ratio is a function of this number, so a run resumes by its count alone.
    """

    def __init__(self, model: nn.Module, total_steps: int | None = None) -> None:
        """Take over a wrapped model's keep ratio.

        Args:
            model: wrapped with a policy whose strategy needs no signal, such as ``mixed`` or ``sawtooth``.
            total_steps: optimizer updates of the whole run, epochs × updates an epoch; see ``RegimeCycler``.

        Raises:
            NotWrappedError: the model is not wrapped.
            PolicyError: the policy watches a signal, which a scheduler never sees, or needs ``total_steps``.
        """
        cycle = gate_of(model).policy.cycle
        if cycle.strategy.needs_signal:
            raise PolicyError(
                f"the strategy {cycle.strategy.kind!r} watches {cycle.monitor!r}, which a scheduler never sees. "
                "Take one that needs no signal, such as the preset mixed, or give it the loss, with RegimeTask."
            )
        self._cycler = RegimeCycler(model, total_steps=total_steps)
        self._start = self._cycler.state_dict()
        self._belongs_to = {name: self._start[name] for name in _BELONGING}

    @property
    def keep_ratio(self) -> float:
        """The keep ratio for the next forward pass, in (0, 1]."""
        return self._cycler.keep_ratio

    @property
    def num_updates(self) -> int:
        """Updates so far."""
        return self._cycler.updates

    def step(self, epoch: int, metric: float | None = None) -> None:
        """Do nothing: the keep ratio moves with updates, not with epochs."""

    def step_update(self, num_updates: int, metric: float | None = None) -> None:  # noqa: ARG002 - timm's signature
        """Set the keep ratio that belongs to a number of updates.

        Args:
            num_updates: made so far, at least 0. Any number: a resumed run jumps to where it was.
            metric: not looked at.
        """
        if num_updates < self._cycler.updates:
            self._cycler.load_state_dict(self._start)
        if num_updates == self._cycler.updates + 1:
            self._cycler.step()
        else:
            self._cycler.fast_forward(num_updates)

    def bind(self, model: nn.Module) -> None:
        """Drive one more wrapped model, such as the ``module`` of timm's ``ModelEmaV3``, from now on.

        Raises:
            NotWrappedError: the model is not wrapped.
        """
        self._cycler.bind(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the count and what it belongs to, as plain JSON types."""
        return {**self._belongs_to, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateError: it belongs to another policy, model or version, or is damaged; nothing has changed.
        """
        count = state.get("num_updates") if isinstance(state, dict) else None
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise StateError(f"expected a state from RegimeScheduler.state_dict; its num_updates is {count!r}.")
        # What it belongs to is compared as for every adapter; the cycle itself follows from the count.
        self._cycler.load_state_dict({**self._start, **{name: state.get(name) for name in _BELONGING}})
        self.step_update(count)


def drive_from_optimizer(model: nn.Module, total_steps: int | None = None) -> None:
    """Move a wrapped model's keep ratio at each step of the optimizer over its parameters.

    The first optimizer that steps with one of them is followed, through torch's hook on all optimizers' steps; nothing
    is searched for. The count of steps is kept in its parameter groups, as timm's Lookahead keeps its own, so it goes
    through ``optimizer.state_dict``. A resumed run takes it from there after its first step: that one update still runs
    at the ratio of a run's begin. A step that a gradient scaler skips does not count.

    Args:
        model: wrapped. Whether its policy needs a signal, which is then refused, is asked only when training begins, so
            that something else can take over before: see ``release``.
        total_steps: optimizer updates of the whole run; see ``RegimeCycler``.
    """
    global _HOOKED
    _DRIVERS[model] = _Driver(model, total_steps)
    if not _HOOKED:
        register_optimizer_step_post_hook(_after_step)
        _HOOKED = True


def release(model: nn.Module) -> None:
    """Undo ``drive_from_optimizer``, if it was called: something else drives from now on."""
    _DRIVERS.pop(model, None)


class _Driver:
    """Follows the first optimizer that steps with the model's parameters."""

    def __init__(self, model: nn.Module, total_steps: int | None) -> None:
        self._model = weakref.ref(model)
        self._total_steps = total_steps
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._scheduler: RegimeScheduler | None = None

    def after(self, optimizer: Optimizer) -> None:
        model = self._model()
        if model is None or (self._optimizer is not None and self._optimizer() not in (None, optimizer)):
            return
        group = optimizer.param_groups[0]
        if self._optimizer is None or self._optimizer() is None:
            own = {id(parameter) for parameter in model.parameters()}
            if not any(id(parameter) in own for each in optimizer.param_groups for parameter in each["params"]):
                return
            self._optimizer, self._scheduler = weakref.ref(optimizer), self._begun(model)
            if GROUP_KEY in group:
                self._scheduler.load_state_dict(group[GROUP_KEY])
        assert self._scheduler is not None  # noqa: S101 - it comes with the optimizer
        self._scheduler.step_update(self._scheduler.num_updates + 1)
        group[GROUP_KEY] = self._scheduler.state_dict()

    def _begun(self, model: nn.Module) -> RegimeScheduler:
        try:
            return RegimeScheduler(model, self._total_steps)
        except PolicyError as error:
            raise PolicyError(
                f"nothing drives the keep ratio: {error} For a RegimeCycler of your own, pass drive=False."
            ) from None


_DRIVERS: weakref.WeakKeyDictionary[nn.Module, _Driver] = weakref.WeakKeyDictionary()
_HOOKED = False


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for driver in list(_DRIVERS.values()):
        driver.after(optimizer)
