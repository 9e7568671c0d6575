"""Gates as torch operators: a schema, derivatives in both modes, a rule for vmap, and the shortest way to call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regimewrap import torch_private


def is_recorded() -> bool:
    """Whether a compiler or a tracer records what we call."""
    if torch.compiler.is_compiling() or torch_private.is_jit_tracing():
        return True
    # make_fx and fake tensors sit on this stack; there is no public way to ask.
    return torch_private.has_dispatch_modes()


def operator(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    outputs: int = 2,
) -> Callable[..., Any]:
    """Register an operator with its derivatives and its rule for vmap; return the shortest way to call it."""
    registered: Any = torch.library.custom_op(f"regimewrap::{name}", run, mutates_args=())
    registered.register_fake(fake)
    registered.register_autograd(backward, setup_context=save)

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        """Map over a new dimension; its entries never compete with each other."""
        results = []
        for entry in range(max(info.batch_size, 1)):
            picked = list(arguments)
            for i, dim in enumerate(in_dims):
                if isinstance(dim, int) and info.batch_size:
                    # Contiguous, so that bits are in the order of the stacked result's memory.
                    picked[i] = arguments[i].select(dim, entry).contiguous()
                elif isinstance(dim, int):
                    # Of no entries the result still has a shape: that of any one.
                    shape = list(arguments[i].shape)
                    del shape[dim]
                    picked[i] = arguments[i].new_ones(shape)
            results.append(call(*picked))
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        return tuple(torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True)), (0, 0)

    registered.register_vmap(one_by_one)

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = run(*arguments)
        save(ctx, arguments, output)
        return output

    def forward_derivative(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        # What maps gradients back maps tangents forth: both are the same diagonal matrix.
        tangent = backward(ctx, tangent, None)[0]
        return (tangent, None) if outputs == 2 else tangent

    def function(**members: Callable[..., Any]) -> Any:
        members |= {"backward": backward, "vmap": one_by_one}
        return type(name, (torch.autograd.Function,), {key: staticmethod(member) for key, member in members.items()})

    eager = function(forward=forward)
    # For torch.func, whose transforms the derivative of a library operator refuses (torch 2.14).
    functional = function(forward=run, setup_context=save, jvp=forward_derivative)

    def call(*arguments: Any) -> Any:
        x = arguments[0]
        if type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or is_recorded():
            return registered(*arguments)
        if torch_private.has_functorch_transforms() or torch_private.has_forward_gradients():
            return functional.apply(*arguments)
        # Of 57 µs for a small tensor the library's way to the kernel takes 25; this way takes 1, and the last none.
        return eager.apply(*arguments) if torch.is_grad_enabled() else run(*arguments)

    return call
