"""One cell = one file: what it is called, what it holds, who makes it now, and what else lies in a study's folder.

A cell's name ends in a hash of all that its figures depend on. Whoever finishes the file has done the cell, so runs
that are killed and resumed, run side by side or on a cluster are one and the same thing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from regimewrap.errors import DataError, MissingExtraError, PolicyError
from regimewrap.files import differences, write_whole
from regimewrap.policy.policy import CyclePolicy
from regimewrap.policy.settings import Natural, Ratio, Settings
from regimewrap.recipes.records import device_text, processor, versions
from regimewrap.recipes.study.arms import ARMS, RECIPE, trial
from regimewrap.recipes.study.outcomes import make
from regimewrap.recipes.study.spec import FIRST_TRIAL_SEED, Characters, Study, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Maker = Callable[["Cell", Path | None], dict[str, Any]]

try:
    import fcntl
except ImportError:  # Windows: two runs may make the same cell, and write the same file
    fcntl = None  # type: ignore[assignment]

Number = float | None


@final
class Cell(Settings):
    """All that a cell's figures depend on. ``task.training.lr`` is the learning rate of this cell."""

    recipe: Natural = RECIPE
    name: str
    task: Task
    arm: str
    knob: Number = None
    cycle: CyclePolicy | None = None
    seed: Natural
    part: Literal["validation", "test"] = "test"
    budgets: tuple[Ratio, ...]

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self.task.training.lr

    @property
    def file(self) -> str:
        """The name of this cell's file."""
        settings = self.model_dump(mode="json", exclude_defaults=True)
        if self.cycle is not None:  # whole: presets and their defaults may change
            settings["cycle"] = self.cycle.model_dump(mode="json")
        settings |= {"recipe": self.recipe, "task": settings["task"] | {"kind": self.task.kind}}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        kind = "trial-" if self.part == "validation" else ""
        return f"{self.name}_{self.arm}_{kind}{self.seed}_{digest}.json"


def final_cell(study: Study, task: str, arm: str, seed: int, lr: float, knob: float | None) -> Cell:
    """Return the cell of a final run."""
    shared = _shared(study, task, arm, lr, knob)
    return Cell(**shared, seed=seed, budgets=study.budgets)


def trial_cells(study: Study, task: str, arm: str) -> list[list[Cell]]:
    """Return the cells of an arm's trials, a list of seeds for each trial; none where there is nothing to choose."""
    if study.trials.count == 1:
        return []
    settings, home, trials = study.tasks[task], ARMS[arm].home, []
    budgets: tuple[float, ...] = tuple(dict.fromkeys((1.0, home)))
    if ARMS[arm].nets != "one":
        budgets = study.budgets
    for number in range(study.trials.count):
        lr, knob = trial(ARMS[arm], settings.training.lr, number)
        shared = _shared(study, task, arm, lr, knob)
        seeds = range(FIRST_TRIAL_SEED, FIRST_TRIAL_SEED + study.trials.seeds)
        trials.append([Cell(**shared, seed=seed, part="validation", budgets=budgets) for seed in seeds])
    return trials


def choice(study: Study, task: str, arm: str, figures: dict[str, dict[str, Any]]) -> tuple[float, float | None] | None:
    """Return the learning rate and knob that an arm's trials chose, or ``None`` while trials are missing.

    The best mean on the validation set at the arm's home budget wins; of equals the first.

    Args:
        study: the study.
        task: name of the task.
        arm: name of the arm.
        figures: of the finished cells by file name.
    """
    trials = trial_cells(study, task, arm)
    if not trials:
        return trial(ARMS[arm], study.tasks[task].training.lr, 0)
    if any(cell.file not in figures for cells in trials for cell in cells):
        return None
    home = f"{ARMS[arm].home:g}"
    means = []
    for cells in trials:
        values = [merit(study.tasks[task], figures[cell.file], home) for cell in cells]
        means.append(sum(values) / len(values))
    best = trials[means.index(max(means))][0]
    return best.lr, best.knob


def merit(task: Task, figures: dict[str, Any], budget: str) -> float:
    """Return what trials compare: accuracy or, for text, minus the nats; minus infinity if it is not finite."""
    value = -figures["nll"][budget] if isinstance(task, Characters) else figures["accuracy"][budget]
    return value if math.isfinite(value) else -math.inf


