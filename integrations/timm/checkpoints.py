"""Which checkpoint of a run is the newest, whether it is whole, and whether it belongs to the run that asks for it.

Files are timm's, written by its ``CheckpointSaver``; what this package adds travels in them as task state. Reads only.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from regimewrap.errors import StateError

#: The key in the task state under which ``train`` keeps where it is.
PROGRESS_KEY = "regimewrap_train"
PROGRESS_VERSION = 1

SUFFIX = ".pth.tar"

_RECOVERY = re.compile(r"recovery-(\d+)-(\d+)\.pth\.tar")
_EPOCH = re.compile(r"checkpoint-(\d+)\.pth\.tar")


def newest(folder: Path) -> Path | None:
    """Return the checkpoint that is furthest into the run, or ``None`` if there is none.

    Raises:
        StateError: ``last.pth.tar``, whose name does not say how far it is, is damaged.
    """
    places = {path: place for path in folder.glob(f"*{SUFFIX}") if (place := _place(path)) is not None}
    last = folder / f"last{SUFFIX}"
    if last.exists():
        progress = progress_of(read(last), last)
        places[last] = (progress["epoch"], progress["update"], 1)  # the same place twice: a hard link
    return max(places, key=places.__getitem__, default=None)


def ranked(folder: Path, before_epoch: int) -> list[tuple[int, float, Path]]:
    """Return epoch, metric and path of timm's checkpoints of the epochs before one, those that can be read."""
    found = []
    for path in folder.iterdir():
        match = _EPOCH.fullmatch(path.name)
        if match and int(match[1]) < before_epoch:
            with contextlib.suppress(StateError):
                found.append((int(match[1]), float(read(path)["metric"]), path))
    return found


def recoveries(folder: Path) -> list[Path]:
    """Return the checkpoints from within epochs."""
    return [path for path in folder.iterdir() if _RECOVERY.fullmatch(path.name)]


def read(path: Path) -> dict[str, Any]:
    """Return a checkpoint after a check of every byte.

    Raises:
        StateError: there is none, or it is truncated, altered, or not a checkpoint; the file is as it was.
    """
    mend = "Delete it and resume again to go on from the one before it, or name another with --resume FILE."
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not compare the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise StateError(f"{path} is damaged: the checksum of {damaged} is wrong. {mend}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except StateError:
        raise
    except FileNotFoundError:
        raise StateError(f"there is no checkpoint {path}.") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise StateError(f"{path} is damaged or truncated: {error}. {mend}") from None
    except Exception as error:
        raise StateError(f"{path} cannot be read as a checkpoint ({type(error).__name__}). {mend}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "optimizer"} <= checkpoint.keys():
        raise StateError(f"{path} is not a training checkpoint of timm's: it has no state_dict and optimizer.")
    return checkpoint


def progress_of(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what ``train`` keeps in a checkpoint.

    Raises:
        StateError: it keeps nothing there, or another version of it does.
    """
    progress = (checkpoint.get("task_state") or {}).get(PROGRESS_KEY)
    if not isinstance(progress, dict):
        raise StateError(f"{path} was not written by python -m regimewrap.integrations.timm.train.")
    if progress.get("version") != PROGRESS_VERSION:
        found = progress.get("version")
        raise StateError(f"{path} has version {found!r}; this regimewrap reads version {PROGRESS_VERSION}.")
    return progress


def require_same(saved: dict[str, Any], here: dict[str, Any], path: Path) -> None:
    """Check that a run goes on with the settings it began with.

    Raises:
        StateError: it does not; the message shows both sides.
    """
    differing = [name for name in dict.fromkeys([*saved, *here]) if saved.get(name) != here.get(name)]
    if differing:
        sides = "; ".join(f"{name} is {saved.get(name)!r} there and {here.get(name)!r} here" for name in differing)
        raise StateError(f"{path} belongs to another run: {sides}. Repeat its settings, or choose another --out.")


def _place(path: Path) -> tuple[int, int, int] | None:
    """Return the epoch and update at which a run goes on from a file, read from its name."""
    if match := _RECOVERY.fullmatch(path.name):
        return int(match[1]), int(match[2]), 0
    if match := _EPOCH.fullmatch(path.name):
        return int(match[1]) + 1, 0, 0
    return None
