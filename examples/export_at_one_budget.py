"""Train on digits, find fixed thresholds for a budget, export: about ten seconds on one core.

Needs ``pip install -e '.[demo]'`` in a checkout for the data. Run it with ``python examples/export_at_one_budget.py``.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import regimewrap

EPOCHS, BATCH, TRAINING_IMAGES = 15, 25, 800


def main() -> None:
    """Train, calibrate, report, export."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), 0..1
    labels = torch.tensor(digits.target)
    train, test = slice(0, TRAINING_IMAGES), slice(TRAINING_IMAGES, None)

    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
    )
    regimewrap.wrap(model)
    cycler = regimewrap.RegimeCycler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING_IMAGES).split(BATCH):
            loss = cross_entropy(model(images[train][batch]), labels[train][batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cycler.step(loss)

    def accuracy(model: nn.Module) -> float:
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()

    calibration = regimewrap.calibrate(model, images[train].split(100))
    print(calibration.report(model, accuracy))

    calibration.apply(model, keep_ratio=0.2)
    anywhere = {0: torch.export.Dim("batch")}
    program = torch.export.export(model.eval(), (images[:2],), dynamic_shapes=(anywhere,))
    print("exported; test accuracy", round(accuracy(program.module()), 3))


if __name__ == "__main__":
    main()
