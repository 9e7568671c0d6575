"""regimewrap in a training loop of your own: a small network on scikit-learn's digits, about ten seconds on one core.

Needs ``pip install -e '.[demo]'`` in a checkout for the data. Run it with ``python examples/own_loop.py``.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import regimewrap

EPOCHS, BATCH, TRAINING_IMAGES = 40, 25, 400


def main() -> None:
    """Train, sweep, unwrap."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8), 0..1
    labels = torch.tensor(digits.target)
    train, test = slice(0, TRAINING_IMAGES), slice(TRAINING_IMAGES, None)

    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
    )
    regimewrap.wrap(model)
    cycler = regimewrap.RegimeCycler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)

    for epoch in range(EPOCHS):
        for batch in torch.randperm(TRAINING_IMAGES).split(BATCH):
            loss = cross_entropy(model(images[train][batch]), labels[train][batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            regime = cycler.step(loss)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {loss:.3f}, keep ratio {regime.keep_ratio:.2f}")

    def evaluate(model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return (model(images[test]).argmax(1) == labels[test]).float().mean().item()

    print(regimewrap.sweep(model, evaluate, keep_ratios=(1.0, 0.5, 0.2, 0.1)))
    regimewrap.unwrap(model)
    print("unwrapped; test accuracy", round(evaluate(model), 3))


if __name__ == "__main__":
    main()
