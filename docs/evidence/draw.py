"""Draw the figures of docs/explanation/evidence.md from the cells and times beside this file.

``evidence.svg``: gains over dense at each budget. ``evidence-latency.svg``: accuracy over milliseconds, of one network
served at four budgets and of thinner dense ones. ``../assets/one-checkpoint.svg``: README's picture, from the same.

Run from the repository's root, with matplotlib installed: python docs/evidence/draw.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
BUDGETS = ("1", "0.5", "0.2", "0.1", "0.05")
PANELS = (
    ("mnist1d", "plain", "accuracy", "MNIST-1D, points", (-6, 12)),
    ("digits", "digits-1000", "accuracy", "Digits, points", (-6, 14)),
    ("cifar10-small", "rms", "accuracy", "CIFAR-10 at 16 pixels, points", (-6, 14)),
    ("characters", "gelu", "nll", "Characters (GELU), nats saved", (-0.42, 0.2)),
)
#: Times, the study, the task of the network that is served, and the tasks of the dense ones by their width.
LATENCIES = (
    ("wrn", "cifar10-wrn28", "wrn-28-4", {4: "wrn-28-4", 3: "wrn-28-3"}, "WRN-28 at 16 pixels"),
    (
        "mlp",
        "cifar10-mlp",
        "mlp-3072",
        {3072: "mlp-3072", 1024: "mlp-1024", 768: "mlp-768", 512: "mlp-512"},
        "Three hidden layers",
    ),
)
TRIALS = 100_000  # seeds of trials begin here
ARMS = {"mixed": "C0", "fixed-0.1": "C1", "accuracy-reset": "C2", "weight-decay": "C3"}


def figures(study: str, task: str, outcome: str) -> dict[str, dict[int, list[float]]]:
    """Return the outcome at each budget, by arm and seed; more is better."""
    scale = 100.0 if outcome == "accuracy" else -1.0
    found: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for path in sorted((HERE / study / "cells").glob(f"{task}_*.json")):
        record = json.loads(path.read_text())
        cell, seen = record["cell"], record["figures"]
        if cell["seed"] < TRIALS and outcome in seen:
            found[cell["arm"]][cell["seed"]] = [scale * seen[outcome][budget] for budget in BUDGETS]
    return found


def over_milliseconds() -> None:
    """Draw accuracy over milliseconds."""
    figure, axes = plt.subplots(1, len(LATENCIES), figsize=(7, 3), layout="constrained")
    for axis, (net, study, served, widths, title) in zip(axes, LATENCIES, strict=True):
        rows = json.loads((HERE / f"latency-{net}.json").read_text())["tables"][0]["rows"]
        # Shares were taken within rounds, so that what else the machine did falls out.
        ms = {(row["way"], float(row["width or keep ratio"])): row["share of dense"] * rows[0]["ms"] for row in rows}
        lines = {
            "dense, thinner and thinner": [
                (ms["dense", width], figures(study, task, "accuracy")["dense"], 0) for width, task in widths.items()
            ],
            "mixed, served at 0.2, 0.1, 0.05": [
                (ms["served", float(budget)], figures(study, served, "accuracy")["mixed"], BUDGETS.index(budget))
                for budget in ("0.2", "0.1", "0.05")
            ],
        }
        for label, points in lines.items():
            means = [np.mean([values[place] for values in runs.values()]) for _, runs, place in points]
            axis.plot([time for time, _, _ in points], means, "o-", label=label)
        axis.set(title=title, xlabel="milliseconds, one image, one thread")
    axes[0].set_ylabel("accuracy in %")
    axes[1].legend(frameon=False, loc="lower right")
    figure.savefig(HERE.parent / "explanation" / "evidence-latency.svg", metadata={"Date": None})


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
        runs = np.array(list(figures("cifar10-mlp", "mlp-3072", "accuracy")[arm].values()))
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
    """Draw one panel a study, then the times."""
    mpl.rcParams.update({"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3), layout="constrained")
    for axis, (study, task, outcome, title, limits) in zip(axes, PANELS, strict=True):
        found = figures(study, task, outcome)
        places = np.arange(len(BUDGETS))
        for arm, color in ARMS.items():
            seeds = sorted(set(found.get(arm, {})) & set(found["dense"]))
            if not seeds:
                continue
            gains = np.array([np.subtract(found[arm][seed], found["dense"][seed]) for seed in seeds])
            error = 1.96 * gains.std(axis=0, ddof=1) / np.sqrt(len(seeds))
            axis.errorbar(places, gains.mean(axis=0), error, color=color, label=arm, capsize=2)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xticks(places, BUDGETS)
        axis.set(title=title, xlabel="keep ratio", ylim=limits)
    axes[0].set_ylabel("above dense")
    axes[0].legend(frameon=False)
    figure.savefig(HERE.parent / "explanation" / "evidence.svg", metadata={"Date": None})
    over_milliseconds()
    one_checkpoint()


if __name__ == "__main__":
    main()
