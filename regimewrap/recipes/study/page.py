"""Figures to a report: one Markdown page with a table a task, and one picture a task."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from regimewrap.errors import DataError, MissingExtraError
from regimewrap.files import write_whole
from regimewrap.recipes.study.arms import ARMS, POSTHOC
from regimewrap.recipes.study.cells import folder_study, read_cells
from regimewrap.recipes.study.figures import figures
from regimewrap.report.statistics import TIE_RULE

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from regimewrap.recipes.study.figures import Count, TaskFigures
    from regimewrap.recipes.study.spec import Study
    from regimewrap.report.statistics import Difference, Verdict
    from regimewrap.report.summary import Spread

_MARKS: dict[Verdict, str] = {"above": "▲", "below": "▼", "tie": "=", "open": ""}
_NBSP = "\N{NO-BREAK SPACE}"
_KEY = "▲ above dense, ▼ below, = ties, no mark: the seeds do not say"


def write_study_report(folder: Path) -> str:
    """Write ``report.md`` and a picture a task into a study's folder; return the page.

    Raises:
        DataError: it is not a study's folder, has no finished cell, or cannot be written.
        MissingExtraError: scipy or matplotlib is missing.
    """
    study = folder_study(folder)
    records, problems = read_cells(folder)
    tasks, count = figures(study, records)
    tasks = [task for task in tasks if "dense" in task.runs]
    if not tasks:
        raise DataError(f"{folder} has no finished cell of the dense arm yet; go on with study run.")
    for task in tasks:
        write_whole(folder / f"{task.name}.svg", _picture(task))
    failed = len(list((folder / "failed").glob("*.json")))
    page = _page(study, tasks, count, failed, problems, records)
    write_whole(folder / "report.md", page)
    return page


def _page(
    study: Study,
    tasks: list[TaskFigures],
    count: Count,
    failed: int,
    problems: list[str],
    records: dict[str, dict[str, object]],
) -> str:
    made = sorted({_made_on(record) for record in records.values()})
    lines = [f"# Study {study.name}", "", f"{count.done} of {count.total} final cells, {count.trials} trial cells."]
    lines += [f"{failed} cells failed; see `failed/`."] if failed else []
    lines += [f"{count.others} cells are of other settings and are not counted."] if count.others else []
    lines += [f"Left out: {problem}" for problem in problems]
    trials = study.trials
    tuned = (
        "Nothing was tuned: each arm has the spec's learning rate and its own default number."
        if trials.count == 1
        else f"Each arm's learning rate and own number were chosen by {trials.count} trials on a validation set, "
        f"with {trials.seeds} seed{'s' * (trials.seeds > 1)} that no final run has; a star: the edge of what was tried."
    )
    read = "The test set was read once, after the last update."
    lines += ["", f"{TIE_RULE} {tuned} {read} Made on: {'; '.join(made)}."]
    for task in tasks:
        lines += ["", f"## {task.name}", "", *_task(study, task)]
    lines += ["", "## Arms", ""]
    shown = [arm for arm in study.arms if any(arm in task.runs for task in tasks)]
    lines += [f"- **{arm}**: {ARMS[arm].about}" for arm in shown]
    lines += [f"- **{POSTHOC}**: The dense arm's networks, cut at thresholds found on training samples; no training."]
    return "\n".join(lines) + "\n"


def _task(study: Study, task: TaskFigures) -> Iterable[str]:
    settings = study.tasks[task.name].model_dump(mode="json", exclude_defaults=True)
    training = settings.pop("training")
    said = ", ".join(f"{key} {_setting(value)}" for key, value in {**settings, **training}.items())
    unit = "nats a character, less is better, equal within ±0.005" if task.outcome == "nll" else "accuracy in %"
    yield f"{said}. Figures: {unit}, mean ± standard deviation over seeds at keep ratio. {_KEY}."
    yield ""
    yield f"![{task.name}]({task.name}.svg)"
    yield ""
    heads = ["arm", "seeds", *task.budgets, "difference at 1", "lowest budget within 1 % of dense", "worst seed at 1"]
    heads += ["NLL at 1", "ECE at 1", "corrupted at 1", "corrupted at 0.1", "gates bound", "seconds"]
    heads += ["learning rate, own number"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    found = {budget: task.compared(budget) for budget in task.budgets}
    for arm in task.arms:
        cells = [arm, str(len(task.runs[arm]))]
        for budget in task.budgets:
            mark = _MARKS[found[budget][arm].verdict(task.equivalent)] if arm != "dense" else ""
            cells.append(f"{_spread(task.spread(arm, budget), task)}{mark and _NBSP}{mark}")
        full = found[task.budgets[0]]
        cells.append(_difference(full[arm], task) if arm in full else "")
        cells.append(task.lowest_budget(arm) or "none")
        cells.append(_number(task.worst(arm), task))
        cells += [_plain(task.spread(arm, task.budgets[0], "nll").mean, 3)]
        cells += [_percent(task.spread(arm, task.budgets[0], "ece").mean)]
        cells += [_percent(task.corrupted(arm, "1")), _percent(task.corrupted(arm, "0.1"))]
        cells += [_percent(task.mean_of(arm, "bound")), _plain(task.mean_of(arm, "seconds"), 0)]
        cells += [task.chosen.get(arm, "")]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for budget in (task.budgets[0], "0.1"):
        if budget in task.budgets:
            yield _verdict(task, found[budget], budget)


def _setting(value: object) -> str:
    """Return a setting as the spec's file has it."""
    return f"({', '.join(f'{key} {item}' for key, item in value.items())})" if isinstance(value, dict) else f"{value}"


