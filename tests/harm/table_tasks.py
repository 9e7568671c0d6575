"""Rows of numbers: a classifier and a regression."""

from __future__ import annotations

import torch
from small_data import curve, rows, split
from torch import Tensor, nn
from torch.nn import functional as F
from trial import Trial, accuracy, minibatches


def tabular(seed: int, *, train: int = 3000, updates: int = 1200, batch: int = 64) -> Trial:
    """An MLP with LayerNorm and GELU tells six classes apart."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y, test_x, test_y = split(*rows(), train, generator)
    layers = [m for a in (30, 128, 128) for m in (nn.Linear(a, 128), nn.LayerNorm(128), nn.GELU())]
    model = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(128, 6))

    def loss(model: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x[indices])
        return F.cross_entropy(logits, y[indices]), accuracy(logits, y[indices])

    return Trial(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01),
        batches=([indices] for indices in minibatches(train, batch, updates, generator)),
        updates=updates,
        loss=loss,
        evaluate=lambda model: 100 * accuracy(model(test_x), test_y).item(),
    )


def regression(seed: int, *, train: int = 3000, updates: int = 2000, batch: int = 64) -> Trial:
    """An MLP follows a curve with noise, of which 96 % can be explained."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y, test_x, test_y = split(*curve(), train, generator)
    model = nn.Sequential(
        nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1), nn.Flatten(0)
    )

    def loss(model: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        error = F.mse_loss(model(x[indices]), y[indices])
        return error, 1 - error  # of a variance of 1

    return Trial(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        batches=([indices] for indices in minibatches(train, batch, updates, generator)),
        updates=updates,
        loss=loss,
        evaluate=lambda model: 100 * (1 - F.mse_loss(model(test_x), test_y) / test_y.var()).item(),
    )


TASKS = {"MLP with LayerNorm, tabular": tabular, "Regression": regression}
