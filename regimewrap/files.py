"""Files and words that every room needs: whole-file writes, folders, tables, the nearest name, differing settings.

Knows of no model, no policy and no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import reprlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, repeat, zip_longest
from pathlib import Path
from typing import IO, Any

from regimewrap.errors import DataError, MissingExtraError


def write_whole(path: str | os.PathLike[str], content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: beside its place first, then moved there.

    Args:
        path: where the file goes.
        content: text (written as UTF-8), bytes, or a function that writes into the open file it is given.

    Raises:
        DataError: it cannot be written. A file that was there is as it was, and nothing lies beside it.
    """
    path = Path(path)
    beside = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        beside = Path(name)
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        beside.chmod(0o644)  # mkstemp's own is for the owner alone
        beside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be written: {reason}. Free some space or choose another place.") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


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


@dataclass(frozen=True)
class Table:
    """Rows of cells below some words: text in a terminal, HTML in a notebook.

    Attributes:
        rows: of cells; the first names the columns, further ones may be shorter.
        head: the words, on one line or several.
        left: which columns are set to the left; the others are figures.

    >>> print(Table([("budget", "accuracy"), ("full", 0.93), (0.1, 0.9)]))
    budget  accuracy
    full        0.93
    0.1          0.9
    """

    rows: Sequence[Sequence[object]]
    head: str = ""
    left: Collection[int] = (0,)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """Return aligned columns.

        Args:
            width: columns of the terminal. A table that is wider becomes a block of lines for each row, so that no
                figure is cut.
        """
        table = [[str(cell) for cell in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip_longest(*table, fillvalue="")]
        if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
            (_, *names), *body = table
            pad = max(map(len, names))
            lines = [
                "\n".join([first, *(f"  {name:<{pad}}  {cell}" for name, cell in zip(names, cells, strict=False))])
                for first, *cells in body
            ]
        else:
            sides = ["<" if column in self.left else ">" for column in range(len(widths))]
            lines = [
                "  ".join(f"{cell:{side}{size}}" for cell, side, size in zip(row, sides, widths, strict=False)).rstrip()
                for row in table
            ]
        return "\n".join([self.head, *lines] if self.head else lines)

    def html(self) -> str:
        """Return the same as HTML, every cell escaped.

        >>> Table([("<b>",)], "one row").html()
        '<p>one row</p><table><tr><th style="text-align: left">&lt;b&gt;</th></tr></table>'
        """
        sides = ["left" if column in self.left else "right" for column in range(max(map(len, self.rows), default=0))]
        lines = [
            "".join(
                f'<{tag} style="text-align: {side}">{escape(str(cell))}</{tag}>'
                for cell, side in zip(row, sides, strict=False)
            )
            for tag, row in zip(chain(["th"], repeat("td")), self.rows, strict=False)
        ]
        head = f"<p>{escape(self.head)}</p>".replace("\n", "<br>") if self.head else ""
        return f"{head}<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>" if lines else head


class Tabled:
    """What prints as a table, and is shown as one in a notebook."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """Return what is printed; where that is wider than ``width`` columns, a row is a block of lines."""
        return self._table().text(width)

    def _repr_html_(self) -> str:
        return self._table().html()


def axes_for(ax: Any) -> Any:
    """Return matplotlib axes to draw on: those given, or new ones.

    Raises:
        MissingExtraError: there are none, and matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("matplotlib", "cli") from None
    return pyplot.subplots()[1]


def nearest(name: object, names: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of ``names``, or nothing when none is near.

    >>> nearest("sawtoth", ["mixed", "sawtooth"])
    " Did you mean 'sawtooth'?"
    """
    known = {each.lower(): each for each in names}
    found = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    return f" Did you mean {known[found[0]]!r}?" if found else ""


# YAML's aliases make a few bytes into a value whose whole repr takes minutes.
_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel = 4
_BOUNDED.maxdict = _BOUNDED.maxlist = _BOUNDED.maxtuple = _BOUNDED.maxset = 12
_BOUNDED.maxstring = _BOUNDED.maxother = _BOUNDED.maxlong = 200


def shown(value: object) -> str:
    """Return ``value`` as it is put into a message: its repr, on one line and short."""
    text = " ".join(_BOUNDED.repr(value).split())
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


def terminal_width() -> int | None:
    """Return the terminal's columns; ``None`` where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
