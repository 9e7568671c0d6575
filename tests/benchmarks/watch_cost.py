"""What looking at the gates costs a training step: at every step, and at each hundredth one by ``watch(every=100)``.

    python tests/benchmarks/watch_cost.py

The share that sampling adds is what one look adds, divided by a hundred; it is also measured as a whole, over a hundred
steps, where it drowns in what the machine does meanwhile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from paired import Rounds, arguments, keep_memory, show
from torch import nn

from regimewrap import RegimeCycler, watch, wrap
from regimewrap.recipes.wide_resnet import WideResNet

EVERY = 100


def mlp() -> tuple[nn.Module, torch.Tensor]:
    """A perceptron, whose activations are small beside its products."""
    layers = [nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers), torch.randn(128, 256)


def conv() -> tuple[nn.Module, torch.Tensor]:
    """A narrow network for images, whose activations are large beside its products."""
    return WideResNet(10, 1, 10), torch.randn(32, 3, 32, 32)


def cost(name: str, bare: nn.Module, x: torch.Tensor, rounds: int) -> dict[str, object]:
    """Return what looking costs a training step of one model."""
    model = wrap(bare)
    cycler, y = RegimeCycler(model), torch.zeros(len(x), dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycler.step()

    def looked() -> None:
        with watch(model) as seen:
            step()
        seen.fetch()

    def steps() -> None:
        for _ in range(EVERY):
            step()

    def sampled() -> None:
        with watch(model, every=EVERY):
            steps()

    one = Rounds({"step": step, "looked": looked}, 5 * rounds)
    hundred = Rounds({"steps": steps, "sampled": sampled}, rounds)
    look = one.ratio("looked", "step")
    return {
        "model": name,
        "step, ms": 1e3 * one.seconds("step"),
        "looked at/step": look,
        "sampling adds, %": 100 * (look - 1) / EVERY,
        "as a whole, %": 100 * (hundred.ratio("sampled", "steps") - 1),
    }


def main() -> None:
    options = arguments(__doc__)
    keep_memory()
    rows = [cost(make.__name__, *make(), options.rounds) for make in (mlp, conv)]
    show(rows, options, by=("model",), targets={"sampling adds, %": "< 1"})


if __name__ == "__main__":
    main()
