"""The first mechanism: a forward hook behind an activation that is a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regimewrap.gate import SiteGate


class GateHook:
    """A forward hook that gates a module's output.

    A class at the top level, not a closure: it can be pickled, and a deep copy of the model takes a copy of it along.
    """

    def __init__(self, gate: SiteGate) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002  torch fixes the signature
        """Gate ``output``, in the mode of the module itself."""
        return self.gate(output, module.training)


def attach(module: nn.Module, gate: SiteGate) -> None:
    """Gate what ``module`` returns, before any other forward hook of it sees it."""
    module.register_forward_hook(GateHook(gate), prepend=True)


def detach(module: nn.Module) -> None:
    """Remove every gate hook of ``module``."""
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, GateHook)]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
        module._forward_hooks_always_called.pop(key, None)
