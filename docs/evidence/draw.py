"""Draw docs/explanation/evidence.svg from the cells beside this file: gains over dense at each budget.

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
    ("characters", "gelu", "nll", "Characters (GELU), nats saved", (-0.42, 0.2)),
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


def main() -> None:
    """Draw one panel a study."""
    mpl.rcParams.update({"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3), layout="constrained")
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


if __name__ == "__main__":
    main()
