"""Draw the figure and write the table of docs/explanation/evidence.md from the cells and times beside this file.

``evidence.svg``: gains over dense at each budget, and accuracy over milliseconds, of one network served at three
budgets and of thinner dense ones. ``../assets/one-checkpoint.svg``: README's picture, from the same.

Run from the repository's root, with matplotlib and scipy installed: python docs/evidence/draw.py
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from regimewrap.recipes.study.cells import folder_study, read_cells
from regimewrap.recipes.study.figures import TaskFigures, figures
from regimewrap.report.statistics import FEWEST_SEEDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from regimewrap.report.statistics import Difference

HERE = Path(__file__).parent
PAGE = HERE.parent / "explanation" / "evidence.md"
BUDGETS = ("1", "0.5", "0.2", "0.1", "0.05")
PANELS = (
    ("mnist1d", "plain", "MNIST-1D, points", (-6, 12)),
    ("digits", "digits-1000", "Digits, points", (-9, 14)),
    ("cifar10-small", "rms", "CIFAR-10, points", (-6, 14)),
    ("characters", "gelu", "Characters, nats saved", (-0.42, 0.2)),
)
#: Times, the study, the task of the network that is served, and the tasks of the dense ones by their width.
LATENCIES = (
    ("wrn", "cifar10-wrn28", "wrn-28-4", {4: "wrn-28-4", 3: "wrn-28-3"}, "WRN-28, accuracy in %"),
    (
        "mlp",
        "cifar10-mlp",
        "mlp-3072",
        {3072: "mlp-3072", 1024: "mlp-1024", 768: "mlp-768", 512: "mlp-512"},
        "MLP, accuracy in %",
    ),
)
ARMS = {"mixed": "C0", "mixed-always": "C9", "fixed-0.1": "C1", "accuracy-reset": "C2", "l1": "C3"}
#: Rows of the table.
TASKS = (
    ("mnist1d", "plain", "MNIST-1D"),
    ("mnist1d", "few", "MNIST-1D, 1,000 samples"),
    ("mnist1d", "noise-20", "MNIST-1D, 20 % noise"),
    ("mnist1d", "noise-40", "MNIST-1D, 40 % noise"),
    ("digits", "digits-1000", "Digits, 1,000 images"),
    ("digits", "digits-200", "Digits, 200 images"),
    ("cifar10-small", "rms", "CIFAR-10, RMSNorm"),
    ("cifar10-small", "batch", "CIFAR-10, BatchNorm"),
    ("cifar10-wrn28", "wrn-28-4", "CIFAR-10, WRN-28-4"),
    ("cifar10-mlp", "mlp-3072", "CIFAR-10, wide MLP"),
    ("characters", "relu", "Characters, ReLU, nats"),
    ("characters", "gelu", "Characters, GELU, nats"),
    ("characters", "swiglu", "Characters, SwiGLU, nats"),
    ("characters-finetuned", "swiglu", "Characters, fine-tuned, nats"),
)
#: Studies whose arms got learning rates of their own.
TUNED = ("mnist1d", "digits")
#: Columns of the table, beside dense: heading, arm, and the study if it is not the row's.
COLUMNS = (
    ("`mixed`", "mixed", None),
    ("`mixed`, dense's rate", "mixed", "equal-rates"),
    ("without resting", "mixed-always", None),
    ("L1", "l1", None),
    ("published rule, rescaled", "accuracy-reset", None),
    ("0.1 throughout", "fixed-0.1", None),
)
TABLE = re.compile("(?<=<!-- table: -->\n\n).*?(?=\n<!-- :table -->)", re.DOTALL)


@cache
def study(name: str) -> dict[str, TaskFigures]:
    """Return the figures of a study's tasks; none if no cell is there."""
    if not (HERE / name / "study.json").exists():
        return {}
    records, problems = read_cells(HERE / name)
    if problems:
        raise SystemExit("\n".join(problems))
    return {task.name: task for task in figures(folder_study(HERE / name), records)[0] if "dense" in task.runs}


