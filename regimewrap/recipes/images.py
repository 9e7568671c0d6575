"""Image files in a folder or a zip, one sub-folder a class: which there are, and their pixels.

A zip is read member by member and never unpacked. Nothing here decides which images are used; data.py does.
"""

from __future__ import annotations

import io
import os
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor

from regimewrap.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Progress = Callable[[int, int], None]  # images done, images in all

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXEL_BYTES = 4 * 2**30  # decoded images stay in memory
MAX_FILE_BYTES = 256 * 2**20  # one image file; a larger one is a mistake or an attack


class ImageFiles(Protocol):
    """Image files under relative names such as ``train/cat/0001.png``."""

    @property
    def names(self) -> Sequence[str]:
        """Every image's name, sorted, with forward slashes."""

    def read(self, name: str) -> bytes:
        """Return the bytes of one image file, or raise ``DataError`` that names it."""

    def close(self) -> None:
        """Close what was opened."""


def open_images(path: Path) -> ImageFiles:
    """Open a folder or a zip of images.

    Raises:
        DataError: the path is neither, or cannot be read.
    """
    try:
        if path.is_dir():
            return _Folder(path)
        if path.is_file():
            return _Zip(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    raise DataError(f"{path} is neither a folder nor a zip of images.")


def read_pixels(files: ImageFiles, names: Sequence[str], on_progress: Progress | None = None) -> Tensor:
    """Decode images to RGB.

    Greyscale, palette and transparent images are converted: grey is repeated over the channels, transparency dropped.

    Args:
        files: where the images are.
        names: which of them, at least one.
        on_progress: called with the number of images done and their total, after each.

    Returns:
        uint8 of shape (len(names), 3, height, width).

    Raises:
        DataError: an image is damaged, has more than 8 bits a channel, or is of another size than the first;
            or all of them together do not fit in memory.
    """
    first = _decode(files, names[0])
    if len(names) * first.numel() > MAX_PIXEL_BYTES:
        raise DataError(
            f"{len(names)} images of {_size(first)} pixels need {len(names) * first.numel() / 2**30:.1f} GiB;"
            f" at most {MAX_PIXEL_BYTES // 2**30} GiB are read. Set a limit, or make the images smaller."
        )
    pixels = torch.empty((len(names), *first.shape), dtype=torch.uint8)
    for index, name in enumerate(names):
        image = first if index == 0 else _decode(files, name)
        if image.shape != first.shape:
            raise DataError(
                f"all images must have one size: {names[0]} is {_size(first)} but {name} is {_size(image)}."
                " Resize them first."
            )
        pixels[index] = image
        if on_progress is not None:
            on_progress(index + 1, len(names))
    return pixels


@final
class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root
        self.names = _images_among(_walk(root, root, set()))

    def read(self, name: str) -> bytes:
        path = self._root / name
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise DataError(f"image {path} is larger than {MAX_FILE_BYTES // 2**20} MiB.")
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"image {path} cannot be read: {error.strerror or error}.") from error

    def close(self) -> None:
        pass


@final
class _Zip:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise DataError(f"{path} is not a zip archive, or is damaged ({error}).") from error
        # Archives made on Windows may hold backslashes.
        self._members = {m.filename.replace("\\", "/"): m for m in self._archive.infolist() if not m.is_dir()}
        self.names = _images_among(self._members)

    def read(self, name: str) -> bytes:
        member = self._members[name]
        if member.file_size > MAX_FILE_BYTES:
            raise DataError(f"image {name} in {self._path} is larger than {MAX_FILE_BYTES // 2**20} MiB.")
        try:
            return self._archive.read(member)
        # A damaged member surfaces as any of these; RuntimeError is zipfile's word for an encrypted one.
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
            raise DataError(f"image {name} in {self._path} cannot be read: {error}.") from error

    def close(self) -> None:
        self._archive.close()


def _walk(root: Path, folder: Path, seen: set[tuple[int, int]]) -> Iterable[str]:
    """Yield names of files under ``folder``, through links to folders, entering each folder once."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(root, Path(entry.path), seen)
            elif entry.is_file():
                yield Path(entry.path).relative_to(root).as_posix()


def _images_among(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(SUFFIXES) and not _hidden(name))


def _hidden(name: str) -> bool:
    # __MACOSX and ._name hold what macOS adds to archives.
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _decode(files: ImageFiles, name: str) -> Tensor:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtraError("pillow", "cli") from None
    data = files.read(name)
    try:
        # Pillow warns of images that it then converts well.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.mode.startswith(("I", "F")):
                raise DataError(f"image {name} has more than 8 bits a channel; convert it to 8 bits.")
            rgb = image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"image {name} is damaged: {reason}.") from error
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}×{image.shape[1]}"
