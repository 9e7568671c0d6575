"""Images of a folder or a zip with ``train/<class>/`` and ``test/<class>/``."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regimewrap.errors import DataError
from regimewrap.files import nearest
from regimewrap.recipes.data import NAMED

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
_EXPECTED = "expected a folder or a zip with train/<class>/ and test/<class>/"


def read_images(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Decode all images.

    Hidden files and files that don't end like an image are passed over. Classes are numbered in the order of their
    names, the images of a class come in the order of theirs.

    Returns:
        For ``train`` and for ``test``: uint8 ``(images, 3, height, width)`` and int64 ``(images,)`` labels.

    Raises:
        DataError: ``path`` or an image cannot be read, a class is in one part alone, or sizes differ.
    """
    try:
        root: Any = zipfile.Path(path) if path.is_file() else path  # alike in what is used here
        classes = {split: _names(root / split) for split in ("train", "test")}
        if alone := sorted(set(classes["train"]) ^ set(classes["test"])):
            where = "train" if alone[0] in classes["train"] else "test"
            raise DataError(
                f"{path}: {alone[0]!r} is a class in {where}/ alone; {_EXPECTED}, the same classes in both."
            )
        if len(classes["train"]) < 2:
            raise DataError(f"{path}: found {len(classes['train'])} classes; {_EXPECTED}, two classes or more.")
        return [_read(path, root / split, names) for split, names in classes.items()]
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        raise DataError(f"{path} cannot be read: {error}; {_EXPECTED}.") from error


def version(path: Path) -> str:
    """Return a digest that changes with the file, or with any file in the folder.

    Raises:
        DataError: ``path`` is not there, or cannot be read.
    """
    if not path.exists():
        near = nearest(path.name, NAMED)
        raise DataError(f"data {path} doesn't exist; name its folder with --data, or take {' or '.join(NAMED)}.{near}")
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode())
    try:
        for each in sorted(path.rglob("*")) if path.is_dir() else [path]:
            stat = each.stat()
            digest.update(f"{each}-{stat.st_size}-{stat.st_mtime_ns}\n".encode())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()[:12]


def _names(folder: Any) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _read(path: Path, folder: Any, names: list[str]) -> tuple[Tensor, Tensor]:
    pixels: list[Tensor] = []
    labels = []
    for label, name in enumerate(names):
        for file in sorted((folder / name).iterdir(), key=lambda each: each.name):
            place = f"{folder.name}/{name}/{file.name}"
            if file.name.startswith("."):
                continue
            if file.is_dir():
                raise DataError(f"{path}: {place} is a folder; images must lie in the folder of their class.")
            if Path(file.name).suffix.lower() not in _SUFFIXES:
                continue
            pixels.append(_decoded(path, place, file.read_bytes()))
            labels.append(label)
            if pixels[-1].shape != pixels[0].shape:
                sizes = [f"{each.shape[1]}×{each.shape[0]}" for each in (pixels[-1], pixels[0])]
                raise DataError(f"{path}: {place} has {sizes[0]} pixels, the first image {sizes[1]}; make them alike.")
    if not pixels:
        raise DataError(f"{path}: {folder.name}/ holds no images in {', '.join(names)}.")
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def _decoded(path: Path, place: str, content: bytes) -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            array = bytearray(image.convert("RGB").tobytes())
            return torch.frombuffer(array, dtype=torch.uint8).view(image.height, image.width, 3)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what a damaged file leads to
        raise DataError(f"{path}: {place} cannot be read as an image; mend it or take it away.") from error
