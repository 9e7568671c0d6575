"""The charts of a report, as SVG: accuracy and density over the budget, and how the budget moved."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

from regimewrap.report.summary import (
    accuracy,
    bound_share,
    density,
    keep_ratios,
    milliseconds,
    percent_spread,
    reference_arm,
    written,
)
from regimewrap.report.svg import LEFT, RIGHT, Scale, axes, drawing, legend, mark, path, text, ticks
from regimewrap.report.words import conclusion

if TYPE_CHECKING:
    from collections.abc import Callable

    from regimewrap.report.results import Arm, Experiment, Run
    from regimewrap.report.summary import Spread

    #: A figure of an arm at a keep ratio.
    Figure = Callable[[Experiment, str, str], Spread]

_APART = 5.0  # arms that tie would hide each other: each stands a little beside the true ratio


def charts(experiment: Experiment) -> dict[str, str]:
    """Return the charts that the records allow, by their names."""
    drawn = {name: draw(experiment) for name, draw in _DRAW.items()}
    return {name: picture for name, picture in drawn.items() if picture is not None}


def _accuracy_by_budget(experiment: Experiment) -> str | None:
    told = f"Test accuracy over the keep ratio. {conclusion(experiment)}"
    return _by_budget(experiment, accuracy, "test accuracy, %", 100.0, told)


def _density_by_budget(experiment: Experiment) -> str | None:
    told = f"Density over the keep ratio, in %: {_in_words(experiment, density, 100.0, 1)}."
    return _by_budget(experiment, density, "density: units that are not zero, %", 100.0, told)


def _milliseconds_by_budget(experiment: Experiment) -> str | None:
    told = f"Milliseconds over the keep ratio: {_in_words(experiment, milliseconds, 1.0, 2)}."
    return _by_budget(experiment, milliseconds, "milliseconds for one sample, served", 1.0, told)


def _in_words(experiment: Experiment, of: Figure, times: float, digits: int) -> str:
    return "; ".join(
        f"{arm.name} {written(of(experiment, arm.name, ratio), times, digits)} at {float(ratio):g}"
        for arm in experiment.arms
        for ratio in keep_ratios(experiment)
    )


def _by_budget(experiment: Experiment, of: Figure, label: str, times: float, told: str) -> str | None:
    """Draw a figure over the keep ratio, a curve an arm; ``None`` without any."""
    arms = [arm for arm in experiment.arms if experiment.runs_of(arm.name)]
    ratios = keep_ratios(experiment)
    found = {(arm.name, ratio): of(experiment, arm.name, ratio) for arm in arms for ratio in ratios}
    every = [times * value for each in found.values() for value in each.values]
    if not every:
        return None
    names, top = legend([(_place(experiment, arm), arm.name) for arm in arms])
    up = ticks(min(every), max(every))
    x = Scale(float(ratios[-1]), float(ratios[0]), LEFT + 12, RIGHT - 12, log=True)
    y = Scale(up[0], up[-1], top + 200, top + 22)
    frame = Scale(0, 1, LEFT, RIGHT)
    parts = [names, text(6, top + 10, label, kind="soft"), axes(frame, y, (), [(each, f"{each:g}") for each in up])]
    parts.append(axes(x, y, [(float(ratio), f"{float(ratio):g}") for ratio in ratios], ()))
    parts.append(text(RIGHT, top + 234, "keep ratio", "end", "soft"))
    for index, arm in enumerate(arms):
        aside = _APART * (index - (len(arms) - 1) / 2)
        curve = [(x(float(r)) + aside, found[arm.name, r]) for r in ratios if found[arm.name, r].values]
        parts.append(_curve(curve, _place(experiment, arm), y, times))
    parts.append(f'<path class="cursor" visibility="hidden" d="M0 {top + 16}V{top + 200}"/>')
    places = escape(json.dumps({ratio: x(float(ratio)) for ratio in ratios}))
    return drawing("".join(parts), top + 242, told, f' data-x="{places}"')


def _curve(points: list[tuple[float, Spread]], arm: int, y: Scale, times: float) -> str:
    """Draw means, their standard deviation and single seeds, as far as there are several."""
    means = [(x, y(times * (each.mean or 0.0))) for x, each in points]
    parts = [path(means, f"curve arm{arm}")]
    for x, each in points:
        if each.deviation is not None and each.mean is not None:
            low, high = (y(times * (each.mean + sign * each.deviation)) for sign in (-1, 1))
            parts.append(f'<path class="bar arm{arm}" d="M{x} {low}V{high}"/>')
            parts += [mark(x, y(times * value), arm, "mark faint", 0.5) for value in each.values]
    return "".join([*parts, *(mark(x, at, arm) for x, at in means)])


def _keep_ratio_trace(experiment: Experiment) -> str | None:
    """Draw the keep ratio over the run, a panel an arm, and where the gate bound; ``None`` if it never moved."""
    traced = [(arm, runs) for arm in experiment.arms if (runs := [r for r in experiment.runs_of(arm.name) if r.trace])]
    traced = [(arm, runs) for arm, runs in traced if any(p.keep_ratio < 1 for run in runs for p in run.trace)]
    if not traced:
        return None
    last = max(run.trace[-1].step for _, runs in traced for run in runs)
    x, height, parts = Scale(0, last, LEFT, RIGHT), 118, []
    for index, (arm, runs) in enumerate(traced):
        top = index * height
        y = Scale(0, 1, top + 96, top + 26)
        along = [(each, f"{each:g}") for each in ticks(0, last) if each <= last] if index == len(traced) - 1 else []
        parts.append(text(6, top + 14, f"{arm.name}, seed {runs[0].seed}: keep ratio", kind="soft"))
        parts.append(_panel(runs, _place(experiment, arm), x, y, axes(x, y, along, [(0, "0"), (0.5, "0.5"), (1, "1")])))
    bottom = len(traced) * height
    parts.append(text(RIGHT, bottom + 14, "optimizer updates", "end", "soft"))
    return drawing("".join(parts), bottom + 22, _trace_in_words(traced, experiment))


def _panel(runs: list[Run], arm: int, x: Scale, y: Scale, grid: str) -> str:
    """Draw the first run in full, on the share of sites that bound; the other seeds' ratios faintly behind it."""
    trace = runs[0].trace
    area = path([(x(0), y(0)), *_stairs(runs[0], "bound", x, y), (x(trace[-1].step), y(0))], "area")
    faint = [path(_stairs(run, "keep_ratio", x, y), f"trace faint arm{arm}") for run in runs[1:]]
    first = path(_stairs(runs[0], "keep_ratio", x, y), f"trace arm{arm}")
    events = [mark(x(p.step), y(p.keep_ratio), _EVENTS[p.event], "event", 0.8) for p in trace if p.event in _EVENTS]
    return "".join([area, grid, *faint, first, *events])


