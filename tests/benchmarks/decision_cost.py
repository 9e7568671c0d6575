"""What a decision costs on the ranks of this machine, beside what an update without one does.

    python tests/benchmarks/decision_cost.py
    torchrun --standalone --nproc-per-node=2 tests/benchmarks/decision_cost.py

Medians in microseconds on rank 0, each after a forward pass: an update without a decision; one of the default policy,
whose ratio moves at each update; one in scope "network", which ends a histogram; and one with a decision. With several
ranks also what a decision is made of, a reduction of five numbers and a broadcast of two, by themselves; and, for
comparison, DistributedDataParallel's share of an update, a reduction of a million parameters. gloo, on the CPU.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from paired import arguments, show
from torch import nn

from regimewrap import RegimeCycler, RegimePolicy, TopKGate, gate_of, wrap


def median_us(work: Callable[[], object], rounds: int, before: Callable[[], object]) -> float:
    """Return the median time of ``work`` in microseconds, each after ``before``; ranks begin each round together."""
    times = []
    for _ in range(rounds):
        before()
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    options = arguments(__doc__, rounds=500)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    closed = RegimePolicy(cycle={"strategy": {"kind": "ema-reset"}})
    deciding = RegimeCycler(TopKGate(closed.replace(cycle={"every": 1})))
    counting = RegimeCycler(TopKGate(closed.replace(cycle={"every": 10**9})))
    default = wrap(nn.Sequential(nn.Linear(64, 256), nn.ReLU()))
    spread = RegimeCycler(default)
    model = wrap(
        nn.Sequential(nn.Linear(64, 256), nn.ReLU()),
        closed.replace(gate={"scope": "network"}, cycle={"every": 10**9}),
    )
    sharing, x = RegimeCycler(model), torch.randn(64, 64)
    gate_of(model).set_keep_ratio(0.2)
    loss = torch.tensor(1.0)
    work = {
        "update without a decision, us": lambda: counting.step(loss),
        "update of the default policy, us": lambda: spread.step(loss),
        'the same in scope "network", us': lambda: sharing.step(loss),
        "with a decision, us": lambda: deciding.step(loss),
    }
    if ranks > 1:
        five, two, gradient = (
            torch.zeros(5, dtype=torch.float64),
            torch.zeros(2, dtype=torch.float64),
            torch.zeros(10**6),
        )
        work["reduction and broadcast alone, us"] = lambda: (dist.all_reduce(five), dist.broadcast(two, 0))
        work["reduction of a million gradients, us"] = lambda: dist.all_reduce(gradient)
    row = {
        "ranks": ranks,
        **{name: median_us(each, options.rounds, lambda: (model(x), default(x))) for name, each in work.items()},
    }
    if ranks == 1 or dist.get_rank() == 0:
        show([row], options, by=("ranks",), targets=dict.fromkeys(tuple(work)[:2], "<= 20"))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
