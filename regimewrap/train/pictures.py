"""Folders of pictures -> batches that depend on seed, epoch and place alone.

Whatever was drawn before and however many processes draw, the same place of a run gives the same pictures, cropped and
flipped alike. So a run that stops between two updates goes on with the very next batch.
"""

from __future__ import annotations

import os
import random
import signal
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from regimewrap.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

HELD_OUT = ("val", "valid", "validation", "test")
_EVERY = 5  # one picture in so many of each class is held out where there is no folder for that
_SPLIT_RULE = f"one picture in {_EVERY} of each class, chosen by its name, held out for validation"

Sample = tuple[Path, int]
Place = tuple[int, int]  # epoch, number of the picture


@final
@dataclass(frozen=True)
class Pictures:
    """Which pictures there are, and how they were split; a sample is a path and the number of its class."""

    classes: tuple[str, ...]
    train: list[Sample]
    val: list[Sample]
    about: str

    def checksum(self) -> int:
        """Return a number for names, sizes and split, to tell whether a run goes on with the same pictures."""
        listed = [
            f"{path.name} {path.stat().st_size} {label}" for part in (self.train, self.val) for path, label in part
        ]
        return zlib.crc32("\n".join(listed).encode(errors="surrogateescape"))


def find_pictures(folder: Path) -> Pictures:
    """List the pictures of a folder and split them.

    Args:
        folder: with ``train/<class>/...`` and ``val/<class>/...`` (or valid, validation, test), or with
            ``<class>/...`` alone: then one picture in five of each class, chosen by its name, is held out.

    Raises:
        DataError: there are no two classes, a class has no picture, or a picture cannot be opened.
    """
    tops = {each.name for each in folder.iterdir() if each.is_dir()} if folder.is_dir() else set()
    held_out = next((name for name in HELD_OUT if name in tops), None)
    if "train" not in tops and tops and tops <= set(HELD_OUT):
        raise DataError(f"{folder} has {held_out}/ but no train/; expected both, or a folder for each class.")
    train = list_pictures(folder / "train" if "train" in tops else folder)
    classes = tuple(sorted({name for _, name in train}))
    if len(classes) < 2:
        raise DataError(f"{folder} has one class, {classes[0]}; expected a folder for each of at least two classes.")
    if "train" in tops and held_out is not None:
        val, how = list_pictures(folder / held_out), f"split into its train/ and {held_out}/"
        if unknown := sorted({name for _, name in val} - set(classes)):
            raise DataError(f"{folder}: class {unknown[0]} is in {held_out}/ but not in train/.")
    else:
        (train, val), how = _hold_out(train), _SPLIT_RULE
    if not val:
        raise DataError(f"{folder} leaves no picture for validation; expected at least two pictures of some class.")
    numbers = {name: number for number, name in enumerate(classes)}
    train_samples, val_samples = ([(path, numbers[name]) for path, name in part] for part in (train, val))
    about = f"{folder}: {len(train)} pictures to train on and {len(val)} to validate, {len(classes)} classes; {how}"
    return Pictures(classes, train_samples, val_samples, about)


