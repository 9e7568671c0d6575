"""Files and words that every room needs: whole-file writes, the nearest name, differences between settings.

Knows of no model, no policy and no torch.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from regimewrap.errors import DataError


def write_whole(path: str | os.PathLike[str], content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file whole or not at all: beside its place first, then moved there.

    Args:
        path: where the file goes.
        content: text (written as UTF-8), bytes, or a function that writes the file it is given.

    Raises:
        DataError: it cannot be written. A file that was there is as it was, and nothing lies beside it.
    """
    path = Path(path)
    beside = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        beside = Path(name)
        if callable(content):
            content(beside)
        else:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.chmod(0o644)  # mkstemp's own is for the owner alone
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise DataError(f"{path} cannot be written: {reason}. Free some space or choose another place.") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def nearest(name: object, names: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of ``names``, or nothing when none is near.

    >>> nearest("sawtoth", ["mixed", "sawtooth"])
    " Did you mean 'sawtooth'?"
    """
    known = {each.lower(): each for each in names}
    found = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    return f" Did you mean {known[found[0]]!r}?" if found else ""


def shown(value: object) -> str:
    """Return ``value`` as it is put into a message: its repr, on one line and short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:76]} ..."


def differences(saved: Any, here: Any, path: str = "") -> Iterator[str]:
    """Yield where two nested settings differ, with both sides.

    >>> list(differences({"a": {"b": 1}}, {"a": {"b": 2}}))
    ['a.b is 1 in the state and 2 here']
    """
    if isinstance(saved, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*saved, *here]):
            yield from differences(saved.get(name), here.get(name), f"{path}.{name}".lstrip("."))
    elif saved != here:
        yield f"{path} is {shown(saved)} in the state and {shown(here)} here"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with their cells below each other: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join(
        "  ".join(f"{cell:<{widths[0]}}" if i == 0 else f"{cell:>{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    )
