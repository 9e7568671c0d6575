"""``topk_gate``: zero all but the largest units of a tensor, as a torch operator with its gradient.

The keep ratio enters as a 0-d tensor on the CPU: the operator reads it when it runs, so a compiled graph serves every
ratio and never holds a stale one, and reading it waits for no device. What is kept is decided elsewhere (``plain.py``
and the kernels); this file gives it a schema, a fake kernel and a derivative, and knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003  custom_op reads annotations when it runs
from typing import Any

import torch
from torch import Tensor

from regimewrap.errors import SelectionError
from regimewrap.topk import plain
from regimewrap.topk.selection import Selection, check_gradient, check_selection, effective_ratio


def topk_gate(
    x: Tensor,
    keep_ratio: Tensor,
    *,
    scope: str = "sample",
    channel_dim: int = 1,
    score: str = "magnitude",
    relative_to: str = "all",
    ties: str = "keep",
    gradient: str = "masked",
    multiplier: float = 1.0,
) -> Tensor:
    """Return ``x`` with all but the largest units of each row set to zero.

    Args:
        x: float16, bfloat16, float32 or float64; any shape, device and memory format.
        keep_ratio: 0-d float64 tensor on the CPU, above 0. From 1 on the result is ``x``, bit for bit, and so is the
            gradient.
        scope: what competes: the units of one "sample" (entry of the first dimension; without a second dimension each
            has one unit, which is kept), the channels of one "position", or the whole "batch".
        channel_dim: the dimension that competes in scope "position".
        score: rank by "magnitude" or signed "value".
        relative_to: keep a share of "all" units of the row, or of its "active" (non-zero) ones.
        ties: keep all units equal to the smallest one kept ("keep"), or exactly k, lowest index first ("exact").
        gradient: "masked" passes it to kept units only, "straight_through" to all.
        multiplier: of ``keep_ratio``, for this call; the product is cut at 1.

    Returns:
        Shape, dtype, device and memory format of ``x``. At full budget, outside compilation, ``x`` itself; otherwise a
        new tensor. Of a row of n units the k = max(1, int(n * keep_ratio)) largest stay; NaN always stays.

    Raises:
        SelectionError: an argument is not one of the above.
    """
    selection = Selection(scope, channel_dim, score, relative_to, ties)
    check_selection(x, selection, multiplier)
    check_gradient(gradient)
    check_keep_ratio(keep_ratio)
    if _gives_full_budget(keep_ratio):
        return x
    masked = gradient == "masked" and torch.is_grad_enabled()
    y: Tensor = _topk_gate(x, keep_ratio, *selection, multiplier, masked)[0]
    return y


def check_keep_ratio(keep_ratio: Tensor) -> None:
    """Refuse a keep ratio that the operator could not read without waiting for a device, or would round.

    Raises:
        SelectionError: not a 0-d float64 tensor on the CPU.
    """
    if not isinstance(keep_ratio, Tensor):
        raise SelectionError(
            f"keep_ratio must be a 0-d float64 tensor on the CPU; got {keep_ratio!r}. "
            "Pass torch.tensor(ratio, dtype=torch.float64)."
        )
    if keep_ratio.dtype != torch.float64 or keep_ratio.device.type != "cpu" or keep_ratio.dim() != 0:
        raise SelectionError(
            "keep_ratio must be a 0-d float64 tensor on the CPU; got shape "
            f"{tuple(keep_ratio.shape)}, {keep_ratio.dtype} on {keep_ratio.device}."
        )


def _gives_full_budget(keep_ratio: Tensor) -> bool:
    """Whether the operator may be skipped now; a graph that outlives this call must not remember that."""
    if torch.compiler.is_compiling() or type(keep_ratio) not in (Tensor, torch.nn.Buffer):
        return False
    # make_fx and other tracers sit on this stack and would record the bypass; there is no public way to ask.
    return torch._C._len_torch_dispatch_stack() == 0 and keep_ratio.item() >= 1.0


@torch.library.custom_op("regimewrap::topk_gate", mutates_args=())
def _topk_gate(
    x: Tensor,
    keep_ratio: Tensor,
    scope: str,
    channel_dim: int,
    score: str,
    relative_to: str,
    ties: str,
    multiplier: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gated tensor, and which units were kept: one bit each in the order of memory, or no byte at all."""
    selection = Selection(scope, channel_dim, score, relative_to, ties)
    ratio = effective_ratio(keep_ratio.item(), multiplier)
    y = torch.empty_like(x)
    bits = x.new_empty(_mask_bytes(x, with_mask), dtype=torch.uint8)
    if ratio == 1.0 or x.numel() == 0:
        return y.copy_(x), bits.fill_(0xFF)
    mask = torch.empty_like(x, dtype=torch.bool).copy_(plain.kept(x, ratio, selection))
    torch.where(mask, x, x.new_zeros(()), out=y)
    if with_mask:
        bits.copy_(plain.pack_bits(_in_memory_order(mask)))
    return y, bits


@_topk_gate.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(_mask_bytes(x, with_mask=arguments[-1]), dtype=torch.uint8)


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, bits = output
    ctx.with_mask = inputs[-1]
    if ctx.with_mask:
        ctx.stride = y.stride()
        ctx.save_for_backward(bits)


def _topk_gate_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if ctx.with_mask:
        grad = _masked_gradient(grad, ctx.saved_tensors[0], ctx.stride)
    return (grad, *[None] * 8)


_topk_gate.register_autograd(_topk_gate_backward, setup_context=_save_mask)


@torch.library.custom_op("regimewrap::masked_gradient", mutates_args=())
def _masked_gradient(grad: Tensor, bits: Tensor, stride: Sequence[int]) -> Tensor:
    """Return ``grad`` where a bit is set and zero elsewhere; ``stride`` is that of the tensor the bits came from."""
    masked = grad.new_empty_strided(grad.shape, stride)
    mask = torch.empty_like(masked, dtype=torch.bool)
    _in_memory_order(mask).copy_(plain.unpack_bits(bits, grad.numel()))
    torch.where(mask, grad, grad.new_zeros(()), out=masked)
    return masked


@_masked_gradient.register_fake
def _(grad: Tensor, _: Tensor, stride: Sequence[int]) -> Tensor:
    return grad.new_empty_strided(grad.shape, stride)


def _save_bits(ctx: Any, inputs: tuple[Tensor, Tensor, Sequence[int]], output: Tensor) -> None:
    del output
    _, bits, ctx.stride = inputs
    ctx.save_for_backward(bits)


def _masked_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    # Masking is linear, so its derivative is the same mask.
    return _masked_gradient(grad, ctx.saved_tensors[0], ctx.stride), None, None


_masked_gradient.register_autograd(_masked_gradient_backward, setup_context=_save_bits)


def _mask_bytes(x: Tensor, with_mask: bool) -> int:
    return (x.numel() + 7) // 8 if with_mask else 0


def _in_memory_order(dense: Tensor) -> Tensor:
    """View a tensor that fills its memory without gaps as one dimension."""
    return dense.as_strided((dense.numel(),), (1,))