def by_budget(task: TaskFigures, arm: str) -> dict[int, list[float]]:
    """Return accuracies in % or nats at each budget, by seed; more is better."""
    scale = 100.0 if task.outcome == "accuracy" else -1.0
    found = {budget: task.by_seed(arm, budget) for budget in BUDGETS}
    return {seed: [scale * found[budget][seed] for budget in BUDGETS] for seed in found["1"]}


def table() -> str:
    """Return the table: a row a task, dense and the differences from it, each at keep ratio 1 / at 0.1."""
    heads = ["(seeds)", "dense", *(title for title, _, _ in COLUMNS), "interval of `mixed` at 1"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' --: |' * (len(heads) - 1)}"]
    held, asked = [0] * len(COLUMNS), [0] * len(COLUMNS)
    for name, which, title in TASKS:
        task = study(name).get(which)
        if task is None:
            continue
        digits, scale = (3, 1.0) if task.outcome == "nll" else (1, 100.0)
        seeds = sorted({len(task.runs[arm]) for arm in ("dense", *(arm for _, arm, _ in COLUMNS)) if arm in task.runs})
        dense = [f"{scale * (task.spread('dense', budget).mean or math.nan):.{digits}f}" for budget in ("1", "0.1")]
        cells = [
            f"{title} ({' to '.join(str(each) for each in dict.fromkeys((seeds[0], seeds[-1])))})",
            " / ".join(dense),
        ]
        for number, (_, arm, elsewhere) in enumerate(COLUMNS):
            source = name if elsewhere is None else elsewhere if name in TUNED else None
            both = [] if source is None else [each[arm] for each in differences(source, which) if arm in each]
            if not both:
                cells.append("")
                continue
            cells.append(" / ".join(f"{scale * each.mean:+.{digits}f}{mark(each, task)}" for each in both))
            asked[number] += 1
            held[number] += both[0].holds(task.equivalent)
        full = differences(name, which)[0]["mixed"]
        enough = full.seeds >= FEWEST_SEEDS  # the interval of three seeds is too narrow
        cells.append(f"{scale * full.low:+.{digits}f} to {scale * full.high:+.{digits}f}" if enough else "")
        lines.append(f"| {' | '.join(cells)} |")
    counts = [f"{good} of {of}" for good, of in zip(held, asked, strict=True)]
    lines.append(f"| {' | '.join(['**no worse at 1 on**', '', *counts, ''])} |")
    finals, trials = counts_of_files()
    lines += ["", f"{finals:,} final trainings and {trials:,} trials, a file each, are in `docs/evidence`."]
    return "\n".join(lines) + "\n"


@cache
def differences(name: str, which: str) -> tuple[dict[str, Difference], ...]:
    """Return how the arms of a study's task compare with dense, at keep ratio 1 and at 0.1."""
    task = study(name).get(which)
    return () if task is None else tuple(task.compared(budget) for budget in ("1", "0.1"))


def counts_of_files() -> tuple[int, int]:
    """Return how many final cells and how many trials there are, of all studies; some are in two."""
    names = {path.name for path in HERE.glob("*/cells/*.json")}
    trials = sum("_trial-" in name for name in names)
    return len(names) - trials, trials


def mark(found: Difference, task: TaskFigures) -> str:
    """Return what the seeds say, as a sign."""
    signs = {"above": "▲", "below": "▼", "tie": "=", "open": ""}
    sign = signs[found.verdict(task.equivalent)] or ("≥" if found.holds(task.equivalent) else "")
    return f"&nbsp;{sign}" if sign else ""


def gains(axis: Axes, task: TaskFigures) -> None:
    """Draw gains over dense at each budget, with 1.96 standard errors."""
    places, dense = np.arange(len(BUDGETS)), by_budget(task, "dense")
    for arm, color in ARMS.items():
        found = by_budget(task, arm)
        if seeds := sorted(found.keys() & dense.keys()):
            gain = np.array([np.subtract(found[seed], dense[seed]) for seed in seeds])
            error = 1.96 * gain.std(axis=0, ddof=1) / np.sqrt(len(seeds))
            axis.errorbar(places, gain.mean(axis=0), error, color=color, label=arm, capsize=2)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xticks(places, BUDGETS)
    axis.set_xlabel("keep ratio")


