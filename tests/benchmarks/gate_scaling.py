"""How the gate's time grows with the number of elements, over four decades, and depends on the keep ratio.

    python tests/benchmarks/gate_scaling.py [--plot scaling.png]

Forward and backward of ``relu_gate``, of ``topk_gate`` and of a ReLU alone, in rows of 16,384 elements where there are
as many, at keep ratio 0.2; the longest of the times at keep ratios from 0.02 to 0.9 that cut something as a multiple of
the shortest; the time at 0.9 as a multiple of that at 0.2; and the time at each of these for a million elements. After
a ReLU half of the units are zero, so ``relu_gate`` has nothing to cut from 0.5 on. A small tensor's time is that of the
call, whatever its size. Memory is warm: what is freed is used again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from gate_speed import step
from paired import Rounds, arguments, keep_memory, show

from regimewrap.topk.op import topk_gate


def relu_gate(x: torch.Tensor, keep_ratio: torch.Tensor) -> torch.Tensor:
    return topk_gate(x, keep_ratio, after_relu=True)


ELEMENTS = (1_000, 4_000, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 10_485_760)
MILLION = 1_048_576
KEEP_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9)
GATES = (relu_gate, topk_gate)
SLOWEST = "slowest/fastest that cuts"


def main() -> None:
    options = arguments(__doc__, plot="")
    keep_memory()
    # A tensor this large makes the kernels load, which then serve small ones too, as in a real network.
    for gate in GATES:
        gate(torch.randn(1, 16384), torch.tensor(0.2, dtype=torch.float64))
    by_size: list[dict[str, Any]] = []
    by_ratio: list[dict[str, Any]] = []
    for elements in ELEMENTS:
        x = torch.randn(max(1, elements // 16384), min(elements, 16384))
        upstream = torch.randn_like(x)
        contenders: dict[Any, Callable[[], object]] = {"relu": step(torch.relu, x, upstream)}
        for gate in GATES:
            for keep_ratio in KEEP_RATIOS:
                gated = functools.partial(gate, keep_ratio=torch.tensor(keep_ratio, dtype=torch.float64))
                contenders[gate, keep_ratio] = step(gated, x, upstream)
        times = Rounds(contenders, options.rounds)
        for gate in GATES:
            each = {keep_ratio: times.seconds((gate, keep_ratio)) for keep_ratio in KEEP_RATIOS}
            cutting = [each[keep_ratio] for keep_ratio in KEEP_RATIOS if gate is topk_gate or keep_ratio < 0.5]
            by_size.append(
                {
                    "gate": gate.__name__,
                    "elements": elements,
                    "us": each[0.2] * 1e6,
                    "relu us": times.seconds("relu") * 1e6,
                    "ns/element": each[0.2] / elements * 1e9,
                    SLOWEST: max(cutting) / min(cutting),
                    "0.9/0.2": each[0.9] / each[0.2],
                }
            )
            if elements == MILLION:
                by_ratio += [
                    {"gate": gate.__name__, "keep ratio": keep_ratio, "ns/element": seconds / elements * 1e9}
                    for keep_ratio, seconds in each.items()
                ]
    by_size.sort(key=lambda row: row["gate"])
    show(by_size, options, by=("gate", "elements"), targets={SLOWEST: "<= 1.5"})
    show(by_ratio, options, by=("gate", "keep ratio"))
    if options.plot:
        draw(by_size, by_ratio, options.plot)


def draw(by_size: list[dict[str, Any]], by_ratio: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    growth, ratios = figure.subplots(1, 2)
    for gate in GATES:
        rows = [row for row in by_size if row["gate"] == gate.__name__]
        growth.loglog([row["elements"] for row in rows], [row["us"] for row in rows], "o-", label=gate.__name__)
        rows = [row for row in by_ratio if row["gate"] == gate.__name__]
        ratios.plot([row["keep ratio"] for row in rows], [row["ns/element"] for row in rows], "o-", label=gate.__name__)
    rows = by_size[: len(ELEMENTS)]
    growth.loglog([row["elements"] for row in rows], [row["relu us"] for row in rows], "s:", color="gray", label="ReLU")
    last = by_size[-1]
    line = [last["us"] * elements / last["elements"] for elements in (ELEMENTS[0], ELEMENTS[-1])]
    growth.loglog([ELEMENTS[0], ELEMENTS[-1]], line, "--", color="lightgray", zorder=0, label="proportional")
    growth.set(xlabel="elements", ylabel="forward and backward, µs", title="keep ratio 0.2")
    ratios.set(xlabel="keep ratio", ylabel="forward and backward, ns an element", title=f"{MILLION:,} elements", ylim=0)
    growth.legend(frameon=False)
    ratios.legend(frameon=False)
    for axes in (growth, ratios):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
