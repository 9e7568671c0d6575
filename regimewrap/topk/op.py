"""``topk_gate``: zero all but the largest units of a tensor, as a torch operator with its gradient.

The keep ratio enters as a 0-d tensor on the CPU: the operator reads it when it runs, so a compiled graph serves every
ratio and never holds a stale one, and reading it waits for no device. What is kept is decided elsewhere (``plain.py``
and the kernels); this file gives it a schema, a fake kernel and a derivative, and knows nothing of models.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regimewrap import torch_private
from regimewrap.errors import BudgetError, SelectionError
from regimewrap.topk import plain, sampling
from regimewrap.topk.cpu import dispatch as cpu
from regimewrap.topk.gpu import dispatch as gpu
from regimewrap.topk.register import is_recorded, operator
from regimewrap.topk.selection import Selection, check_gradient, check_selection, effective_ratio, full_rows

#: Called as an operator, so that what watches torch's functions, such as ``verify``, does not see the ReLU in a gate.
_relu = torch.ops.aten.relu


def topk_gate(
    x: Tensor,
    keep_ratio: Tensor,
    *,
    dense_rows: Tensor | None = None,
    scope: str = "sample",
    channel_dim: int = 1,
    score: str = "magnitude",
    relative_to: str = "all",
    ties: str = "keep",
    gradient: str = "masked",
    multiplier: float = 1.0,
    after_relu: bool = False,
) -> Tensor:
    """Return ``x`` with all but the largest units of each row set to zero.

    Args:
        x: float16, bfloat16, float32 or float64; any shape, device and memory format.
        keep_ratio: 0-d float64 tensor on the CPU, above 0. From 1 on the result is ``x``, bit for bit, and so is the
            gradient.
        dense_rows: float64 tensor of shape (2,) on the CPU: a share in [0, 1), and the number of updates before this
            one. That share of the entries of the first dimension keeps all units, and these compete with no others:
            the leading entries in even updates, the trailing ones in odd ones; see ``selection.full_rows``. Their
            values and gradients are those of ``x``, bit for bit. ``None``: no entries.
        scope: what competes: the units of one "sample" (entry of the first dimension; without a second dimension each
            has one unit, which is kept), the channels of one "position", or the whole "batch".
        channel_dim: the dimension that competes in scope "position".
        score: rank by "magnitude" or signed "value".
        relative_to: keep a share of "all" units of the row, or of its "active" (non-zero) ones.
        ties: keep all units equal to the smallest one kept ("keep"), or exactly k, lowest index first ("exact").
        gradient: "masked" passes it to kept units only, "straight_through" to all.
        multiplier: of ``keep_ratio``, for this call; the product is cut at 1.
        after_relu: gate ``relu(x)``, in one pass. Backward then needs the gated output alone, whose zeros are the mask;
            a ReLU and a gate apart save two tensors. Its scores need no choice: ``score`` is not looked at.

    Returns:
        Shape, dtype, device and memory format of ``x``. At full budget, outside compilation, ``x`` itself (or
        ``relu(x)``); otherwise a new tensor. Of a row of n units the k = max(1, int(n * keep_ratio)) largest stay; NaN
        always stays.

    Raises:
        SelectionError: an argument is not one of the above.

    >>> topk_gate(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), torch.tensor(0.5, dtype=torch.float64))
    tensor([[ 0., -3.,  2.,  0.]])
    """
    selection = Selection(scope, channel_dim, score, relative_to, ties)
    check_selection(x, selection, multiplier)
    check_gradient(gradient)
    check_keep_ratio(keep_ratio)
    check_dense_rows(dense_rows)
    if _gives_full_budget(keep_ratio):
        return torch.relu(x) if after_relu else x
    x, score, saved = how_to_save(x, score, gradient, after_relu)
    y: Tensor = _select(x, keep_ratio, dense_rows, *selection._replace(score=score), multiplier, saved)[0]
    return y


def how_to_save(x: Tensor, score: str, gradient: str, after_relu: bool) -> tuple[Tensor, str, str]:
    """Return what is to be gated, its score, and what backward will mask with; the last two as for ``_gate``."""
    if after_relu and gradient == "masked":
        return x, "positive", "output"
    # torch.jit.trace checks its trace without gradients, and wants the same graph again.
    differentiable = torch.is_grad_enabled() or torch_private.is_jit_tracing()
    saved = "mask" if gradient == "masked" and differentiable else "nothing"
    return (torch.relu(x), "magnitude", saved) if after_relu else (x, score, saved)


def check_keep_ratio(keep_ratio: Tensor) -> None:
    """Refuse a keep ratio that the operator could not read without waiting for a device, or would round.

    Raises:
        SelectionError: not a 0-d float64 tensor on the CPU.
    """
    _require_float64("keep_ratio", keep_ratio, (), "a 0-d float64 tensor", "ratio")


def check_dense_rows(dense_rows: Tensor | None) -> None:
    """Refuse what does not say which rows are dense.

    Raises:
        SelectionError: neither ``None`` nor a float64 tensor of shape (2,) on the CPU.
    """
    if dense_rows is not None:
        _require_float64("dense_rows", dense_rows, (2,), "a float64 tensor of shape (2,)", "(full_share, update)")


def _require_float64(name: str, value: Tensor, shape: tuple[int, ...], kind: str, example: str) -> None:
    if not isinstance(value, Tensor):
        raise SelectionError(
            f"{name} must be {kind} on the CPU; got {value!r}. Pass torch.tensor({example}, dtype=torch.float64)."
        )
    if value.dtype != torch.float64 or value.device.type != "cpu" or value.shape != shape:
        raise SelectionError(
            f"{name} must be {kind} on the CPU; got shape {tuple(value.shape)}, {value.dtype} on {value.device}."
        )


def _gives_full_budget(keep_ratio: Tensor) -> bool:
    """Whether the operator may be skipped now; a graph that outlives this call must not remember that."""
    if is_recorded() or type(keep_ratio) not in (Tensor, torch.nn.Buffer):
        return False
    return not torch_private.is_batched(keep_ratio) and keep_ratio.item() >= 1.0


def _gate(
    x: Tensor,
    keep_ratio: Tensor,
    dense_rows: Tensor | None,
    scope: str,
    channel_dim: int,
    score: str,
    relative_to: str,
    ties: str,
    multiplier: float,
    saved: str,
) -> tuple[Tensor, Tensor]:
    """Return the gated tensor, and which units were kept if that is to be saved, else an empty tensor.

    ``saved`` names what backward will mask with: the "mask" (one bit for each unit in the order of memory), the
    "output" (after a ReLU its zeros are the mask), or "nothing", so that the gradient passes unchanged. ``score`` may
    be "positive": apply a ReLU and rank what it leaves.
    """
    y, bits = torch.empty_like(x), _empty_bits(x, saved)
    ratio = effective_ratio(keep_ratio.item(), multiplier)
    selection = Selection(scope, channel_dim, score, relative_to, ties)
    full = _full(x, dense_rows, selection)
    if ratio == 1.0 or x.numel() == 0 or full is None:
        return _relu(x) if score == "positive" else y.copy_(x), bits.fill_(0xFF)
    kernels = cpu if x.is_cpu else gpu if x.is_cuda else None
    if kernels is None or not kernels.gate(x, y, bits, ratio, selection, full):
        ranked = _relu(x) if score == "positive" else x
        after_relu = selection._replace(score="value") if score == "positive" else selection
        _write(ranked, y, bits, plain.kept(ranked, ratio, after_relu, full))
    if sampling.ON:
        sampling.note(x, y, keep_ratio, dense_rows, score)
    return y, bits


def _full(x: Tensor, dense_rows: Tensor | None, selection: Selection) -> tuple[int, int] | None:
    """Return which entries of dimension 0 are kept in full; ``None`` if that is the whole tensor."""
    if dense_rows is None:
        return 0, 0
    share, update = dense_rows.tolist()
    if share == 0.0:
        return 0, 0
    start, stop = full_rows(x.shape, selection, share, int(update))
    return None if stop - start == (x.shape[0] if x.dim() else 1) else (start, stop)


def _write(x: Tensor, y: Tensor, bits: Tensor, kept: Tensor) -> None:
    """Write the units of ``x`` that are kept to ``y``, and which these are to ``bits`` unless that is empty."""
    mask = torch.empty_like(y, dtype=torch.bool).copy_(kept)
    torch.where(mask, x, x.new_zeros(()), out=y)
    if bits.numel():
        bits.copy_(plain.pack_bits(_in_memory_order(mask)))


def _fake_gate(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _empty_bits(x, arguments[-1])


def _empty_bits(x: Tensor, saved: str) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8 if saved == "mask" else 0, dtype=torch.uint8)


def _save_for_gate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, bits = output
    ctx.saved, ctx.stride = inputs[-1], y.stride()
    kept = {"output": (y,), "mask": (bits,), "nothing": ()}[ctx.saved]
    ctx.save_for_forward(*kept)
    ctx.budget = _budget(y, *inputs[1:3])
    if ctx.budget is not None:
        with torch_private.no_dispatch_modes():  # selective checkpointing counts operations
            kept = (*kept, torch.tensor(ctx.budget, device="cpu"))
    ctx.save_for_backward(*kept)


def _budget(y: Tensor, keep_ratio: Tensor, dense_rows: Tensor | None) -> list[int] | None:
    """Return what was kept as whole numbers, if something other than autograd keeps the tensors that are saved.

    Activation checkpointing does: it makes them anew for the backward pass, in a forward pass of its own, which must
    be at the same budget. What this returns is remembered by autograd and, as a tensor, saved with the others: if they
    differ in the backward pass, the budget did. The bits of the ratio, as hooks may round what is saved.
    """
    if not torch_private.has_saved_tensor_hooks() or type(keep_ratio) is not Tensor:
        return None
    if torch.compiler.is_compiling() or torch_private.has_functorch_transforms():
        return None
    full = _full(y, dense_rows, Selection()) or (0, -1)
    return [struct.unpack("<q", struct.pack("<d", keep_ratio.item()))[0], *full]


def _check_budget(then: list[int], saved: Tensor) -> None:
    if saved.dtype == torch.int64 and saved.tolist() != then:
        raise BudgetError(*map(_words, (then, saved.tolist())))


def _words(budget: list[int]) -> str:
    bits, start, stop = budget
    ratio = struct.unpack("<d", struct.pack("<q", bits))[0]
    rows = "no" if stop == start else f"{stop - start} of its" if stop > start else "all"
    return f"keep ratio {ratio:g} with {rows} rows dense"


def _gate_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: what is recomputed can be had only once
    if ctx.budget is not None and saved:  # not in forward mode
        _check_budget(ctx.budget, saved[-1])
    if ctx.saved == "output":
        grad = torch.ops.aten.threshold_backward(grad, saved[0], 0)
    elif ctx.saved == "mask":
        grad = _mask(grad, saved[0], ctx.stride)
    return (grad, *[None] * 9)


def _masked(grad: Tensor, bits: Tensor, stride: Sequence[int]) -> Tensor:
    """Return ``grad`` where a bit is set and zero elsewhere; ``stride`` is that of the tensor the bits came from."""
    if torch_private.is_batched(grad):  # autograd.grad(is_grads_batched=True), which operators know nothing of
        mask = torch.empty_strided(grad.shape, stride, dtype=torch.bool, device=grad.device)
        _in_memory_order(mask).copy_(plain.unpack_bits(bits, grad.numel()))
        return torch.where(mask, grad, 0.0)
    masked = grad.new_empty_strided(grad.shape, stride)
    if grad.stride() != masked.stride() or grad.is_neg():
        grad = torch.empty_like(masked).copy_(grad)
    kernels = cpu if grad.is_cpu else gpu if grad.is_cuda else None
    if kernels is not None and grad.numel() and kernels.mask_gradient(grad, bits, masked):
        return masked
    mask = torch.empty_like(masked, dtype=torch.bool)
    _in_memory_order(mask).copy_(plain.unpack_bits(bits, grad.numel()))
    torch.where(mask, grad, grad.new_zeros(()), out=masked)
    return masked


def _fake_masked(grad: Tensor, _: Tensor, stride: Sequence[int]) -> Tensor:
    return grad.new_empty_strided(grad.shape, stride)


def _save_bits(ctx: Any, inputs: tuple[Tensor, Tensor, Sequence[int]], output: Tensor) -> None:
    del output
    _, bits, ctx.stride = inputs
    ctx.save_for_backward(bits)
    ctx.save_for_forward(bits)


def _mask_backward(ctx: Any, grad: Tensor, _: Any = None) -> tuple[Tensor, None, None]:
    # Masking is linear, so its derivative is the same mask.
    return _mask(grad, ctx.saved_tensors[0], ctx.stride), None, None


def _in_memory_order(dense: Tensor) -> Tensor:
    """View a tensor that fills its memory without gaps as one dimension."""
    return dense.as_strided((dense.numel(),), (1,))


_select = operator("topk_gate", _gate, _fake_gate, _save_for_gate, _gate_backward)
_mask = operator("masked_gradient", _masked, _fake_masked, _save_bits, _mask_backward, outputs=1)
