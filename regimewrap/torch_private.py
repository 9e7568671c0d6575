"""Every private name of torch that this package uses, one small function each; a test calls every one of them.

A new torch may take any of these away. Then this file is the only one to mend. Nothing here knows of gates or models.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

#: What every BatchNorm layer is, in any number of dimensions.
BatchNorm = nn.modules.batchnorm._BatchNorm

#: What every BatchNorm and InstanceNorm layer is, and what every convolution is, in any number of dimensions.
BatchOrInstanceNorm = nn.modules.batchnorm._NormBase
Convolution = nn.modules.conv._ConvNd

#: Operators of torch's, with one signature and with all.
OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)

#: The leaves of nested lists, tuples and dicts.
tree_leaves = _pytree.tree_leaves

#: A context in which no dispatch mode sees, makes or counts tensors; works from its creation on.
no_dispatch_modes = torch._C._DisableTorchDispatch

#: The settings of torch's compiler, a module that is loaded only once something is compiled.
COMPILER_CONFIG = "torch._dynamo.config"


def in_backward() -> bool:
    """Say whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() >= 0


def is_jit_tracing() -> bool:
    """Say whether ``torch.jit.trace`` is recording."""
    return torch._C._get_tracing_state() is not None


def has_dispatch_modes() -> bool:
    """Say whether a mode such as ``make_fx`` or fake tensors sees every operation."""
    return torch._C._len_torch_dispatch_stack() > 0


def has_functorch_transforms() -> bool:
    """Say whether a transform of ``torch.func`` is running."""
    return torch._C._are_functorch_transforms_active()


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; an optimizer's update counts."""
    return tensor._version


def is_batched(tensor: Tensor) -> bool:
    """Say whether ``vmap``, old or new, maps over a dimension of this tensor that its shape does not show."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def has_saved_tensor_hooks() -> bool:
    """Say whether something packs what autograd saves, as activation checkpointing does."""
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def has_forward_gradients() -> bool:
    """Say whether derivatives may be computed in forward mode: inside ``forward_ad.dual_level()``."""
    return torch.autograd.forward_ad._current_level >= 0


def functions_so_far() -> int:
    """Return how many functions autograd has recorded in this thread: the number of the next one."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def recomputing_function() -> int | None:
    """Return the number of the Python function whose backward is running in this thread; ``None`` if none is.

    ``None`` also while saved tensors are recomputed one by one, as the checkpoints that are not reentrant do: any
    function of the forward pass can be the first to ask for them.
    """
    node: Any = torch._C._current_autograd_node()
    if not isinstance(node, torch.autograd.function.FunctionCtx):
        return None
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None and hooks[0].__qualname__.startswith("_recomputation_hook"):
        return None
    number: int = node._sequence_nr()  # type: ignore[attr-defined]
    return number


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """Return a module's forward hooks by their numbers."""
    return module._forward_hooks


def remove_forward_hook(module: nn.Module, number: int) -> None:
    """Take a forward hook off a module, of which the handle is not at hand."""
    for hooks in (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
        hooks.pop(number, None)


def has_hooks(module: nn.Module) -> bool:
    """Say whether a module has a hook of any kind."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_compiled_module(model: object) -> bool:
    """Say whether ``model`` is what ``torch.compile(module)`` returns; does not load the compiler."""
    return "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.OptimizedModule)


def original_of(compiled: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was called with."""
    original: nn.Module = compiled._orig_mod  # type: ignore[assignment]
    return original


def compiles_itself(module: nn.Module) -> bool:
    """Say whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def has_compiled_code() -> bool:
    """Say whether the compiler, which must be loaded, has seen any code."""
    return bool(torch._dynamo.convert_frame.input_codes.seen)
