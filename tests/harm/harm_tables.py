"""From cells to tables in Markdown: each preset against its dense twins, and whether the targets hold."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from regimewrap.files import write_whole

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "harm.md"
_BEGIN, _END = "<!-- made by tests/harm/run.py: -->\n", "<!-- :made by tests/harm/run.py -->\n"
RATIOS = ("1", "0.5", "0.2", "0.1", "0.05")


class Results:
    """Cells by preset, task and seed."""

    def __init__(self, cells: Iterable[dict[str, Any]]) -> None:
        self.cells = {(cell["arm"], cell["task"], cell["seed"]): cell for cell in cells}
        self.tasks = list(dict.fromkeys(task for _, task, _ in self.cells))
        self.arms = list(dict.fromkeys(arm for arm, _, _ in self.cells if arm != "dense"))
        self.unit = {task: cell["unit"] for (_, task, _), cell in self.cells.items()}

    def values(self, arm: str, task: str, ratio: str, *, recalibrate: bool | None = None) -> dict[int, float]:
        """Return the outcome of each seed; unless told, BatchNorm is recalibrated at budgets below 1 alone."""
        wanted = ratio != "1" if recalibrate is None else recalibrate
        runs = {seed: cell for (a, t, seed), cell in self.cells.items() if (a, t) == (arm, task)}
        return {
            s: (cell["recalibrated"] if wanted and cell["recalibrated"] else cell["values"])[ratio]
            for s, cell in runs.items()
        }

    def gains(self, arm: str, task: str, ratio: str, *, recalibrate: bool | None = None) -> list[float]:
        """Return what an arm gains over its dense twin, seed by seed; above 0 is better in either unit."""
        sign = -1.0 if self.unit[task] == "nats" else 1.0
        dense = self.values("dense", task, ratio, recalibrate=recalibrate)
        here = self.values(arm, task, ratio, recalibrate=recalibrate)
        return [sign * (here[seed] - dense[seed]) for seed in sorted(dense.keys() & here.keys())]

    def in_points(self, arm: str) -> list[str]:
        return [task for task in self.tasks if self.unit[task] == "points" and self.gains(arm, task, "1")]

    def with_batchnorm(self) -> list[str]:
        return [t for t in self.tasks if any(c["recalibrated"] for (_, task, _), c in self.cells.items() if task == t)]


def tables(cells: list[dict[str, Any]], wanted: int) -> str:
    """Return all tables, of as many of the wanted cells as there are."""
    results = Results(cells)
    if not results.arms:
        return "no preset beside dense yet\n"
    parts = [_targets(results), _against_dense(results, "mixed")] if "mixed" in results.arms else []
    return "\n".join([*parts, _presets(results), _batchnorm(results), _conditions(results, wanted)])


def _targets(results: Results) -> str:
    """Return what was to be reached and what was."""
    full, tenth = (
        {task: results.gains("mixed", task, ratio) for task in results.tasks if results.gains("mixed", task, "1")}
        for ratio in ("1", "0.1")
    )
    points, nats = ({t: gains for t, gains in full.items() if results.unit[t] == unit} for unit in ("points", "nats"))
    worst_task = min(map(statistics.mean, points.values()), default=0.0)
    worst_run = min((min(gains) for gains in points.values()), default=0.0)
    worst_model = min(map(statistics.mean, nats.values()), default=0.0)
    better = sum(statistics.mean(gains) > 0 for gains in tenth.values())
    presets = {arm: _mean_gain(results, arm, "1") for arm in results.arms}
    worst_preset = min(presets, key=presets.__getitem__)
    rows = [
        ("default, mean over tasks at 1", "≥ -0.5", f"{presets['mixed']:+.2f}", presets["mixed"] >= -0.5),
        ("default, worst task at 1", "≥ -2", f"{worst_task:+.2f}", worst_task >= -2),
        ("default, worst language model at 1", "≥ -0.02 nats", f"{worst_model:+.3f}", worst_model >= -0.02),
        ("default, worst run at 1", "≥ -5", f"{worst_run:+.1f}", worst_run >= -5),
        ("default, tasks better than dense at 0.1", "≥ 10", f"{better} of {len(tenth)}", better >= 10),
        (
            "every preset, mean over tasks at 1",
            "≥ -3",
            f"{presets[worst_preset]:+.2f} (`{worst_preset}`)",
            presets[worst_preset] >= -3,
        ),
    ]
    table = _markdown(
        ["target", "at least", "measured", "holds"], [[*r[:3], "yes" if r[3] else "**no**"] for r in rows]
    )
    return f"## Targets\n\n{table}"


def _mean_gain(results: Results, arm: str, ratio: str) -> float:
    """Return what an arm gains on average over the tasks in points."""
    return statistics.mean(statistics.mean(results.gains(arm, task, ratio)) for task in results.in_points(arm))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figure(value: float, unit: str, *, sign: bool = True) -> str:
    return f"{value:{'+' if sign else ''}.{3 if unit == 'nats' else 1}f}"


def _half_width(values: list[float]) -> float:
    """Return half the width of the 95 % interval of a mean, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _spread(values: list[float], unit: str, of: Callable[[list[float]], float]) -> str:
    return f" ± {_figure(of(values), unit, sign=False)}" if len(values) > 1 else ""


