"""A classifier with many gated activations in a row, trained for a short time."""

from __future__ import annotations

import torch
from small_data import digits, split
from torch import Tensor, nn
from torch.nn import functional as F
from trial import Trial, accuracy, minibatches


def _images(x: Tensor) -> Tensor:
    return F.interpolate(x, 32).repeat(1, 3, 1, 1)


def mobile_net(seed: int, *, updates: int = 250, batch: int = 17) -> Trial:
    """MobileNetV3 of torchvision, some fifty activations deep, on digits of 32 pixels."""
    import torchvision

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y, test_x, test_y = split(*digits(), 1400, generator)
    model = torchvision.models.mobilenet_v3_small(num_classes=10, dropout=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1

    def loss(model: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(_images(x[indices]))
        return F.cross_entropy(logits, y[indices], label_smoothing=0.1), accuracy(logits, y[indices])

    def evaluate(model: nn.Module) -> float:
        return 100 * accuracy(torch.cat([model(_images(part)) for part in test_x.split(200)]), test_y).item()

    return Trial(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02),
        batches=([indices] for indices in minibatches(1400, batch, updates, generator)),
        updates=updates,
        loss=loss,
        evaluate=evaluate,
        calibration=[_images(part) for part in x[:400].split(50)],
    )


TASKS = {"MobileNetV3, a short training": mobile_net}