def list_pictures(root: Path) -> list[tuple[Path, str]]:
    """Return each picture below ``root`` with the name of its class, which is the folder's right below ``root``.

    Raises:
        DataError: there is no folder for each class, a class has no picture, or a picture cannot be opened.
    """
    try:
        listing = ImageFolder(root, allow_empty=True)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{root} has no folder for each class; expected {root / 'CLASS' / 'PICTURE.jpg'}.") from None
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror or error}.") from None
    classes = [name for name in listing.classes if not name.startswith((".", "__"))]  # __MACOSX, .ipynb_checkpoints
    found = [(Path(path), listing.classes[label]) for path, label in listing.samples]
    found = [(path, name) for path, name in found if name in classes and not path.name.startswith(".")]
    if empty := sorted(set(classes) - {name for _, name in found}):
        raise DataError(f"{root / empty[0]} holds no picture; expected files that end in {', '.join(IMG_EXTENSIONS)}.")
    for path, _ in found:
        _opened(path).close()  # reads the header alone
    return found


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Return a picture as a viewer shows it, in RGB: turned as its EXIF orientation says, on white where transparent.

    Grey, palette, CMYK and 16-bit pictures are converted; of an animation the first picture is taken.

    Raises:
        DataError: it is not there, is not a picture, or is damaged.
    """
    with _opened(path) as image:
        try:
            turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut at 255
                turned = Image.fromarray((np.asarray(turned).clip(0, 65535) / 257).astype(np.uint8))
            if turned.has_transparency_data:
                turned = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
            return turned.convert("RGB")
        except Exception as error:  # Pillow's readers raise many kinds for damaged files
            raise DataError(f"picture {path} is damaged: {str(error) or type(error).__name__}.") from error


def _opened(path: str | os.PathLike[str]) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a picture, or is damaged. Remove it.") from None
    except Exception as error:  # of many kinds too
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"picture {path} cannot be opened: {reason}.") from error


def _hold_out(everything: list[tuple[Path, str]]) -> list[list[tuple[Path, str]]]:
    """Split by a number made from each name, so that most pictures stay where they are when others are added."""
    counts = Counter(name for _, name in everything)
    kept: list[tuple[Path, str]] = []
    held: list[tuple[Path, str]] = []
    seen: Counter[str] = Counter()
    for path, name in sorted(everything, key=lambda each: (zlib.crc32(each[0].name.encode()), each[0])):
        seen[name] += 1
        is_held = counts[name] > 1 and seen[name] <= max(1, counts[name] // _EVERY)
        (held if is_held else kept).append((path, name))
    return [sorted(kept), sorted(held)]


def seed_draws(*numbers: int) -> None:
    """Seed every generator that pictures and layers draw from: torch's, NumPy's and Python's."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def training_order(count: int, batch_size: int, epochs: int, seed: int, first: int = 0) -> Iterator[list[Place]]:
    """Yield the places of each batch of a run from update ``first`` on; what does not fill a batch is left out."""
    per_epoch = max(1, count // batch_size)
    for epoch in range(first // per_epoch, epochs):
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        order = torch.randperm(count, generator=generator).tolist()
        for batch in range(max(0, first - epoch * per_epoch), per_epoch):
            yield [(epoch, number) for number in order[batch * batch_size : (batch + 1) * batch_size]]


def fixed_order(count: int, batch_size: int) -> list[list[Place]]:
    """Return the places of each batch of a pass over all pictures."""
    return [[(0, number) for number in range(at, min(at + batch_size, count))] for at in range(0, count, batch_size)]


@final
class _Prepared(Dataset[tuple["Tensor", int]]):
    def __init__(self, samples: Sequence[Sample], transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self.samples, self.transform, self.seed = samples, transform, seed

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        epoch, number = place
        path, label = self.samples[number]
        picture = open_picture(path)
        seed_draws(self.seed, epoch, number)
        return self.transform(picture), label


def batches(
    samples: Sequence[Sample],
    transform: Callable[[Image.Image], Tensor],
    order: Any,
    *,
    workers: int,
    device: torch.device,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pictures, float32 of shape (n, 3, height, width), and labels, int64 of shape (n,), on a device.

    Raises:
        DataError: a picture is damaged, or a process that reads pictures died.
    """
    loader: DataLoader[Any] = DataLoader(
        _Prepared(samples, transform, seed),
        batch_sampler=order,
        num_workers=workers,
        worker_init_fn=_begin,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
    try:
        for pictures, labels in loader:
            yield pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    except DataError as error:  # a worker's comes with its traceback in the text
        raise DataError(str(error).rstrip().rpartition("DataError: ")[2]) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError("a process that reads pictures died; is there enough memory? Try fewer --workers.") from None


def _begin(_: int) -> None:
    """Leave Ctrl-C to the process that trains, and end when it says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def plain_transform(look: dict[str, Any]) -> Any:
    """Return timm's transform for evaluation: resized, cropped in the middle, normalised.

    Args:
        look: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct`` and ``crop_mode``, as timm's
            ``resolve_model_data_config`` gives them.
    """
    return create_transform(**look, is_training=False)
