"""Three figures, as PNG bytes.

Drawn with matplotlib's objects, never through pyplot, so that a caller's own plots and backend are left alone. Colours
are Okabe and Ito's, which stay apart for colour-blind readers; line styles and markers repeat what they say.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from regimewrap.errors import MissingExtraError
from regimewrap.report.summary import accuracy, bound_share, keep_ratios, percent, reference_arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regimewrap.report.results import Arm, Experiment, Run, TracePoint

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_REFERENCE_COLOUR = "#333333"
_MARKERS = ("s", "^", "D", "v", "P", "X")
_WIDTH_INCHES = 7.6
_DOTS_PER_INCH = 200
_INK, _FAINT = "#333333", "#d9d9d9"


def accuracy_by_budget(experiment: Experiment) -> bytes | None:
    """Draw test accuracy over the keep ratio, mean and standard deviation by arm. None without any finite accuracy."""
    arms = [arm for arm in experiment.arms if experiment.runs_of(arm.name)]
    ratios = keep_ratios(experiment)
    figure = _figure(4.0)
    axes = figure.subplots()
    drawn = False
    for index, arm in enumerate(arms):
        # Arms that tie would hide each other: each stands a little beside the true ratio.
        aside = 1.035 ** (index - (len(arms) - 1) / 2)
        points = [(float(ratio) * aside, accuracy(experiment, arm.name, ratio)) for ratio in ratios]
        points = [(x, figures) for x, figures in points if figures.values]
        if not points:
            continue
        drawn = True
        colour, marker = _style(experiment, arm)
        for x, figures in points:
            axes.plot(
                [x] * len(figures.values),
                [100 * v for v in figures.values],
                "o",
                ms=3,
                color=colour,
                alpha=0.35,
                mec="none",
            )
        axes.errorbar(
            [x for x, _ in points],
            [100 * (figures.mean or 0.0) for _, figures in points],
            yerr=[100 * (figures.deviation or math.nan) for _, figures in points],
            color=colour,
            marker=marker,
            ms=6,
            lw=1.8,
            elinewidth=1.2,
            capsize=4,
            linestyle="--" if arm is reference_arm(experiment) else "-",
            label=arm.name,
        )
    if not drawn:
        return None
    axes.set_xscale("log")
    axes.set_xticks([float(ratio) for ratio in ratios], [f"{float(ratio):g}" for ratio in ratios])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("keep ratio at evaluation (log scale; 1 is the full budget)")
    axes.set_ylabel("test accuracy, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(arms), 4), frameon=False)
    _tidy(axes)
    return _png(figure)


def keep_ratio_trace(experiment: Experiment) -> bytes | None:
    """Draw the keep ratio over the run, a panel an arm; mark resets, relaxations, binding. None without a trace."""
    traced = [(arm, runs) for arm in experiment.arms if (runs := [r for r in experiment.runs_of(arm.name) if r.trace])]
    if not traced:
        return None
    figure = _figure(0.9 + 1.6 * len(traced))
    panels = figure.subplots(len(traced), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (arm, runs) in zip(panels, traced, strict=True):
        _draw_trace(axes, runs, _style(experiment, arm)[0])
        axes.set_title(f"{arm.name}, seed {runs[0].seed}", loc="left", fontsize=11, color=_INK)
        axes.set_ylim(0, 1.09)
        axes.margins(x=0.01)
        axes.set_yticks([0, 0.5, 1.0])
        axes.set_ylabel("keep ratio")
        _tidy(axes)
    panels[-1].set_xlabel("optimizer updates")
    figure.legend(handles=_trace_legend(), loc="outside upper center", ncols=4, frameon=False)
    return _png(figure)


def time_bound(experiment: Experiment) -> bytes | None:
    """Draw the share of updates in which the gate bound, a bar an arm. None without any run."""
    shares = [(arm, bound_share(experiment, arm.name)) for arm in experiment.arms]
    shares = [(arm, share) for arm, share in shares if share.values]
    if not shares:
        return None
    figure = _figure(1.0 + 0.5 * len(shares))
    axes = figure.subplots()
    for row, (arm, share) in enumerate(shares):
        colour, _ = _style(experiment, arm)
        mean = share.mean or 0.0
        axes.barh(row, 100 * mean, height=0.55, color=colour, alpha=0.75)
        axes.plot(
            [100 * v for v in share.values],
            [row] * len(share.values),
            "o",
            ms=4,
            color=_INK,
            mfc="white",
            clip_on=False,
        )
        axes.text(100 * max(*share.values, mean) + 1.5, row, percent(mean), va="center", color=_INK)
    axes.set_yticks(range(len(shares)), [arm.name for arm, _ in shares])
    axes.set_ylim(len(shares) - 0.4, -0.6)  # the first arm on top
    axes.set_xlim(0, 112)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("share of updates in which the gate bound at one site or more, % (dots: seeds)")
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    return _png(figure)


def _draw_trace(axes: Axes, runs: list[Run], colour: str) -> None:
    """Draw the first run in full; the other seeds' ratios faintly behind it."""
    for run in runs[1:]:
        _draw_steps(axes, run.trace, color=colour, lw=0.8, alpha=0.3)
    trace = runs[0].trace
    axes.fill_between(
        _steps(trace), [trace[0].bound, *(p.bound for p in trace)], step="pre", color=_FAINT, lw=0, zorder=0
    )
    _draw_steps(axes, trace, color=colour, lw=1.8)
    for event, marker in (("reset", "v"), ("relax", "o")):
        marked = [p for p in trace if p.event == event]
        axes.plot(
            [p.step for p in marked], [p.keep_ratio for p in marked], marker, ms=6, color=_INK, mfc="white", zorder=3
        )


def _draw_steps(axes: Axes, trace: list[TracePoint], **style: Any) -> None:
    ratios = [trace[0].keep_ratio, *(p.keep_ratio for p in trace)]
    axes.plot(_steps(trace), ratios, drawstyle="steps-pre", **style)


def _steps(trace: list[TracePoint]) -> list[int]:
    """Return where each stretch of updates ends, and first where the run began: a point tells of what led up to it."""
    return [0, *(point.step for point in trace)]


def _trace_legend() -> list[object]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color=_INK, lw=1.8, label="keep ratio"),
        Line2D([], [], color=_INK, mfc="white", marker="v", ls="", label="reset"),
        Line2D([], [], color=_INK, mfc="white", marker="o", ls="", label="relaxation"),
        Patch(color=_FAINT, label="share of sites where the gate bound"),
    ]


def _style(experiment: Experiment, arm: Arm) -> tuple[str, str]:
    """Return an arm's colour and marker, the same in every figure."""
    reference = reference_arm(experiment)
    if arm is reference:
        return _REFERENCE_COLOUR, "o"
    index = [other for other in experiment.arms if other is not reference].index(arm)
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]


def _figure(height_inches: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "cli") from error
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#eeeeee", lw=0.8)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="white")
    return picture.getvalue()
