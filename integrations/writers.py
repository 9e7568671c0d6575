"""Logs for loops of one's own, one small protocol for all: CSV, JSON lines, TensorBoard, Weights & Biases.

::

    with JsonLinesWriter("run.jsonl") as log:
        for x, y in loader:
            ...
            regime = cycler.step(loss)
            log.write(cycler.updates, loss=loss.item(), **regime._asdict())

None of them is needed by anything else here, and none asks a model or a cycler for values. On several ranks make one
on rank 0 only. Trainers that log by themselves need none.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, Self, SupportsFloat, final

from regimewrap.errors import DataError

from .requires import require

#: Numbers, tensors of one element (which waits for their device), text; ``None`` is left out or left empty.
Value = SupportsFloat | str | None


class Writer(Protocol):
    """What every writer can do; a class of yours with these methods is one."""

    def write(self, step: int, **values: Value) -> None:
        """Write values of one moment.

        Args:
            step: optimizer updates so far, never falling.
            **values: by name.
        """

    def close(self) -> None:
        """Finish; nothing is written after it."""

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()


@final
class JsonLinesWriter(Writer):
    """A JSON mapping on each line, with ``step`` first. NaN and infinities, which JSON lacks, become ``null``."""

    def __init__(self, path: str | os.PathLike[str], *, resume_after: int | None = None) -> None:
        """Begin a file, or go on with one.

        Args:
            path: the file.
            resume_after: go on after this step, usually ``cycler.updates`` of the checkpoint: later lines, which the
                resumed run writes again, and a last line that was cut off are dropped. ``None``: a new file.

        Raises:
            DataError: the file cannot be written; or there is one already and ``resume_after`` is ``None``, or it is
                no such file. It is as it was.
        """
        path, last = Path(path), resume_after or 0
        try:
            lines = _old_text(path, resume_after).splitlines(keepends=True)
            kept = [line for line in lines if int(json.loads(line)["step"]) <= last]
        except (ValueError, TypeError, KeyError) as error:
            raise _not_a_log(path, error) from None
        self._file = _begun(path, "".join(kept))

    def write(self, step: int, **values: Value) -> None:
        """Write a line, at once."""
        row = {"step": step} | {name: _finite(_plain(value)) for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@final
class CsvWriter(Writer):
    """Comma-separated values under a header, with ``step`` first. A name that comes later adds a column."""

    def __init__(self, path: str | os.PathLike[str], *, resume_after: int | None = None) -> None:
        """Begin a file, or go on with one.

        Args:
            path: the file.
            resume_after: go on after this step, usually ``cycler.updates`` of the checkpoint: later lines, which the
                resumed run writes again, and a last line that was cut off are dropped. ``None``: a new file.

        Raises:
            DataError: the file cannot be written; or there is one already and ``resume_after`` is ``None``, or it is
                no such file. It is as it was.
        """
        self._path, last = Path(path), resume_after or 0
        try:
            columns, rows = _table(_old_text(self._path, resume_after))
            kept = [row for row in rows if int(row["step"]) <= last]
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise _not_a_log(self._path, error) from None
        self._columns = columns
        self._file = _begun(self._path, _csv(columns, kept))

    def write(self, step: int, **values: Value) -> None:
        """Write a line, at once."""
        row = {"step": step} | {name: _plain(value) for name, value in values.items()}
        new = [name for name in row if name not in self._columns]
        if new:
            self._file.close()
            _, rows = _table(self._path.read_text(encoding="utf-8"))
            self._columns += new
            self._file = _begun(self._path, _csv(self._columns, rows))
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(row)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@final
class TensorBoardWriter(Writer):
    """Curves for numbers, text for text, as TensorBoard's event files."""

    def __init__(self, folder: str | os.PathLike[str], *, resume_after: int | None = None) -> None:
        """Begin an event file in a folder.

        Args:
            folder: the run's own, below the one that ``tensorboard --logdir`` gets.
            resume_after: have TensorBoard hide what earlier files in the folder have after this step.

        Raises:
            MissingExtraError: tensorboard is not installed.
            UnsupportedVersionError: it is too old.
        """
        require("tensorboard", "2.10", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_after is None else resume_after + 1
        self._board: Any = SummaryWriter(os.fspath(folder), purge_step=purge_step)

    def write(self, step: int, **values: Value) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            plain = _plain(value)
            if isinstance(plain, str):
                self._board.add_text(name, plain, step)
            elif plain is not None:
                self._board.add_scalar(name, plain, step)

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._board.close()


@final
class WandbWriter(Writer):
    """A run of Weights & Biases, offline unless you say otherwise: ``wandb sync`` sends it when you want."""

    def __init__(
        self, project: str, *, mode: Literal["online", "offline", "disabled"] = "offline", **options: Any
    ) -> None:
        """Begin a run.

        Args:
            project: the project's name.
            mode: of ``wandb.init``.
            **options: of ``wandb.init``, such as ``dir``, ``config``, and to resume ``id`` and ``resume="allow"``.

        Raises:
            MissingExtraError: wandb is not installed.
            UnsupportedVersionError: it is too old.
        """
        require("wandb", "0.16", "wandb")
        import wandb

        self._run: Any = wandb.init(project=project, mode=mode, **options)

    def write(self, step: int, **values: Value) -> None:
        """Log the values."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._run.log({name: value for name, value in plain.items() if value is not None}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _plain(value: Value) -> float | str | None:
    if value is None or isinstance(value, str | int | float):
        return value
    return float(value)


def _finite(value: float | str | None) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _old_text(path: Path, resume_after: int | None) -> str:
    """Return the whole lines of a file that may be there."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot go on with this log: {error}.") from None
    if text and resume_after is None:
        raise DataError(
            f"{path}: there is a log already. To go on with it pass resume_after=cycler.updates; "
            "for a new one, choose another path."
        )
    return text[: text.rfind("\n") + 1]


def _not_a_log(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot go on with this log, every line of which should have a step: {error!r}.")


def _table(text: str) -> tuple[list[str], list[dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text))
    return list(reader.fieldnames or []), list(reader)


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    if not columns:
        return ""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _begun(path: Path, text: str) -> io.TextIOWrapper:
    """Write a file that begins with some text, whole or not at all, and return it open at its end."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise DataError(f"{path}: cannot write a log here: {error.strerror or error}.") from None
