"""Classifiers of small images and signals."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from small_data import digits, mislabelled, mnist1d, shifted, split
from torch import Tensor, nn
from torch.nn import functional as F
from trial import Trial, accuracy, minibatches


def _cnn_2d(width: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8 * width, 10),
    )  # fmt: skip


def _cnn_1d(width: int, norm: str) -> nn.Module:
    def block(into: int) -> list[nn.Module]:
        normed = nn.BatchNorm1d(width) if norm == "batch" else nn.GroupNorm(4, width)
        return [nn.Conv1d(into, width, 5, stride=2, padding=2), normed, nn.ReLU()]

    return nn.Sequential(*block(1), *block(width), *block(width), nn.Flatten(), nn.Linear(5 * width, 10))


def _mlp(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def _resnet() -> nn.Module:
    import timm

    return nn.Sequential(nn.Upsample(scale_factor=3), timm.create_model("test_resnet", num_classes=10, in_chans=1))


def classifier(
    seed: int,
    *,
    source: str = "mnist1d",
    net: str = "cnn",
    norm: str = "batch",
    train: int = 3000,
    updates: int = 900,
    batch: int = 32,
    micro: int = 1,
    optimizer: str = "sgd",
    lr: float = 0.05,
    decay: float = 5e-4,
    dropout: float = 0.0,
    augment: bool = False,
    noise: float = 0.0,
    autocast: bool = False,
) -> Trial:
    """A net trained on some of the images and tested on the others."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y, test_x, test_y = split(*(digits() if source == "digits" else mnist1d()), train, generator)
    y = mislabelled(y, noise, generator)
    match net:
        case "cnn":
            model = _cnn_2d(32, dropout) if source == "digits" else _cnn_1d(32, norm)
        case "mlp":
            model = _mlp(x[0].numel(), 128)
        case "resnet":
            model = _resnet()
            test_x, test_y = test_x[:800], test_y[:800]
    kinds = {"sgd": partial(torch.optim.SGD, momentum=0.9 if batch > 1 else 0.0), "adamw": torch.optim.AdamW}
    precision = partial(torch.autocast, "cpu", torch.bfloat16) if autocast else contextlib.nullcontext

    def loss(model: nn.Module, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = shifted(x[indices], generator) if augment else x[indices]
        with precision():
            logits = model(images)
        return F.cross_entropy(logits.float(), y[indices]), accuracy(logits, y[indices])

    def evaluate(model: nn.Module) -> float:
        with precision():
            logits = torch.cat([model(part) for part in test_x.split(500)])
        return 100 * accuracy(logits, test_y).item()

    has_batchnorm = any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    return Trial(
        model=model,
        optimizer=kinds[optimizer](model.parameters(), lr=lr, weight_decay=decay),
        batches=(list(indices.chunk(micro)) for indices in minibatches(train, batch, updates, generator)),
        updates=updates,
        loss=loss,
        evaluate=evaluate,
        calibration=list(x[:400].split(100)) if has_batchnorm else [],
    )


_digits = partial(classifier, source="digits", decay=0.0, train=150, updates=400)

TASKS = {
    "CNN with BatchNorm": classifier,
    "CNN, dropout and augmentation": partial(_digits, dropout=0.3, augment=True),
    "CNN, 20 % of labels wrong": partial(classifier, noise=0.2),
    "CNN, 40 % of labels wrong": partial(classifier, noise=0.4),
    "CNN, AdamW": partial(classifier, optimizer="adamw", lr=2e-3, decay=0.01),
    "ResNet of timm": partial(_digits, net="resnet", train=300, updates=200),
    "MLP, batch size 1": partial(_digits, net="mlp", batch=1, lr=0.01, train=300, updates=4500),
    "CNN, gradient accumulation": partial(classifier, norm="group", micro=4, decay=0.0, updates=600),
    "CNN, autocast to bfloat16": partial(_digits, autocast=True),
}
