"""The first mechanism: hooks on an activation that is a module."""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regimewrap.gate.gate import SiteGate

_FORWARD, _RELU = nn.ReLU.forward, F.relu


class _NotScriptable:
    """Tells ``torch.jit.script`` what to do, where it asks a hook or a forward for what functions have."""

    def __getattr__(self, name: str) -> Any:
        if name in ("__name__", "__globals__"):
            raise AttributeError("a wrapped model cannot be scripted; call regimewrap.unwrap(model) first")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class GateHook(_NotScriptable):
    """A forward hook that gates a module's output.

    A class at the top level, not a closure: it can be pickled, and a deep copy of the model takes a copy of it along.
    """

    def __init__(self, gate: SiteGate) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG002  torch fixes the signature
        """Gate ``output``, in the mode of the module itself."""
        return self.gate(output, module.training)


class ReluHook(GateHook):
    """The forward hook of a ReLU: it has nothing to do if ``ReluForward`` has done it."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Gate ``output`` unless it is gated."""
        return output if _gates_in_forward(module) else super().__call__(module, args, output)


class ReluForward(_NotScriptable):
    """What a ReLU calls in place of its class's ``forward``: the ReLU and the gate as one operation.

    The result is the same. But a ReLU saves its output for backward, and the next layer saves what it is given: with a
    gate in between these are two tensors, in one operation they are one (WRN-28-4 keeps 1.00 times the bytes of the
    dense net instead of 1.34), and memory is written once. Which gate it is, and whether, is the hook's to say.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  the name that torch gave it
        """Return the ReLU of ``input``, gated if the hook is still there and leaves it to us."""
        module = self.module
        if _gates_in_forward(module):
            for hook in module._forward_hooks.values():
                if type(hook) is ReluHook:
                    return hook.gate.relu(F.relu, input, module.training)
        result: Tensor = type(module).forward(module, input)
        return result


def _gates_in_forward(module: nn.Module) -> bool:
    # torch.ao puts the hooks of a ReLU that it fuses on the fused module; others put a forward of theirs around ours.
    if type(module) is not nn.ReLU or module.inplace or type(module.__dict__.get("forward")) is not ReluForward:
        return False
    return nn.ReLU.forward is _FORWARD and F.relu is _RELU


def attach(module: nn.Module, gate: SiteGate) -> None:
    """Gate what ``module`` returns, before any other forward hook of it sees it."""
    if type(module) is nn.ReLU:
        module.register_forward_hook(ReluHook(gate), prepend=True)
        module.__dict__.setdefault("forward", ReluForward(module))
    else:
        module.register_forward_hook(GateHook(gate), prepend=True)


def detach(module: nn.Module) -> None:
    """Remove every gate hook of ``module``, and the ``forward`` that goes with it."""
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, GateHook)]:
        del hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)
        module._forward_hooks_always_called.pop(key, None)
    for name in [name for name, value in module.__dict__.items() if isinstance(value, ReluForward)]:
        if name == "forward":
            del module.__dict__[name]
        else:  # where somebody with a forward of their own keeps what they found
            module.__dict__[name] = types.MethodType(type(module).forward, module)