def _against_dense(results: Results, arm: str) -> str:
    rows = []
    for task in results.tasks:
        unit, dense = results.unit[task], [*results.values("dense", task, "1").values()]
        gains = results.gains(arm, task, "1")
        if not gains:
            continue
        below = [statistics.mean(results.gains(arm, task, ratio)) for ratio in RATIOS[1:]]
        rows.append(
            [
                task + (" (nats)" if unit == "nats" else ""),
                str(len(gains)),
                _figure(statistics.mean(dense), unit, sign=False) + _spread(dense, unit, statistics.stdev),
                _figure(statistics.mean(gains), unit) + _spread(gains, unit, _half_width),
                _figure(min(gains), unit),
                *(_figure(value, unit) for value in below),
            ]
        )
    means = [_mean_gain(results, arm, ratio) for ratio in RATIOS]
    rows.append(
        ["**mean over tasks in points**", "", "", f"**{means[0]:+.2f}**", "", *(f"**{m:+.1f}**" for m in means[1:])]
    )
    head = ["task", "seeds", "dense at 1", f"{arm} at 1", "worst seed", *(f"at {ratio}" for ratio in RATIOS[1:])]
    return f"## `{arm}` against dense\n\n{_markdown(head, rows)}"


def _presets(results: Results) -> str:
    rows = []
    for arm in results.arms:
        gained = {
            ratio: {
                t: statistics.mean(results.gains(arm, t, ratio)) for t in results.tasks if results.gains(arm, t, ratio)
            }
            for ratio in RATIOS
        }
        points = results.in_points(arm)
        nats = [task for task in gained["1"] if results.unit[task] == "nats"]
        worst = min(points, key=gained["1"].__getitem__)
        run, where = min((min(results.gains(arm, task, "1")), task) for task in points)
        rows.append(
            [
                f"`{arm}`",
                str(sum(len(results.gains(arm, task, "1")) for task in results.tasks)),
                f"{statistics.mean(gained['1'][task] for task in points):+.2f}",
                f"{gained['1'][worst]:+.1f} ({worst})",
                f"{run:+.1f} ({where})",
                ", ".join(f"{gained['1'][task]:+.3f}" for task in nats),
                *(f"{statistics.mean(gained[ratio][task] for task in points):+.1f}" for ratio in RATIOS[2:]),
                f"{sum(gain > 0 for gain in gained['0.1'].values())} of {len(gained['0.1'])}",
            ]
        )
    head = ["preset", "runs", "at 1, mean", "worst task", "worst run", "language models, nats"]
    head += [*(f"at {ratio}" for ratio in RATIOS[2:]), "tasks better at 0.1"]
    return f"## Every preset against dense\n\n{_markdown(head, rows)}"


def _batchnorm(results: Results) -> str:
    rows = []
    for arm in results.arms:
        if not any(results.gains(arm, task, "1") for task in results.with_batchnorm()):
            continue
        for name, again in (("as trained", False), ("recalibrated", True)):
            gains = [
                [
                    statistics.mean(results.gains(arm, t, r, recalibrate=again))
                    for t in results.with_batchnorm()
                    if results.gains(arm, t, r)
                ]
                for r in RATIOS
            ]
            rows.append([f"`{arm}`", name, *(f"{statistics.mean(each):+.1f}" for each in gains)])
    head = ["preset", "statistics of BatchNorm", *(f"at {ratio}" for ratio in RATIOS)]
    return f"## BatchNorm's statistics\n\n{_markdown(head, rows)}"


def _conditions(results: Results, wanted: int) -> str:
    """Return what was run, where, and how much work it was."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=PAGE.parent, capture_output=True, text=True, check=False
    )
    installed = {each.metadata["Name"] for each in importlib.metadata.distributions()}
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("regimewrap", "torch", "timm", "transformers", "scikit-learn")
        if name in installed
    ]
    minutes = sum(cell["seconds"] for cell in results.cells.values()) / 60
    return (
        f"{len(results.cells)} of {wanted} trainings, {minutes:.0f} minutes of one core ({_processor()}, "
        f"{os.cpu_count()} cores, one thread a training). Python {platform.python_version()}, {', '.join(versions)}; "
        f"commit {git.stdout.strip() or 'unknown'}.\n"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def into_page(text: str) -> None:
    """Put the tables into the page, between its two marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    write_whole(PAGE, f"{before}{_BEGIN}\n{text}\n{_END}{after}")
