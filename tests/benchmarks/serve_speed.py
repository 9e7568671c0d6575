"""Whole models served at a small budget against themselves dense, and what Amdahl's law leaves.

Rounds are paired: both ways run in each. Ceilings count FLOP for convolutions and bytes of weights at batch 1: what
would be left if a skipped zero cost nothing. Between two passes other memory is read, so that weights come from there.

    python tests/benchmarks/serve_speed.py [--model wrn|mlp|relu|gelu|swiglu] [--batch 1] [--threads 1] [--thresholds 1]
        [--updates 100]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import paired
import torch
from sklearn.datasets import load_digits
from torch import nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy
from regimewrap.recipes.wide_resnet import WideResNet

#: Ratios that should be reached, by model, batch and keep ratio.
TARGETS = {
    ("wrn", 1, 0.1): 2.0,
    ("wrn", 1, 0.05): 2.8,
    ("wrn", 8, 0.1): 2.0,
    ("wrn", 8, 0.05): 2.8,
    ("mlp", 1, 0.1): 4.0,
    ("relu", 1, 0.1): 1.25,
    ("gelu", 1, 0.1): 1.25,
    ("swiglu", 1, 0.1): 1.45,
}
#: Bytes that are read between two passes; more than most caches hold.
_BETWEEN = 1 << 28


class Block(nn.Module):
    """One layer of a decoder at one token: four attention projections without the attention, then the MLP."""

    def __init__(self, width: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.gate, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.up = nn.Linear(width, hidden) if kind == "swiglu" else None
        self.act = {"relu": nn.ReLU, "gelu": nn.GELU, "swiglu": nn.SiLU}[kind]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for projection in self.attention:
            x = x + 0.1 * projection(x)
        x = self.norm(x)
        active = self.act(self.gate(x))
        return x + self.down(active if self.up is None else active * self.up(x))


def build(name: str, batch: int) -> tuple[nn.Module, torch.Tensor, str]:
    """Return a model, its input, and the scope that it is gated in."""
    torch.manual_seed(paired.SEED)
    if name == "wrn":
        return WideResNet(28, 4, norm="batch").eval(), torch.randn(batch, 3, 32, 32), "sample"
    if name == "mlp":
        layers = [layer for _ in range(6) for layer in (nn.Linear(3072, 3072), nn.ReLU())]
        return (
            nn.Sequential(nn.Linear(64, 3072), nn.ReLU(), *layers, nn.Linear(3072, 10)).eval(),
            torch.randn(batch, 64),
            "sample",
        )
    hidden = 2048 if name == "swiglu" else 3072
    return nn.Sequential(*(Block(768, hidden, name) for _ in range(12))).eval(), torch.randn(batch, 1, 768), "position"


def train(model: nn.Module, updates: int) -> torch.Tensor:
    """Train a wrapped WRN on handwritten digits of 32 pixels with its policy; return images that it has not seen."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    labels, test = torch.tensor(digits.target), 397
    optimizer, cycler = torch.optim.SGD(model.train().parameters(), 0.05, 0.9), regimewrap.RegimeCycler(model)
    for _ in range(updates):
        batch = torch.randint(len(images) - test, (32,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cycler.step(loss)
    model.eval()
    return images[-test:].contiguous()


def ceiling(model: nn.Module, served: regimewrap.Served, batch: int) -> float:
    """Return the ratio that is left when what is skipped costs nothing: in FLOP, or in bytes at batch 1."""
    work = {}

    def note(name: str) -> Any:
        def hook(module: Any, _: Any, y: torch.Tensor) -> None:
            weights = module.weight.numel()
            work[name] = weights * (y[0, 0].numel() * batch if isinstance(module, nn.Conv2d) else 1)

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        model(served_input[0])
    for handle in handles:
        handle.remove()
    density = {layer.name: layer.density if layer.sparse else 1.0 for layer in served.layers}
    return sum(work.values()) / sum(amount * density.get(name, 1.0) for name, amount in work.items())


served_input: list[torch.Tensor] = []


def main() -> None:
    """Time, print, compare with the targets."""
    options = paired.arguments(__doc__, model="wrn", batch=1, thresholds=0, updates=0)
    paired.keep_memory()
    model, x, scope = build(options.model, options.batch)
    served_input.append(x)
    between = torch.zeros(_BETWEEN // 4)
    wrapped = regimewrap.wrap(model, RegimePolicy(gate=GatePolicy(scope=scope)))
    if options.updates and options.model == "wrn":
        x = served_input[0] = train(wrapped, options.updates)[: options.batch]
    rows = []
    with torch.no_grad():
        calibration = (
            regimewrap.calibrate(wrapped, [torch.randn_like(x).repeat_interleave(8, 0)], (0.2, 0.1, 0.05))
            if options.thresholds
            else None
        )
        for ratio in (0.2, 0.1, 0.05):
            with regimewrap.serve(wrapped, ratio, example_inputs=x, calibration=calibration) as served:
                dense, sparse = [], []
                for _ in range(options.rounds):
                    for times in (dense, sparse):
                        between.sum()
                        clock = time.perf_counter if options.threads > 1 else time.thread_time  # others do not count
                        if times is dense:
                            served._kind = "dense"
                            with regimewrap.at_keep_ratio(wrapped, 1.0):
                                began = clock()
                                model(x)
                                times.append(clock() - began)
                            served._kind = None
                        else:
                            began = clock()
                            model(x)
                            times.append(clock() - began)
                layers = [layer for layer in served.layers if not layer.why]
                most = ceiling(model, served, options.batch)
                reached = statistics.median(a / b for a, b in zip(dense, sparse, strict=True))
                rows.append(
                    {
                        "model": options.model,
                        "batch": options.batch,
                        "keep ratio": ratio,
                        "dense ms": 1e3 * statistics.median(dense),
                        "served ms": 1e3 * statistics.median(sparse),
                        "dense/served": reached,
                        "of minima": min(dense) / min(sparse),
                        "ceiling": most,
                        "target": TARGETS.get((options.model, options.batch, ratio), 0.0),
                        "layers dense ms": sum(layer.dense_ms for layer in layers),
                        "layers sparse ms": sum(min(layer.sparse_ms, layer.dense_ms) for layer in layers),
                        "selection ms": sum(layer.select_ms for layer in layers),
                        "slowest layer": max(
                            (layer.sparse_ms / layer.dense_ms for layer in layers if layer.sparse), default=0.0
                        ),
                    }
                )
    paired.show(rows, options, by=("model", "batch", "keep ratio"))


if __name__ == "__main__":
    main()
