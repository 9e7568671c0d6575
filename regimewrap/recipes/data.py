"""Images and labels for the recipes, from a name or a path, as tensors in memory.

Decides which images are used, how they are split and how they are normalised, and says so in ``ImageData.about``.
Reading files is images.py's part.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regimewrap.errors import DataError, MissingExtraError
from regimewrap.recipes.images import open_images, read_pixels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from regimewrap.recipes.images import Progress

_Entry = tuple[tuple[str, ...], str]  # parts of a name below the top, the whole name
_Labelled = tuple[str, str]  # class, name
_Part = tuple[Tensor, Tensor]  # pixels, labels

_SPLITS = {"train", "test", "val"}

NAMED = ("digits", "cifar10")

_DIGITS_TEST_IMAGES = 797
_TEST_EVERY = 5
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


def load_data(
    source: str | os.PathLike[str],
    *,
    limit: int | None = None,
    test_limit: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> ImageData:
    """Load labelled images.

    Args:
        source: ``"digits"`` (scikit-learn's 8×8 digits), ``"cifar10"`` (torchvision, downloaded once), or the path of a
            folder or zip with ``train/<class>/…`` and ``test/<class>/…`` (or ``val/``), or with ``<class>/…`` alone;
            then one image in five of each class, drawn with a fixed seed, is the test set.
        limit: at most this many training images, drawn with ``seed``, each class keeping its share. Others aren't read.
        test_limit: the same for test images.
        seed: of the draw.
        on_progress: called with the number of images read and their total.

    Channels are normalised with the mean and standard deviation of the training images loaded.

    Raises:
        DataError: there is nothing usable at ``source``, or the limit is too small to keep every class.
        MissingExtraError: scikit-learn, torchvision or pillow is needed.
    """
    for name, value in (("limit", limit), ("test_limit", test_limit)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1; got {value}.")
    limits = (limit, test_limit)
    if str(source) == "digits":
        return _load_digits(limits, seed)
    if str(source) == "cifar10":
        return _load_cifar10(limits, seed)
    return _load_tree(Path(source), limits, seed, on_progress)


def _load_tree(path: Path, limits: tuple[int | None, int | None], seed: int, on_progress: Progress | None) -> ImageData:
    if not os.path.lexists(path):  # False too for what no file system could hold
        close = difflib.get_close_matches(str(path), NAMED, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise DataError(f"data {path} doesn't exist; expected {', '.join(NAMED)}, or a folder or zip of images.{hint}")
    with contextlib.closing(open_images(path)) as files:
        train, test, how = _split_names(files.names, path)
        classes = _shared_classes(train, test, path)
        numbers = {label: number for number, label in enumerate(classes)}
        names, labels = [], []
        for split, limit in zip((train, test), limits, strict=True):
            split_labels = torch.tensor([numbers[label] for label, _ in split])
            pick = _draw(split_labels, limit, seed)
            labels.append(split_labels[pick])
            names += [split[index][1] for index in pick.tolist()]
        pixels = read_pixels(files, names, on_progress)
    cut = len(labels[0])
    return _finish((pixels[:cut], labels[0]), (pixels[cut:], labels[1]), classes, f"{path.name}, {how}")


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
        raise DataError(
            f"CIFAR-10 could not be downloaded to {root}: {error}. Pass a folder or zip of images instead."
        ) from error
    return _finish(parts[0], parts[1], classes, "CIFAR-10 from torchvision, its own split")


def _split_names(names: Sequence[str], path: Path) -> tuple[list[_Labelled], list[_Labelled], str]:
    """Return the training and the test images, and how they were told apart."""
    if not names:
        raise DataError(f"{path} holds no images; expected files such as train/<class>/0001.png.")
    entries = [(tuple(name.split("/")), name) for name in names]
    # Archives often have one folder around everything.
    while len(tops := _tops(entries)) == 1 and not tops & _SPLITS and all(len(parts) > 2 for parts, _ in entries):
        entries = [(parts[1:], name) for parts, name in entries]
    held_out = next((folder for folder in ("test", "val") if folder in tops), None)
    if tops and tops <= _SPLITS - {"train"}:
        raise DataError(f"{path} has {held_out}/ but no train/ with images.")
    if held_out is not None and "train" in tops:
        train, test = (_labelled(_below(entries, top), path) for top in ("train", held_out))
        return train, test, f"split into its train/ and {held_out}/"
    everything = _labelled(_below(entries, "train") if tops == {"train"} else entries, path)
    train, test = _hold_out(everything)
    return train, test, "one image in five of each class, drawn with a fixed seed, held out for testing"


def _tops(entries: list[_Entry]) -> set[str]:
    return {parts[0] for parts, _ in entries if len(parts) > 1}


def _below(entries: list[_Entry], top: str) -> list[_Entry]:
    return [(parts[1:], name) for parts, name in entries if parts[0] == top and len(parts) > 1]


def _labelled(entries: list[_Entry], path: Path) -> list[_Labelled]:
    labelled = [(parts[0], name) for parts, name in entries if len(parts) > 1]
    if not labelled:
        raise DataError(
            f"{path} has no folder for each class: {entries[0][1]} is in none. Expected train/<class>/0001.png."
        )
    return labelled


def _hold_out(everything: list[_Labelled]) -> tuple[list[_Labelled], list[_Labelled]]:
    names = sorted({label for label, _ in everything})
    labels = torch.tensor([names.index(label) for label, _ in everything])
    rank = _rank_in_class(labels, _SPLIT_SEED)
    # The first of every five, unless it is the only one of its class.
    alone = torch.bincount(labels)[labels] == 1
    held = ((rank % _TEST_EVERY == 0) & ~alone).tolist()
    train = [item for item, out in zip(everything, held, strict=True) if not out]
    return train, [item for item, out in zip(everything, held, strict=True) if out]


def _shared_classes(train: list[_Labelled], test: list[_Labelled], path: Path) -> tuple[str, ...]:
    classes = tuple(sorted({label for label, _ in train}))
    if unknown := sorted({label for label, _ in test} - set(classes)):
        raise DataError(f"{path}: class {unknown[0]} is among the test images but not among the training images.")
    if len(classes) < 2:
        raise DataError(f"{path} has one class, {classes[0]}; expected at least two class folders.")
    if not test:
        raise DataError(f"{path} leaves no images for testing; expected at least two images of some class.")
    return classes


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
