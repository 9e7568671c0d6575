"""Keep ratios that follow from the number of updates alone, for loops that hand over a count, or nothing at all.

``RegimeScheduler`` has the shape of timm's schedulers. ``drive_from_optimizer`` is for a loop that nobody can change:
it waits for the optimizer that owns the model's parameters and follows its steps. Policies that watch a signal are
refused.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any, final

import torch
from torch import nn

from regimewrap import RegimeCycler, gate_of
from regimewrap.errors import PolicyError, StateError

from ..states import resume, saved

#: The key, in the first of an optimizer's parameter groups, under which the count travels through its checkpoints.
GROUP_KEY = "regimewrap"

_BELONGING = ("version", "policy", "sites")


@final
class RegimeScheduler:
    """A keep ratio schedule in the shape of timm's learning rate schedulers, for policies that need no signal.

    Call ``step_update`` where the loop calls that of its learning rate scheduler, after each update with the number of
    updates made so far. The ratio is a function of this number, so a run resumes by its count alone.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take over a wrapped model's keep ratio.

        Args:
            model: wrapped with a policy whose strategy needs no signal, such as ``sawtooth``.

        Raises:
            NotWrappedError: the model is not wrapped.
            PolicyError: the policy watches a signal, which a scheduler never sees.
        """
        cycle = gate_of(model).policy.cycle
        if cycle.strategy.needs_signal:
            raise PolicyError(
                f"the strategy {cycle.strategy.kind!r} watches {cycle.monitor!r}, which a scheduler never sees. "
                "Take one that needs no signal, such as the preset sawtooth, or give it the loss, with RegimeTask."
            )
        self._model = model
        self._cycler = RegimeCycler(model)
        self._start = self._cycler.state_dict()
        state = saved(self._cycler, model)
        self._belongs_to = {name: state[name] for name in _BELONGING}

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
        while self._cycler.updates < num_updates:
            self._cycler.step()

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
        here = saved(self._cycler, self._model)
        resume(self._cycler, self._model, {**here, **{name: state.get(name) for name in _BELONGING}})
        self.step_update(count)


def drive_from_optimizer(model: nn.Module) -> None:
    """Move a wrapped model's keep ratio from the steps of whatever optimizer turns out to own its parameters.

    The optimizer is looked for in the first forward pass in train mode. The count of steps is kept in its parameter
    groups, as timm's Lookahead keeps its own, so it goes through ``optimizer.state_dict`` and a resumed run goes on
    exactly. Copies of the model, such as averaged ones, follow. A step that a gradient scaler skips does not count.

    Args:
        model: wrapped. Whether its policy needs a signal, which is then refused, is asked only when training begins, so
            that something else can take over before: see ``release``.
    """
    _DRIVERS[model] = _Driver(model)


def release(model: nn.Module) -> None:
    """Undo ``drive_from_optimizer``, because somebody else drives from now on; without it, do nothing."""
    driver = _DRIVERS.pop(model, None)
    if driver is not None:
        driver.stop()


class _Driver:
    """The forward hook that waits for an optimizer, and the step hook on it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._copies: list[weakref.ref[nn.Module]] = []
        self._waiting = model.register_forward_pre_hook(self)
        self._following: torch.utils.hooks.RemovableHandle | None = None

    def stop(self) -> None:
        self._waiting.remove()
        if self._following is not None:
            self._following.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, _: Any) -> None:
        """Begin, at the first forward pass of training: the optimizer exists by then and has loaded its checkpoint."""
        if self._following is not None or not (model.training and torch.is_grad_enabled() and model is self._model()):
            return
        optimizer = _owner_of(model)
        if optimizer is None:
            return
        try:
            scheduler = RegimeScheduler(model)
        except PolicyError as error:
            raise PolicyError(
                f"nobody drives the keep ratio: {error} For a RegimeCycler of your own, pass drive=False."
            ) from None
        group = optimizer.param_groups[0]
        if GROUP_KEY in group:
            scheduler.load_state_dict(group[GROUP_KEY])

        def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            while self._copies:
                copied = self._copies.pop()()
                if copied is not None:
                    scheduler.bind(copied)
            scheduler.step_update(scheduler.num_updates + 1)
            optimizer.param_groups[0][GROUP_KEY] = scheduler.state_dict()

        self._following = optimizer.register_step_post_hook(follow)
        self._waiting.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Driver:
        original = self._model()
        copied = memo.get(id(original))
        if copied is not None:
            self._copies.append(weakref.ref(copied))
        return self  # on a copy, the forward hook does nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing_to_drive, ()  # in a file there is no optimizer to follow


_DRIVERS: weakref.WeakKeyDictionary[nn.Module, _Driver] = weakref.WeakKeyDictionary()


def _nothing_to_drive() -> Any:
    return _do_nothing


def _do_nothing(_: nn.Module, __: Any) -> None: ...


def _owner_of(model: nn.Module) -> torch.optim.Optimizer | None:
    """Return the optimizer over the model's parameters. Nothing leads from a model to it, so all objects are asked."""
    parameters = {id(parameter) for parameter in model.parameters()}
    owners = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), torch.optim.Optimizer)
        and any(id(parameter) in parameters for group in each.param_groups for parameter in group["params"])
    ]
    # timm's Lookahead owns what its base owns; it is the base that makes the checkpoints.
    inner = {id(each._base_optimizer) for each in owners if hasattr(each, "_base_optimizer")}
    return next((each for each in owners if id(each) in inner), next(iter(owners), None))
