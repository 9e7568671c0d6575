"""The folder of ``regimewrap train``: which runs there are to make, where they stopped, and what they leave.

``summary.csv`` has a row an epoch of every run, ``model.pt`` what was trained (``dense.pt`` its twin), and, until
everything has ended, ``checkpoint.pt`` what it takes to go on. Each is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, final

import timm
import torch

from regimewrap import RegimePolicy, __version__, gate_of
from regimewrap.errors import DataError, PolicyError, StateError
from regimewrap.files import Table, claimed_folder, differences, write_whole
from regimewrap.report.summary import budget, percent, percent_spread, spread
from regimewrap.train import saved
from regimewrap.train.pictures import find_pictures
from regimewrap.train.run import Run, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

    from regimewrap import CyclePolicy
    from regimewrap.train.pictures import Pictures
    from regimewrap.train.settings import Settings

_VERSION = 1
_FEW_MOVES = 100
_SECONDS_BETWEEN_CHECKPOINTS = 600
SUMMARY_FILE = "summary.csv"
_OURS = (SUMMARY_FILE, saved.CHECKPOINT_FILE, "model.pt", "dense.pt", "model-seed-*.pt", "dense-seed-*.pt")


class Job(NamedTuple):
    """A run to make: its name, policy, seed, and the name of the file that holds its model."""

    arm: str
    policy: RegimePolicy
    seed: int
    file: str


@final
@dataclass
class Folder:
    """A folder and the runs that belong in it; nothing is read or written before ``train``.

    Attributes:
        out: where everything goes.
        data: folder of pictures.
        settings: of each run.
        policy: of the runs.
        seeds: a run for each.
        compare: with each run a dense twin: the same network, seed and pictures at the full budget throughout.
        device: where to train.
        workers: processes that read pictures.
        say: takes lines that stay.
        show: takes where the run is, as often as it changes.
    """

    out: Path
    data: Path
    settings: Settings
    policy: RegimePolicy
    seeds: range
    compare: bool
    device: torch.device
    workers: int
    say: Callable[[str], None]
    show: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        dense = self.policy.replace(cycle=RegimePolicy.preset("dense").cycle)
        arms = [("regimewrap", self.policy, "model"), ("dense", dense, "dense")][: 1 + self.compare]
        first = self.seeds[0]
        self.jobs = [
            Job(arm, policy, seed, f"{name}.pt" if seed == first else f"{name}-seed-{seed}.pt")
            for seed in self.seeds
            for arm, policy, name in arms
        ]
        self._done: list[dict[str, Any]] = []  # rows of the runs that ended
        self._last_saved = time.monotonic()

    def train(self, *, resume: bool = False, overwrite: bool = False) -> int:
        """Make the runs that are not made yet.

        Args:
            resume: go on from the checkpoint, if there is one.
            overwrite: remove what an earlier run left.

        Returns:
            0; 130 after Ctrl-C, 143 after SIGTERM: then a checkpoint was left.

        Raises:
            RegimewrapError: something cannot be used; found before training where that is possible.
        """
        _refuse_ranks()
        if self.data.resolve() == self.out.resolve().parent and not (self.data / "train").is_dir():
            raise DataError(
                f"{self.out} is a folder in {self.data} and would be taken for a class; choose another --out."
            )
        checkpoint = self._begin(resume=resume, overwrite=overwrite)
        if resume and checkpoint is None and all((self.out / job.file).exists() for job in self.jobs):
            self.say(f"The run in {self.out} has ended; there is nothing to go on with.")
            return 0
        with claimed_folder(self.out):
            pictures = find_pictures(self.data)
            here = self._belongs_to(pictures)
            number, state = self._place(checkpoint, here)
            self.say(f"Data: {pictures.about}.")
            with _stopping() as asked:
                for job in self.jobs[number:]:
                    run = self._built(job, pictures, state)
                    if overwrite and job is self.jobs[0]:
                        for path in self._left():
                            path.unlink()
                    try:
                        self._make(run, job, here, should_stop=lambda: bool(asked))
                    except Stopped:
                        self._save(here, job, run)
                        self.say(f"Stopped after update {run.update} of {run.total}; --resume goes on from here.")
                        return 128 + asked[0]
                    state = None
            (self.out / saved.CHECKPOINT_FILE).unlink(missing_ok=True)
        return 0

    def table(self, width: int | None = None) -> str:
        """Return accuracy, in percent, of each arm at each keep ratio, over its seeds."""
        ratios = sorted(self.settings.keep_ratios, reverse=True)
        last = [row for row in self._done if row["epoch"] == self.settings.epochs]
        rows = [["", *(budget(str(ratio)) for ratio in ratios)]]
        for arm in dict.fromkeys(job.arm for job in self.jobs):
            mine = [row for row in last if row["arm"] == arm]
            rows.append(
                [arm, *(percent_spread(spread([row[f"accuracy_at_{ratio:g}"] for row in mine])) for ratio in ratios)]
            )
        seeds = len({job.seed for job in self.jobs})
        over = "one seed, which shows little" if seeds == 1 else f"mean ± standard deviation over {seeds} seeds"
        return Table(rows, f"Accuracy on the validation pictures, in %, last epoch, {over}:").text(width)

    def _left(self) -> list[Path]:
        """Return what an earlier run left."""
        return [path for pattern in _OURS for path in sorted(self.out.glob(pattern))]

    def _begin(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Return the checkpoint to go on from, if any, after a check of what is in the folder."""
        found = self._left()
        if resume:
            path = self.out / saved.CHECKPOINT_FILE
            return saved.read(path, "regimewrap train") if path.exists() else None
        if found and not overwrite:
            raise DataError(
                f"{self.out} holds a run already ({found[0].name}). Go on with --resume, replace it with --overwrite, "
                "or choose another --out."
            )
        return None

    def _belongs_to(self, pictures: Pictures) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "runs": [f"{job.arm}, seed {job.seed}" for job in self.jobs],
            "policy": self.policy.model_dump(mode="json"),
            "pictures": f"{len(pictures.train)} and {len(pictures.val)}, checksum {pictures.checksum():08x}",
        }

    def _place(self, checkpoint: dict[str, Any] | None, here: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """Return the number of the run to go on with, and its state."""
        if checkpoint is None:
            return 0, None
        path = self.out / saved.CHECKPOINT_FILE
        if checkpoint.get("version") != _VERSION:
            raise StateError(f"{path} has version {checkpoint.get('version')!r}; this regimewrap reads {_VERSION}.")
        if problems := "; ".join(differences(checkpoint["belongs_to"], here)):
            raise StateError(f"{path} belongs to another run: {problems}. Repeat its options, or choose another --out.")
        if checkpoint["versions"] != _versions():
            there, now = (
                ", ".join(f"{n} {v}" for n, v in each.items()) for each in (checkpoint["versions"], _versions())
            )
            self.say(f"The checkpoint is of {there}; with {now} the run may go on a little differently.")
        self._done = checkpoint["done"]
        return checkpoint["job"], checkpoint["run"]

    def _built(self, job: Job, pictures: Pictures, state: dict[str, Any] | None) -> Run:
        run = Run(self.settings, pictures, job.policy, job.seed, self.device, self.workers)
        if state is not None:
            try:
                run.load(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise StateError(f"{self.out / saved.CHECKPOINT_FILE} does not fit this run: {reason}") from None
        elif job is self.jobs[0]:
            parameters = sum(each.numel() for each in run.model.parameters())
            size = "×".join(map(str, run.look["input_size"][1:]))
            about = f"{parameters:,} parameters, {len(gate_of(run.model).sites)} gated activations, pictures of {size}"
            self.say(f"{self.settings.model}: {about}, on {self.device.type}.")
            self.say(f"{run.total} updates, {run.per_epoch} an epoch. {_what_moves(run.cycler.policy, run.total)}")
        return run

    def _make(self, run: Run, job: Job, here: dict[str, Any], should_stop: Callable[[], bool]) -> None:
        name = job.arm if len(self.jobs) == 1 else f"{job.arm}, seed {job.seed}"
        if run.update:
            self.say(f"{name}: on from update {run.update} of {run.total}.")
        began, first = time.monotonic(), run.update

        def updated(run: Run) -> None:
            left = (time.monotonic() - began) / (run.update - first) * (run.total - run.update)
            place = f"update {run.update}/{run.total}"
            self.show(f"{name}: {place}, keep ratio {run.cycler.keep_ratio:.3f}, {timedelta(seconds=round(left))} left")
            if time.monotonic() - self._last_saved > _SECONDS_BETWEEN_CHECKPOINTS:
                self._save(here, job, run)

        def ended(run: Run) -> None:
            self.say(f"{name}: {_epoch_line(run.rows[-1], self.settings)}")
            self._write_summary([*self._done, *_named(run.rows, job)])
            self._save(here, job, run)

        run.train(should_stop, updated, ended)
        saved.save(
            self.out / job.file,
            run.evaluated_model,
            model=self.settings.model,
            model_kwargs=run.model_kwargs,
            classes=list(run.pictures.classes),
            look=run.look,
            policy=job.policy.model_dump(mode="json"),
            data=str(self.data.absolute()),
            accuracy={ratio: run.rows[-1][f"accuracy_at_{ratio:g}"] for ratio in self.settings.keep_ratios},
        )
        self._done += _named(run.rows, job)

    def _save(self, here: dict[str, Any], job: Job, run: Run) -> None:
        content = {
            "version": _VERSION,
            "versions": _versions(),
            "belongs_to": here,
            "job": self.jobs.index(job),
            "done": self._done,
            "run": run.state(),
        }
        write_whole(self.out / saved.CHECKPOINT_FILE, lambda file: torch.save(content, file))
        self._last_saved = time.monotonic()

    def _write_summary(self, rows: list[dict[str, Any]]) -> None:
        lines = io.StringIO()
        writer = csv.DictWriter(lines, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.out / SUMMARY_FILE, lines.getvalue())


def _named(rows: list[dict[str, Any]], job: Job) -> list[dict[str, Any]]:
    return [{"arm": job.arm, "seed": job.seed, **row} for row in rows]


def _epoch_line(row: dict[str, Any], settings: Settings) -> str:
    largest, smallest = max(settings.keep_ratios), min(settings.keep_ratios)
    figures = ", ".join(
        f"{percent(row[f'accuracy_at_{ratio:g}'])} at {budget(str(ratio))}"
        for ratio in dict.fromkeys((largest, smallest))
    )
    epoch = f"epoch {row['epoch']:>{len(str(settings.epochs))}}/{settings.epochs}"
    return f"{epoch}  loss {row['train_loss']:.4f}  accuracy {figures}  {row['train_seconds']:.1f} s"


def _what_moves(cycle: CyclePolicy, total: int) -> str:
    """Say how often a policy moves the keep ratio in a run of so many updates, or refuse a run that is too short."""
    strategy = cycle.strategy
    if strategy.kind in ("dense", "constant"):
        return f"The policy ({strategy.kind}) holds one keep ratio."
    moves = total if strategy.each_update else max(0, total - cycle.warmup) // cycle.every
    if moves == 0:
        raise PolicyError(
            f"the run is too short: its {total} updates end before the policy decides for the first time, after "
            f"{cycle.warmup + cycle.every}. Train for more --epochs, or with a smaller --batch-size."
        )
    short = f" That is short: fewer than {_FEW_MOVES} show little." if moves < _FEW_MOVES else ""
    return f"The policy ({strategy.kind}) moves the keep ratio {moves} times.{short}"


def _versions() -> dict[str, str]:
    return {"regimewrap": __version__, "torch": str(torch.__version__), "timm": timm.__version__}


def _refuse_ranks() -> None:
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise DataError(
            f"regimewrap train runs in one process; torchrun started {ranks}. Train on many ranks with a loop of your "
            "own, or with Accelerate, Lightning or Hugging Face's Trainer: see docs/how-to/scale-out.md."
        )


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """Take the first Ctrl-C or SIGTERM as a wish to stop soon, the second as one to stop at once.

    Yields:
        The numbers of the signals that came. The second raises ``KeyboardInterrupt``.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # what signal calls
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
