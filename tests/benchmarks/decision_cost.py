"""What a decision costs on the ranks of this machine, beside what an update without one does.

    python tests/benchmarks/decision_cost.py
    torchrun --standalone --nproc-per-node=2 tests/benchmarks/decision_cost.py

Medians in microseconds on rank 0, of a decision and of an update without one; then of what a decision is made of, a
reduction of five numbers and a broadcast of two, by themselves; and the same with DistributedDataParallel's share of an
update, a reduction of a million parameters, for comparison. gloo, on the CPU.
"""

# ruff: noqa: T201  a script prints
from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from regimewrap import RegimeCycler, RegimePolicy, TopKGate

ROUNDS = 500


def median_us(work: Callable[[], object]) -> float:
    """Return the median time of ``work`` in microseconds; ranks begin each round together."""
    times = []
    for _ in range(ROUNDS):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    deciding = RegimeCycler(TopKGate(RegimePolicy().replace(cycle={"every": 1})))
    counting = RegimeCycler(TopKGate(RegimePolicy().replace(cycle={"every": 10**9})))
    loss = torch.tensor(1.0)
    rows = {"decision": lambda: deciding.step(loss), "update without one": lambda: counting.step(loss)}
    if ranks > 1:
        five, two, gradient = (
            torch.zeros(5, dtype=torch.float64),
            torch.zeros(2, dtype=torch.float64),
            torch.zeros(10**6),
        )
        rows["reduction and broadcast alone"] = lambda: (dist.all_reduce(five), dist.broadcast(two, 0))
        rows["reduction of a million gradients"] = lambda: dist.all_reduce(gradient)
    measured = {name: median_us(work) for name, work in rows.items()}
    if ranks == 1 or dist.get_rank() == 0:
        print(f"{ranks} ranks, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}")
        for name, us in measured.items():
            print(f"{name:34} {us:10.1f} us")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
