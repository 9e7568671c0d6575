"""Run a model once to look at it, and leave no trace: buffers and random number generators are as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regimewrap.torch_private import tree_leaves


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers and torch's random number generators on the way out."""
    # A forward pass may change a buffer or put another one in its place.
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                buffer.copy_(before)


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments: a tuple or list is the former, a mapping the latter, else it is one."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def run(model: nn.Module, example_inputs: Any) -> Any:
    """Return what a model returns for example inputs, without gradients."""
    args, kwargs = as_call(example_inputs)
    with untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(*args, **kwargs)


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
        """Take down one call of the module of that name."""
        taken = next((each for each in tree_leaves(inputs) if isinstance(each, Tensor)), None)
        if taken is not None:
            self.inputs[name] = tuple(taken.shape)
            if not name and taken.ndim:
                self.batch = taken.shape[0]
        if isinstance(output, Tensor):
            self.outputs[name] = tuple(output.shape)


def activation_shapes(model: nn.Module, example_inputs: Any) -> Shapes:
    """Run a model once and return what its modules took and returned."""
    shapes = Shapes()

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001  torch's signature
            shapes.record(name, (args, kwargs), output)

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
