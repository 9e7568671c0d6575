"""Which checkpointed forward pass is running or being recomputed, so that a recomputation repeats what it computed.

Activation checkpointing (``torch.utils.checkpoint``, in both of its modes) runs a part of a model again during the
backward pass, and hands its caller no token that tells which forward pass that repeats. What torch itself keeps from
the one to the other is found on the Python stack: ``ctx`` of an autograd function, or the frame of a checkpoint. A
dictionary on it is the memory of that forward pass; it goes when the graph goes. This room knows nothing of gates.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

from regimewrap import torch_private

_MEMORY = "_regimewrap_memory"


def is_likely() -> bool:
    """Say quickly whether a checkpointed forward pass, or its recomputation, may be running in this thread."""
    if torch_private.in_backward() or torch_private.has_saved_tensor_hooks():
        return True
    # The reentrant mode runs inside the forward pass of an autograd function, which no_grad alone does not look like.
    return not (
        torch.is_grad_enabled() or torch_private.is_forward_gradient_enabled() or torch.is_inference_mode_enabled()
    )


def memories() -> tuple[list[dict[Any, Any]], dict[Any, Any] | None]:
    """Look through the stack.

    Returns:
        The memories of the checkpointed forward passes that are running, innermost first, up to the recomputation that
        they are part of; and the memory of the forward pass that is being recomputed, if one is.
    """
    running: list[dict[Any, Any]] = []
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name in ("forward", "backward") and frame.f_code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals["ctx"]
            if isinstance(ctx, FunctionCtx):
                if name == "backward":
                    return running, _memory(ctx)
                running.append(_memory(ctx))
        elif frame.f_globals is checkpoint.__dict__:
            if name == "unpack_hook" and "frame" in frame.f_locals:
                return running, _memory(frame.f_locals["frame"])
            generator = getattr(frame.f_locals.get("gen"), "gi_frame", None)
            if generator is not None and "new_frame" in generator.f_locals:
                running.append(_memory(generator.f_locals["new_frame"]))
        frame = frame.f_back  # type: ignore[assignment]
    return running, None


def _memory(holder: Any) -> dict[Any, Any]:
    if not hasattr(holder, _MEMORY):
        setattr(holder, _MEMORY, {})
    memory: dict[Any, Any] = getattr(holder, _MEMORY)
    return memory