def make_file(cell: Cell, folder: str, data: str | None = None, maker: Maker = make) -> str:
    """Make one cell and write its file, unless it is there; what a worker process runs.

    Returns:
        ``made``, ``there``, ``elsewhere`` (another process is making it now), or ``failed: REASON`` with the whole
        error in ``failed/``.

    Raises:
        DataError: the data or the folder cannot be used, so other cells would fail likewise.
        MissingExtraError: a package is missing.
    """
    path = Path(folder) / "cells" / cell.file
    with _lock(path) as mine:
        if path.exists():
            return "there"
        if not mine:
            return "elsewhere"
        began, threads = time.perf_counter(), torch.get_num_threads()
        torch.set_num_threads(1)  # figures depend on it
        try:
            # Arms that are known to go wrong belong here, so their warnings are part of the record.
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("default")
                figures = maker(cell, None if data is None else Path(data))
            figures["warnings"] = sorted({" ".join(str(each.message).split()) for each in said})
        except (DataError, MissingExtraError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever went wrong is written down, and the other cells go on
            return keep_failure(cell, folder, error)
        finally:
            torch.set_num_threads(threads)
        write_cell(cell, path, figures, time.perf_counter() - began)
        with contextlib.suppress(OSError):
            (Path(folder) / "failed" / cell.file).unlink(missing_ok=True)
        return "made"


def write_cell(cell: Cell, path: Path, figures: dict[str, Any], seconds: float) -> None:
    """Write one cell's file, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = {**versions(), "device": device_text(device), "processor": processor(), "seconds": round(seconds, 1)}
    record = {"cell": cell.model_dump(mode="json"), "figures": figures, "made": made}
    text = json.dumps(_without_nan(record), indent=1)
    # A point of a trace on one line.
    write_whole(path, re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def keep_failure(cell: Cell, folder: str, error: BaseException) -> str:
    """Write a failed cell's error into ``failed/``, and return it in a line."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    trace = "".join(traceback.format_exception(error))
    apart = Path(folder) / "failed"
    apart.mkdir(exist_ok=True)
    record = {"cell": cell.model_dump(mode="json"), "error": reason, "traceback": trace, "made": versions()}
    write_whole(apart / cell.file, json.dumps(record, indent=1) + "\n")
    return f"failed: {reason}"


def read_cells(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the records of all whole cells by file name, and a line for each file that is not one."""
    records, problems = {}, []
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            cell = Cell.model_validate(record["cell"])
            accuracy = record["figures"]["accuracy"]
            if cell.file != path.name:
                problems.append(f"{path}: its settings belong to {cell.file}; it was renamed or edited.")
            elif set(accuracy) != {f"{budget:g}" for budget in cell.budgets}:
                problems.append(f"{path}: it lacks budgets.")
            else:
                records[path.name] = {**record, "figures": _with_nan(record["figures"])}
        except (ValueError, KeyError, TypeError, OSError) as error:
            what = (
                "not a cell of this version" if isinstance(error, PolicyError | KeyError | TypeError) else "not whole"
            )
            problems.append(f"{path}: it is {what}.")
    return records, problems


def open_folder(study: Study, folder: Path) -> Study:
    """Make a study's folder, or check that it is this study's, and return the study with all that lies there.

    A folder may grow: more arms, seeds and tasks. One without cells takes any study.

    Raises:
        DataError: it belongs to another study, or cannot be written.
    """
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error
    with _lock(folder / "study.json", wait=True):
        if (folder / "study.json").exists() and any((folder / "cells").glob("*.json")):
            study = _grown(folder_study(folder), study, folder)
        write_whole(folder / "study.json", study.model_dump_json(indent=1) + "\n")
    return study


def folder_study(folder: Path) -> Study:
    """Return the study whose cells are in a folder.

    Raises:
        DataError: it is not a study's folder.
    """
    path = folder / "study.json"
    try:
        return Study.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be read ({reason}); is {folder} what study run wrote?") from None
    except (PolicyError, UnicodeDecodeError) as error:
        raise DataError(f"{path} holds no study of this version: {str(error).splitlines()[0]}") from None


def _grown(there: Study, study: Study, folder: Path) -> Study:
    shared = sorted(there.tasks.keys() & study.tasks.keys())

    def fixed(each: Study) -> dict[str, Any]:
        tasks = {name: each.tasks[name].model_dump(mode="json") for name in shared}
        return {**each.model_dump(mode="json", include={"name", "budgets", "trials"}), "tasks": tasks}

    if found := "; ".join(differences(fixed(there), fixed(study))).replace(" in the state", " in the folder"):
        raise DataError(f"{folder} belongs to another study: {found}. Choose another folder with --out.")
    arms = tuple(dict.fromkeys([*study.arms, *there.arms]))
    return study.replace(arms=arms, tasks={**there.tasks, **study.tasks}, seeds=max(there.seeds, study.seeds))


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the right to write a file, which ends with this process; yield whether we have it."""
    if fcntl is None:
        yield True
        return
    name = path.with_name(f".{path.name}.lock")
    try:
        with name.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                name.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent} cannot be written: {error.strerror or error}.") from error


def _without_nan(value: Any) -> Any:
    """Write what is not finite as text: JSON has no numbers for it."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {key: _without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
    return value


def _with_nan(value: Any) -> Any:
    match value:
        case "nan" | "inf" | "-inf":
            return float(value)
        case dict():
            return {key: _with_nan(item) for key, item in value.items()}
        case list():
            return [_with_nan(item) for item in value]
    return value


def _shared(study: Study, task: str, arm: str, lr: float, knob: float | None) -> dict[str, Any]:
    """Return what the cells of one arm have in common, seed and part aside."""
    settings = study.tasks[task].replace(training={"lr": lr})
    policy = ARMS[arm].policy
    cycle = None if policy is None else policy(settings.training.steps).cycle
    return {"name": task, "task": settings, "arm": arm, "knob": knob, "cycle": cycle}