#: Marks of what was decided: a triangle for a reset, a circle for a relaxation.
_EVENTS: dict[str | None, int] = {"reset": 2, "relax": 0}


def _stairs(run: Run, name: str, x: Scale, y: Scale) -> list[tuple[float, float]]:
    """Return a line that holds each point's value over the updates that led up to it."""
    starts = [0, *(point.step for point in run.trace)]
    return [
        (x(step), y(getattr(point, name)))
        for start, point in zip(starts, run.trace, strict=False)
        for step in (start, point.step)
    ]


def _trace_in_words(traced: list[tuple[Arm, list[Run]]], experiment: Experiment) -> str:
    told = []
    for arm, runs in traced:
        events = [point.event for point in runs[0].trace]
        counts = [f"{events.count(event)} {name}" for event, name in _COUNTED if event in events]
        lowest = f"lowest keep ratio {min(point.keep_ratio for point in runs[0].trace):.2g}"
        bound = f"the gate bound in {percent_spread(bound_share(experiment, arm.name))} % of the updates looked at"
        told.append(f"{arm.name}, seed {runs[0].seed}: {', '.join([*counts, lowest, bound])}")
    return f"Keep ratio over optimizer updates. {'; '.join(told)}."


_COUNTED = (("reset", "resets"), ("relax", "relaxations"))


def _place(experiment: Experiment, arm: Arm) -> int:
    """Return the number of an arm's colour and mark, the same in every chart; 0 is for the reference arm."""
    reference = reference_arm(experiment)
    if arm is reference:
        return 0
    others = [other for other in experiment.arms if other is not reference]
    return 1 + others.index(arm) % 5


_DRAW: dict[str, Callable[[Experiment], str | None]] = {
    "accuracy-by-budget": _accuracy_by_budget,
    "density-by-budget": _density_by_budget,
    "milliseconds-by-budget": _milliseconds_by_budget,
    "keep-ratio-trace": _keep_ratio_trace,
}
#: The names of all charts.
CHARTS = frozenset(_DRAW)
