"""Milliseconds of the networks of docs/evidence: one trained at many budgets and served, against thinner dense ones.

Weights are random, as the time depends on shapes and densities alone. The input is one image of 16×16 pixels. All
networks take turns in each round; between two passes other memory is read, so that weights come from there.

    python tests/benchmarks/study_latency.py [--net wrn|mlp] [--threads 1] [--json docs/evidence/latency-wrn.json]
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import Any

import paired
import torch
from torch import nn

import regimewrap
from regimewrap.recipes.study.nets import hidden_layers
from regimewrap.recipes.wide_resnet import WideResNet

#: Bytes that are read between two passes; more than most caches hold.
_BETWEEN = 1 << 28
_KEEP_RATIOS = (0.2, 0.1, 0.05)
_WIDTHS = {"wrn": (4, 3, 2, 1), "mlp": (3072, 2048, 1536, 1024, 768, 512)}


def build(net: str, width: int) -> nn.Module:
    """Return a network of the study, without training."""
    torch.manual_seed(paired.SEED)
    model = WideResNet(28, width) if net == "wrn" else hidden_layers(3 * 16 * 16, 3, width, 10)
    return model.eval()


def main() -> None:
    """Time the dense networks and the widest one served at each keep ratio."""
    options = paired.arguments(__doc__, net="wrn", rounds=41)
    x, other = torch.randn(1, 3, 16, 16), torch.randn(_BETWEEN // 4)
    widths = _WIDTHS[options.net]
    runs: dict[tuple[str, float], Any] = {("dense", width): build(options.net, width) for width in widths}
    with ExitStack() as stack, torch.no_grad():
        for keep_ratio in _KEEP_RATIOS:
            model = regimewrap.wrap(build(options.net, widths[0]))
            stack.enter_context(regimewrap.serve(model, keep_ratio, example_inputs=x))
            runs["served", keep_ratio] = model
        seconds: dict[tuple[str, float], list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds + 3):
            for name, model in runs.items():
                other.sum()
                start = time.perf_counter()
                model(x)
                seconds[name].append(time.perf_counter() - start)
    full = seconds["dense", widths[0]][3:]
    rows = [
        {
            "way": way,
            "width or keep ratio": value,
            "ms": 1000 * statistics.median(times[3:]),
            "share of dense": statistics.median(a / b for a, b in zip(times[3:], full, strict=True)),
        }
        for (way, value), times in seconds.items()
    ]
    paired.show(rows, options, by=("way", "width or keep ratio"))


if __name__ == "__main__":
    main()