def over_milliseconds(axis: Axes, net: str, tasks: dict[str, TaskFigures], served: str, widths: dict[int, str]) -> None:
    """Draw accuracy over milliseconds."""
    rows = json.loads((HERE / f"latency-{net}.json").read_text())["tables"][0]["rows"]
    # Shares were taken within rounds, so that what else the machine did falls out.
    ms = {(row["way"], float(row["width or keep ratio"])): row["share of dense"] * rows[0]["ms"] for row in rows}
    lines = {
        "dense, thinner and thinner": [
            (ms["dense", width], by_budget(tasks[task], "dense"), 0) for width, task in widths.items()
        ],
        "mixed, served at 0.2, 0.1, 0.05": [
            (ms["served", float(budget)], by_budget(tasks[served], "mixed"), BUDGETS.index(budget))
            for budget in ("0.2", "0.1", "0.05")
        ],
    }
    for (label, points), color in zip(lines.items(), ("grey", ARMS["mixed"]), strict=True):
        means = [np.mean([values[place] for values in runs.values()]) for _, runs, place in points]
        axis.plot([time for time, _, _ in points], means, "o-", label=label, color=color)
    axis.set_xlabel("milliseconds, one image, one thread")


def one_checkpoint() -> None:
    """Draw what a budget does to a layer, and what comes out of the MLP of 3,072 units: accuracy and milliseconds."""
    budgets, places = ("1", "0.2", "0.1", "0.05"), range(4)
    rows = json.loads((HERE / "latency-mlp.json").read_text())["tables"][0]["rows"]
    share = {row["width or keep ratio"]: row["share of dense"] for row in rows if row["way"] == "served"}
    ms = [rows[0]["ms"] * share.get(float(budget), 1.0) for budget in budgets]
    figure, (layer, accuracy, time) = plt.subplots(
        1, 3, figsize=(9, 2.8), layout="constrained", width_ratios=(1.25, 1, 1), facecolor="white"
    )
    units = np.random.default_rng(4).exponential(size=20)
    for place, budget in enumerate(budgets):
        kept = units >= np.sort(units)[-int(20 * float(budget))]
        layer.bar(np.arange(20), kept * units / units.max() * 0.8, bottom=-place, width=0.8, color="C0")
        layer.bar(np.arange(20), 0.03, bottom=-place, width=0.8, color="0.8")
        layer.text(-1.2, -place, budget, ha="right")
    layer.set_title("A layer's 20 units at each keep ratio")
    layer.axis("off")
    arms = (("mixed", "trained with regimewrap", "C0", (3, 51)), ("dense", "trained dense", "0.5", (1.9, 34)))
    for arm, label, color, place in arms:
        runs = np.array(list(by_budget(study("cifar10-mlp")["mlp-3072"], arm).values()))
        means = runs.mean(0)[[BUDGETS.index(budget) for budget in budgets]]
        accuracy.plot(places, means, "o-", color=color)
        accuracy.text(*place, label, color=color, ha="right")
    accuracy.set(title="Accuracy in %", ylim=(20, 55))
    time.bar(places, ms, color=["0.7", *["C0"] * 3], width=0.6)
    for place in places:
        time.text(place, ms[place] + 0.1, f"{ms[place]:.1f}", ha="center")
    time.set(title="Milliseconds for one image", ylim=(0, max(ms) * 1.15))
    for axis in (accuracy, time):
        axis.set_xticks(places, budgets)
        axis.set_xlabel("keep ratio")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "assets" / "one-checkpoint.svg", metadata={"Date": None})


def main() -> None:
    """Draw the panels of each figure; put the table between its marks."""
    mpl.rcParams.update({"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    *upper, left, right = axes.flat
    for axis, (name, which, title, limits) in zip(upper, PANELS, strict=True):
        gains(axis, study(name)[which])
        axis.set(title=title, ylim=limits)
    upper[0].set_ylabel("above dense")
    upper[3].set_ylabel("above dense")
    upper[0].legend(frameon=False)
    for axis, (net, name, served, widths, title) in zip((left, right), LATENCIES, strict=True):
        over_milliseconds(axis, net, study(name), served, widths)
        axis.set_title(title)
    left.legend(frameon=False, loc="lower right")
    figure.savefig(PAGE.parent / "evidence.svg", metadata={"Date": None})
    one_checkpoint()
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
