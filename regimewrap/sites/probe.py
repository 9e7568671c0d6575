"""Run a model once to look at it, and leave no trace: buffers and random number generators are as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from regimewrap.errors import WrapError
from regimewrap.torch_private import tree_leaves


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers and torch's random number generators on the way out."""
    # A forward pass may change a buffer or put another one in its place.
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if buffer.shape != before.shape:  # observers of torch.ao grow on their first batch
                    buffer.resize_(before.shape)
                buffer.copy_(before)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs as positional and keyword arguments; they are ``(x, y)``, ``{"x": x}`` or ``x`` alone."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def own(model: nn.Module) -> nn.Module:
    """Return what may be run in a model's place: itself, or a copy where running it would make its lazy layers.

    Raises:
        WrapError: it has lazy layers and cannot be copied.
    """
    lazy = [each for each in model.buffers() if isinstance(each, UninitializedBuffer)]
    if not lazy and not any(map(is_lazy, model.parameters())):
        return model
    try:
        # torch can copy lazy parameters, but not lazy buffers.
        empty: Any = UninitializedBuffer  # its type has no argument for the device
        return copy.deepcopy(model, {id(each): empty(device=each.device) for each in lazy})
    except Exception as error:
        raise WrapError(
            f"{type(model).__name__} has lazy layers and cannot be copied ({error}); call it once, then wrap it."
        ) from error


@dataclass
class Shapes:
    """What the modules of a model took and returned in one forward pass: shapes by dotted name.

    Attributes:
        batch: size of the first dimension of the model's first tensor.
        inputs: of each module's first tensor.
        outputs: of what each module returned, if that is one tensor.
    """

    batch: int | None = None
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def record(self, name: str, inputs: Any, output: Any) -> None:
        """Record one call of the module with this name."""
        taken = next((each for each in tree_leaves(inputs) if isinstance(each, Tensor)), None)
        if taken is not None:
            self.inputs[name] = tuple(taken.shape)
            if not name and taken.ndim:
                self.batch = taken.shape[0]
        if isinstance(output, Tensor):
            self.outputs[name] = tuple(output.shape)