def _verdict(task: TaskFigures, found: dict[str, Difference], budget: str) -> str:
    groups: dict[Verdict, list[str]] = {"above": [], "tie": [], "below": [], "open": []}
    for arm, each in found.items():
        groups[each.verdict(task.equivalent)].append(arm)
    words = {"above": "above dense", "tie": "tied with dense", "below": "below dense", "open": "not told from dense"}
    said = "; ".join(f"{words[word]}: {', '.join(arms)}" for word, arms in groups.items() if arms)
    return f"At keep ratio {budget}, {said or 'no other arm has finished runs'}.\n"


def _made_on(record: dict[str, object]) -> str:
    made = record["made"]
    if not isinstance(made, dict):
        return "unknown"
    return f"torch {made.get('torch')}, {made.get('device')}, {made.get('processor')}"


def _spread(found: Spread, task: TaskFigures) -> str:
    scale, digits = (1.0, 3) if task.outcome == "nll" else (100.0, 1)
    text = "–" if found.mean is None else f"{scale * found.mean:.{digits}f}"
    deviation = found.deviation
    text += f"{_NBSP}±{_NBSP}{scale * deviation:.{digits}f}" if deviation is not None else ""
    return text + (f" ({found.lost} broke)" if found.lost else "")


def _difference(found: Difference, task: TaskFigures) -> str:
    if math.isnan(found.low):
        return "–"
    scale, digits = (1, 3) if task.outcome == "nll" else (100, 2)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}], p {found.p:.3f}"


def _number(value: float | None, task: TaskFigures) -> str:
    return _plain(value, 3) if task.outcome == "nll" else _percent(value)


def _plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _picture(task: TaskFigures) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "cli") from None
    with matplotlib.rc_context({"svg.hashsalt": task.name, "svg.fonttype": "none"}):
        picture = Figure(figsize=(8, 4.5), layout="constrained")
        axes = picture.subplots()
        for number, arm in enumerate(task.arms):
            means = {float(budget): task.spread(arm, budget).mean for budget in task.budgets}
            points = [(x, y) for x, y in means.items() if y is not None]
            scale = 1 if task.outcome == "nll" else 100
            style = {"color": "black", "linewidth": 2.5} if arm == "dense" else {"linewidth": 1}
            marker = "osv^D<>"[number // 10 % 7]
            axes.plot([x for x, _ in points], [scale * y for _, y in points], marker=marker, label=arm, **style)
        axes.set_xscale("log")
        axes.set_xticks([float(budget) for budget in task.budgets], task.budgets)
        axes.minorticks_off()
        axes.set_xlabel("keep ratio")
        axes.set_ylabel("nats a character" if task.outcome == "nll" else "test accuracy, %")
        axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
        text = io.StringIO()
        picture.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
