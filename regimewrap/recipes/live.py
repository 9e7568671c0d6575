"""What reading and training look like in a terminal: bars that move, or plain lines where nobody watches.

Needs rich. Shows what it is told; decides nothing.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from typing import TYPE_CHECKING, Self, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, TracebackType

    from rich.progress import TaskID

    from regimewrap.recipes.training import Status

_PATIENCE_SECONDS = 2.0
_WIDTH_OF_FILES = 120


def stdout_console() -> Console:
    """Return a console on standard output; one that is not a terminal is wide enough for tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_FILES)


def say(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def working(label: str) -> Iterator[None]:
    """Show, on standard error and in a terminal, that something without a known length goes on."""
    console = Console(stderr=True, highlight=False)
    with console.status(label) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def stopping_on_interrupt(on_first: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Take the first Ctrl-C as a wish to stop soon, the second as one to stop at once.

    Args:
        on_first: called at the first Ctrl-C.

    Yields:
        Whether there was a first one. The second raises ``KeyboardInterrupt``, as always outside this block.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # what signal calls
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        on_first()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@final
class CountBar:
    """A bar that appears, in a terminal, once something has taken two seconds."""

    def __init__(self, console: Console, label: str) -> None:
        self._label = label
        self._began = time.monotonic()
        self._progress = _progress(console, MofNCompleteColumn())
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        """Take how many are done, of how many."""
        if self._task is None:
            if time.monotonic() - self._began < _PATIENCE_SECONDS:
                return
            self._task = self._progress.add_task(self._label, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


@final
class RunsBar:
    """A bar for each run in progress, with loss, keep ratio and phase, and one over all runs if there are several."""

    def __init__(self, console: Console, runs: int = 1) -> None:
        self._progress = _progress(console, TextColumn("{task.fields[now]}", markup=False))
        self._tasks: dict[str, TaskID] = {}
        self._all = self._progress.add_task("all runs", total=runs, now="") if runs > 1 else None

    def update(self, name: str, status: Status) -> None:
        """Show where a run is."""
        now = describe(status)
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=status.total_steps, now=now)
        self._progress.update(self._tasks[name], completed=status.step, now=now)

    def evaluated(self, done: int, total: int) -> None:
        """Show how much of a model's evaluation is done."""
        if "evaluating" not in self._tasks:
            self._tasks["evaluating"] = self._progress.add_task("evaluating", total=total, now="")
        self._progress.update(self._tasks["evaluating"], completed=done)

    def finish(self, name: str, line: str) -> None:
        """Take a run's bar away and say how it ended."""
        if name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))
        if self._all is not None:
            self._progress.advance(self._all)
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        say(self._progress.console, line)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.stop()


def describe(status: Status) -> str:
    """Return loss, keep ratio and phase as text of a constant width."""
    loss = "  –   " if math.isnan(status.loss) else f"{status.loss:6.4f}"
    return f"loss {loss}  keep ratio {status.keep_ratio:5.3f}  {status.phase:<8}"


def _progress(console: Console, column: TextColumn | MofNCompleteColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        column,
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
