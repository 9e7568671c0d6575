"""Train a small network, find fixed thresholds for a budget, export it: about ten seconds on one core.

Run it with ``python examples/export_at_one_budget.py``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import regimewrap

UPDATES, BATCH, WIDTH = 600, 64, 128


def main() -> None:
    """Train, calibrate, report, export."""
    torch.manual_seed(0)
    inputs = torch.randn(4096, 16)
    labels = (inputs @ torch.randn(16, 4)).relu().argmax(1)  # four classes that a random layer tells apart
    seen, unseen = slice(0, 2048), slice(2048, None)

    hidden = (nn.Linear(16, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU())
    model = regimewrap.wrap(nn.Sequential(*hidden, nn.Linear(WIDTH, 4)))
    cycler = regimewrap.RegimeCycler(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(UPDATES):
        rows = torch.randint(2048, (BATCH,))
        loss = cross_entropy(model(inputs[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cycler.step(loss)

    def accuracy(model: nn.Module) -> float:
        return (model(inputs[unseen]).argmax(1) == labels[unseen]).float().mean().item()

    calibration = regimewrap.calibrate(model, inputs[seen].split(256))
    print(calibration.report(model, accuracy))

    calibration.apply(model, keep_ratio=0.2)
    program = torch.export.export(model.eval(), (inputs[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    print("exported; test accuracy", round(accuracy(program.module()), 3))


if __name__ == "__main__":
    main()
