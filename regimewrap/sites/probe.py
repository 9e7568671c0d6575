"""Run a model once to look at it, and leave no trace: buffers and random number generators are as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regimewrap.sites import catalog


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


def activation_shapes(model: nn.Module, example_inputs: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of what each activation module returns, by dotted name."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001  torch fixes the signature
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape)

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule) and catalog.kind_of_module(module) is not None
    ]
    try:
        run(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
