"""The folder a run leaves: proven writable before the run, gone again if the run left nothing in it."""

from __future__ import annotations

import contextlib
import tempfile
from typing import TYPE_CHECKING

import torch

from regimewrap.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn


@contextlib.contextmanager
def claimed_folder(folder: Path) -> Iterator[Path]:
    """Make a folder and prove that it can be written; on the way out, remove what was made and is still empty.

    Raises:
        DataError: it cannot be made or written.
    """
    made: list[Path] = []
    try:
        try:
            made += [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except FileExistsError:
            raise DataError(f"cannot write to {folder}: it is a file. Choose a folder with --out.") from None
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error
        yield folder
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # not empty, or never made
                each.rmdir()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's ``state_dict``, whole or not at all. Its keys are those of the model before it was wrapped.

    Raises:
        DataError: the file cannot be written.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        torch.save(model.state_dict(), beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        raise DataError(f"cannot write {path}: {error}.") from error
    finally:
        beside.unlink(missing_ok=True)
