"""Images of the recipes in timm's loaders, in an order and with augmentations that depend on seed and place alone.

Epoch, number of the batch and rank decide what a batch is, whatever was drawn before and however many workers draw. So
a run that stops between two updates goes on with the very next batch. No model and no training here.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from timm.data import create_loader, create_transform
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from regimewrap.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.utils.data import DataLoader

    from regimewrap.recipes.data import ImageData, ImageSet

AUGMENTATIONS = ("none", "crop-flip", "timm")

_TEST_BATCH = 250


@final
class TrainImages(IterableDataset[tuple[Any, int]]):
    """One rank's training images of one epoch, from a given batch on; only whole batches, as timm's loaders do it.

    Args:
        images: all of them.
        batch_size: images of a batch on one rank.
        seed: of order and augmentation.
        rank: which of the ranks this is.
        world_size: number of ranks.

    Raises:
        DataError: there are fewer images than in one batch of all ranks.
    """

    def __init__(self, images: ImageSet, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.batch_size, self.seed, self.rank, self.world_size = images, batch_size, seed, rank, world_size
        self.transform: Callable[[Any], Any] | None = None  # timm's create_loader sets it
        self.epoch = self.first_batch = 0
        self.batches = len(images) // (batch_size * world_size)
        if self.batches == 0:
            raise DataError(
                f"{len(images)} training images do not fill one batch of {batch_size}"
                f"{f' on each of {world_size} ranks' if world_size > 1 else ''}; choose a smaller --batch-size."
            )

    def __len__(self) -> int:
        return (self.batches - self.first_batch) * self.batch_size

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(_mixed(self.seed, self.epoch)))
        mine = order[self.rank :: self.world_size][: self.batches * self.batch_size].view(self.batches, -1)
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in range(self.first_batch + first, self.batches, step):
            with _drawing_from(_mixed(self.seed, self.epoch, batch, self.rank)):
                drawn = [_taken(self.images, index, self.transform) for index in mine[batch].tolist()]
            yield from drawn


@final
class TestImages(Dataset[tuple[Any, int]]):
    """One rank's share of the test images: no image on two ranks, so that sums over ranks are exact."""

    def __init__(self, images: ImageSet, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.places = images, range(rank, len(images), world_size)
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return _taken(self.images, self.places[place], self.transform)


def make_loaders(
    data: ImageData,
    train: TrainImages,
    *,
    img_size: int | None = None,
    augment: str = "none",
    auto_augment: str | None = None,
    workers: int = 0,
    device: torch.device,
) -> tuple[DataLoader[Any], DataLoader[Any], tuple[int, int, int]]:
    """Return timm's loaders of training and test images, and the shape (channels, height, width) of an image in them.

    Args:
        data: images of one size.
        train: over ``data.train``.
        img_size: height and width to scale the images to; their own if ``None``.
        augment: ``"none"``, ``"crop-flip"`` (padded by an eighth, 4 pixels of 32; cropped and flipped at random) or
            ``"timm"`` (timm's own training transforms).
        auto_augment: with ``"timm"``, a policy of timm's such as ``"rand-m9-mstd0.5"``.
        workers: processes that draw batches.
        device: where the batches will go.
    """
    channels, height, width = data.train.pixels.shape[1:]
    size = (channels, img_size or height, img_size or width)
    common: dict[str, Any] = {
        "input_size": size,
        "interpolation": "bilinear",
        "mean": tuple((data.train.mean.flatten() / 255).tolist()),
        "std": tuple((data.train.std.flatten() / 255).tolist()),
    }
    loading: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": False,  # each epoch's workers must know the epoch
        "use_prefetcher": False,  # it would draw from the model's random numbers, one batch ahead
        "pin_memory": device.type == "cuda",
        "device": device,
    }
    is_timms = augment == "timm"
    make: Any = create_loader  # its annotation knows timm's own data sets only
    train_loader = make(
        train,
        batch_size=train.batch_size,
        is_training=True,
        no_aug=not is_timms,
        auto_augment=auto_augment if is_timms else None,
        **common,
        **loading,
    )
    if augment == "crop-flip":
        plain = create_transform(is_training=True, no_aug=True, **common)
        resize, *rest = plain.transforms
        crop = transforms.RandomCrop(size[1:], padding=max(1, min(size[1:]) // 8))
        train.transform = transforms.Compose([resize, crop, transforms.RandomHorizontalFlip(), *rest])
    test = TestImages(data.test, train.rank, train.world_size)
    test_loader = make(test, batch_size=_TEST_BATCH, is_training=False, crop_pct=1.0, **common, **loading)
    return train_loader, test_loader, size


def batches_of(loader: DataLoader[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a loader's batches on a device. Starting a loader draws a number; the model's are left as they are."""
    with torch.random.fork_rng(devices=[]):
        batches = iter(loader)
    for images, labels in batches:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _taken(images: ImageSet, index: int, transform: Callable[[Any], Any] | None) -> tuple[Any, int]:
    image = to_pil_image(images.pixels[index])
    return image if transform is None else transform(image), int(images.labels[index])


def _mixed(*numbers: int) -> int:
    """Return one seed for several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Seed the generators that timm's transforms draw from, all three of them; on the way out they are as they were."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    random.setstate(before[0])
    np.random.set_state(before[1])
