"""How the gate's time grows with the number of elements, over four decades, and depends on the keep ratio.

    python tests/benchmarks/gate_scaling.py [--plot scaling.png]

Forward and backward of ``relu_gate`` and of ``topk_gate``, in nanoseconds an element, in rows of 16,384 elements where
there are as many; then the longest of the times at keep ratios from 0.01 to 0.9 as a multiple of the shortest.
"""

from __future__ import annotations

import functools

import torch
from gate_speed import step
from paired import Rounds, arguments, show

from regimewrap.topk.op import relu_gate, topk_gate


def ratio(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def main() -> None:
    options = arguments(__doc__, plot="")
    rows = []
    for elements in (4_000, 16_000, 64_000, 250_000, 1_000_000, 4_000_000, 16_000_000, 40_000_000):
        x = torch.randn(max(1, elements // 16384), min(elements, 16384))
        upstream = torch.randn_like(x)
        row: dict[str, float] = {"elements": x.numel()}
        for function in (relu_gate, topk_gate):
            contenders = {
                str(keep_ratio): step(functools.partial(function, keep_ratio=ratio(keep_ratio)), x, upstream)
                for keep_ratio in (0.01, 0.1, 0.2, 0.4, 0.6, 0.9)
            }
            times = Rounds(contenders, options.rounds)
            each = [times.seconds(name) for name in contenders]
            row[f"{function.__name__} ns/element"] = times.seconds("0.2") / x.numel() * 1e9
            row[f"{function.__name__} slowest/fastest ratio"] = max(each) / min(each)
        rows.append(row)
    show(rows, options)
    if options.plot:
        draw(rows, options.plot)


def draw(rows: list[dict[str, float]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("relu_gate", "topk_gate"):
        elements = [row["elements"] for row in rows]
        axes.loglog(elements, [row["elements"] * row[f"{name} ns/element"] / 1e6 for row in rows], "o-", label=name)
    axes.set(xlabel="elements", ylabel="forward and backward, ms")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
