"""Training without labels: an autoencoder of tiles of two photographs, and contrastive learning on digits."""

from __future__ import annotations

import torch
from small_data import digits, shifted, split, tiles
from torch import Tensor, nn
from torch.nn import functional as F
from trial import Trial, minibatches


def autoencoder(seed: int, *, train: int = 3000, updates: int = 900, batch: int = 64) -> Trial:
    """192 values go through a code of 16; the outcome is the share of the variance that comes back, times 100."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, _, test, _ = split(*tiles(), train, generator)
    model = nn.Sequential(
        nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 16), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 192)
    )

    def loss(model: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        error = F.mse_loss(model(x[indices]), x[indices])
        return error, 1 - error

    return Trial(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        batches=([indices] for indices in minibatches(train, batch, updates, generator)),
        updates=updates,
        loss=loss,
        evaluate=lambda model: 100 * (1 - F.mse_loss(model(test), test) / test.var()).item(),
    )


def _view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image, make it lighter or darker, and add noise."""
    gain = 0.6 + 0.8 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return shifted(x, generator) * gain + 0.3 * torch.randn(x.shape, generator=generator)


def contrastive(seed: int, *, train: int = 900, updates: int = 500, batch: int = 64) -> Trial:
    """SimCLR: two views of each image in one batch; the outcome is the class of the nearest training image."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y, test_x, test_y = split(*digits(), train, generator)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 64),
    )  # fmt: skip

    def loss(model: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        views = torch.cat((_view(x[indices], generator), _view(x[indices], generator)))
        z = F.normalize(model(views), dim=1)
        likeness = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
        twins = torch.arange(len(z)).roll(len(indices))
        return F.cross_entropy(likeness, twins), (likeness.argmax(1) == twins).float().mean()

    def evaluate(model: nn.Module) -> float:
        known, asked = F.normalize(model(x), dim=1), F.normalize(model(test_x), dim=1)
        return 100 * (y[(asked @ known.T).argmax(1)] == test_y).float().mean().item()

    return Trial(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01),
        batches=([indices] for indices in minibatches(train, batch, updates, generator)),
        updates=updates,
        loss=loss,
        evaluate=evaluate,
    )


TASKS = {"Autoencoder": autoencoder, "Contrastive, two views in a batch": contrastive}
