"""Small labelled images for the recipes, by name, as tensors in memory. Folders of pictures are ``regimewrap train``'s.

Decides which images are used, how they are split and how they are normalised, and says so in ``ImageData.about``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regimewrap.errors import DataError, MissingExtraError
from regimewrap.files import nearest, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

_Part = tuple[Tensor, Tensor]  # pixels, labels

NAMED = ("digits", "cifar10")

_DIGITS_TEST_IMAGES = 797
_SPLIT_SEED = 0


@final
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Labelled images of one size, kept as bytes and normalised when they are taken.

    Args:
        pixels: uint8 of shape (n, channels, height, width).
        labels: int64 of shape (n,).
        mean: float32 of shape (channels, 1, 1), in the units of ``pixels``.
        std: like ``mean``; never zero.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> None:
        self.pixels, self.labels, self.mean, self.std = pixels, labels, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._normalised(self.pixels[index]), int(self.labels[index])

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (float32) and labels, shuffled if there is a generator; the last batch may be smaller."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for index in torch.split(order, batch_size):
            yield self._normalised(self.pixels[index]), self.labels[index]

    def _normalised(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std


@final
@dataclass(frozen=True)
class ImageData:
    """A training and a test set over the same classes, with a sentence that says what they are."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    about: str

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train.pixels.shape[1]


def load_data(source: str, *, limit: int | None = None, test_limit: int | None = None, seed: int = 0) -> ImageData:
    """Load labelled images.

    Args:
        source: ``"digits"`` (scikit-learn's 8×8 digits) or ``"cifar10"`` (torchvision, downloaded once).
        limit: at most this many training images, drawn with ``seed``, each class keeping its share.
        test_limit: the same for test images.
        seed: of the draw.

    Channels are normalised with the mean and standard deviation of the training images loaded.

    Raises:
        DataError: ``source`` is another name, or the limit is too small to keep every class.
        MissingExtraError: scikit-learn or torchvision is needed.

    >>> len(load_data("digits", limit=100).train)
    100
    """
    for name, value in (("limit", limit), ("test_limit", test_limit)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1; got {value}.")
    load = {"digits": _load_digits, "cifar10": _load_cifar10}.get(source)
    if load is None:
        raise DataError(f"data must be one of {', '.join(NAMED)}; got {shown(source)}.{nearest(source, NAMED)}")
    return load((limit, test_limit), seed)


def _load_digits(limits: tuple[int | None, int | None], seed: int) -> ImageData:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise MissingExtraError("scikit-learn", "demo") from None
    images, target = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, target, test_size=_DIGITS_TEST_IMAGES, stratify=target, random_state=_SPLIT_SEED
    )
    parts = []
    for x, y, limit in ((train_x, train_y, limits[0]), (test_x, test_y, limits[1])):
        labels = torch.tensor(y)
        pick = _draw(labels, limit, seed)
        parts.append((torch.tensor(x, dtype=torch.uint8).view(-1, 1, 8, 8)[pick], labels[pick]))
    how = f"scikit-learn's digits, a fixed split that leaves {_DIGITS_TEST_IMAGES} for testing"
    return _finish(parts[0], parts[1], tuple("0123456789"), how)


def _load_cifar10(limits: tuple[int | None, int | None], seed: int) -> ImageData:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        raise MissingExtraError("torchvision", "cli") from None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regimewrap"
    parts = []
    try:
        for train, limit in zip((True, False), limits, strict=True):
            data = CIFAR10(root, train=train, download=True)
            labels = torch.tensor(data.targets)
            pick = _draw(labels, limit, seed)
            parts.append((torch.from_numpy(data.data).permute(0, 3, 1, 2)[pick], labels[pick]))
            classes = tuple(data.classes)
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError for a damaged download
        mend = "Put torchvision's folder, cifar-10-batches-py, there yourself."
        raise DataError(f"CIFAR-10 could not be downloaded to {root}: {error}. {mend}") from error
    return _finish(parts[0], parts[1], classes, "CIFAR-10 from torchvision, its own split")


def _rank_in_class(labels: Tensor, seed: int) -> Tensor:
    """Return each image's place, from 0, in a shuffled order of its own class."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.empty_like(labels)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().squeeze(1)
        rank[members] = torch.randperm(len(members), generator=generator)
    return rank


def _draw(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Return the indices, sorted, of at most ``limit`` images, each class keeping its share and at least one.

    A larger limit with the same seed keeps all of a smaller one's.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    counts = torch.bincount(labels)
    present = int((counts > 0).sum())
    if limit < present:
        raise DataError(f"limit must be at least {present}, so that each class is seen; got {limit}.")
    # Rank over class size: every class's first image comes first, then all classes fill at the same rate.
    order = torch.argsort(_rank_in_class(labels, seed).double() / counts[labels], stable=True)
    return order[:limit].sort().values


def _finish(train: _Part, test: _Part, classes: tuple[str, ...], source: str) -> ImageData:
    mean, std = _channel_statistics(train[0])
    numbers = [" ".join(f"{value:.4g}" for value in statistic.flatten().tolist()) for statistic in (mean, std)]
    about = (
        f"{source}; {len(train[1])} training and {len(test[1])} test images of {len(classes)} classes; channels"
        f" normalised by the training images' mean {numbers[0]} and standard deviation {numbers[1]}"
    )
    return ImageData(ImageSet(*train, mean, std), ImageSet(*test, mean, std), classes, about)


def _channel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and standard deviation, from counts of the 256 values: exact, and small in memory."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = (share * values).sum(1, keepdim=True)
    # A constant channel would divide by zero; a deviation below one step of the pixels is as good as constant.
    std = (share * (values - mean).square()).sum(1).sqrt().clamp_min(1.0)
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)
