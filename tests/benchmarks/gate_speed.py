"""ReLU and gate, forward and backward, against the published method's way and against the ReLU alone.

    python tests/benchmarks/gate_speed.py [--batch 32] [--full-share 0.5]

At the three shapes of a WRN-28-4's activations. The published way ranks with ``torch.topk``, scatters ones into a mask
and multiplies. What is "warm" writes into memory that it has written before; all else allocates as in training, where
the first touch of new memory can cost more than the arithmetic. Columns: nanoseconds a unit of ``relu_gate``, warm and
not; how many times longer the published way takes; ``relu_gate`` as a multiple of a ReLU, warm and not; the same for a
ReLU and a gate behind it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from paired import Rounds, arguments, show
from torch import Tensor

from regimewrap.topk.cpu import dispatch as cpu
from regimewrap.topk.op import topk_gate
from regimewrap.topk.selection import Selection, full_rows

relu_gate = functools.partial(topk_gate, after_relu=True)

SHAPES = ((64, 32, 32), (128, 16, 16), (256, 8, 8))


def published_way(x: Tensor, keep_ratio: float) -> Tensor:
    rows = torch.relu(x).flatten(1)
    k = max(1, int(rows.shape[1] * keep_ratio))
    mask = torch.zeros_like(rows).scatter_(1, rows.topk(k, dim=1).indices, 1.0)
    return (rows * mask).view_as(x)


def step(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Callable[[], object]:
    leaf = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf), leaf, upstream)


def warm_relu(x: Tensor, upstream: Tensor) -> Callable[[], object]:
    y, grad = torch.empty_like(x), torch.empty_like(x)

    def run() -> None:
        torch.clamp_min(x, 0, out=y)
        torch.ops.aten.threshold_backward.grad_input(upstream, y, 0, grad_input=grad)

    return run


def warm_gate(x: Tensor, upstream: Tensor, keep_ratio: float, full_share: float) -> Callable[[], object]:
    y, grad, bits = torch.empty_like(x), torch.empty_like(x), torch.empty(0, dtype=torch.uint8)
    selection = Selection(score="positive")
    full = full_rows(x.shape, selection, full_share, 0)

    def run() -> None:
        if not cpu.gate(x, y, bits, keep_ratio, selection, full):
            raise RuntimeError("no kernel serves this tensor")
        torch.ops.aten.threshold_backward.grad_input(upstream, y, 0, grad_input=grad)

    return run


def main() -> None:
    options = arguments(__doc__, batch=32, full_share=0.0)
    rows, rows_dense = [], torch.tensor((options.full_share, 0), dtype=torch.float64)
    for shape in SHAPES:
        x = torch.randn(options.batch, *shape)
        upstream = torch.randn_like(x)
        for keep_ratio in (0.5, 0.2, 0.05):
            r = torch.tensor(keep_ratio, dtype=torch.float64)
            contenders = {
                "published": step(lambda x, k=keep_ratio: published_way(x, k), x, upstream),
                "gate": step(lambda x, r=r: relu_gate(x, r, dense_rows=rows_dense), x, upstream),
                "behind": step(lambda x, r=r: topk_gate(torch.relu(x), r, dense_rows=rows_dense), x, upstream),
                "relu": step(torch.relu, x, upstream),
                "warm gate": warm_gate(x, upstream, keep_ratio, options.full_share),
                "warm relu": warm_relu(x, upstream),
            }
            times = Rounds(contenders, options.rounds)
            rows.append(
                {
                    "units": x[0].numel(),
                    "full share": options.full_share,
                    "keep ratio": keep_ratio,
                    "warm ns": times.seconds("warm gate") / x.numel() * 1e9,
                    "gate ns": times.seconds("gate") / x.numel() * 1e9,
                    "published/gate": times.ratio("published", "gate"),
                    "warm gate/warm relu": times.ratio("warm gate", "warm relu"),
                    "gate/relu": times.ratio("gate", "relu"),
                    "behind/relu": times.ratio("behind", "relu"),
                }
            )
    show(
        rows,
        options,
        by=("units", "full share", "keep ratio"),
        targets={"published/gate": ">= 4", "warm gate/warm relu": "<= 5"},
    )


if __name__ == "__main__":
    main()
