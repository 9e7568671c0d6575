"""What the figures show, in one sentence that claims no more than they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from regimewrap.report.summary import (
    Spread,
    accuracy,
    budget,
    keep_ratios,
    percent,
    reference_arm,
    seed_count,
    tie,
)

if TYPE_CHECKING:
    from regimewrap.report.results import Arm, Experiment

_FEW_SEEDS = 5


def conclusion(experiment: Experiment) -> str:
    """Return one plain sentence about what the figures show, at the largest and the smallest keep ratio evaluated.

    Arms are compared with the dense one. Seeds that do not tell two arms apart make a tie (``summary.TIE_RULE``); one
    seed shows nothing certain, and the sentence says so.
    """
    arms = [arm for arm in experiment.arms if experiment.runs_of(arm.name)]
    ratios = keep_ratios(experiment)
    if not arms or not ratios:
        return "No run finished, so the figures show nothing yet."
    budgets = ratios if len(ratios) == 1 else [ratios[0], ratios[-1]]
    seeds = seed_count(experiment)
    over = "One seed" if seeds == 1 else f"Over {seeds} seeds"
    reference = reference_arm(experiment)
    if seeds > 1 and reference in arms and len(arms) > 1:
        compared = [_Comparison.of(experiment, arms, reference, ratio) for ratio in budgets]
        hint = seeds < _FEW_SEEDS and any(c.apart for c in compared)
        caution = "; from so few seeds that is a hint, not a proof" if hint else ""
        return f"{over}: {'; '.join(c.text for c in compared)}{caution}."
    figures = "; ".join(f"at {budget(ratio)}, {_list_figures(experiment, arms, ratio)}" for ratio in budgets)
    why = "without a dense arm to compare with, this does not judge the method"
    return f"{over}: {figures}; {'one seed shows nothing certain' if seeds == 1 else why}."


@dataclass(frozen=True)
class _Comparison:
    """What one budget shows, and whether any arm could be told from the reference there."""

    text: str
    apart: bool

    @classmethod
    def of(cls, experiment: Experiment, arms: list[Arm], reference: Arm, ratio: str) -> _Comparison:
        base = accuracy(experiment, reference.name, ratio)
        at = f"at {budget(ratio)}, "
        if len(base.values) < 2:
            return cls(f"{at}{reference.name} left too few numbers to compare with", apart=False)
        apart, tied, silent = [], [], []
        for arm in arms:
            figures = accuracy(experiment, arm.name, ratio)
            if arm is reference:
                continue
            if figures.mean is None or base.mean is None or len(figures.values) < 2:
                silent.append(f"{arm.name} left too few numbers to compare")
            elif tie(figures, base):
                tied.append(f"{arm.name} {_mean(figures)}")
            else:
                points = 100 * (figures.mean - base.mean)
                side = "above" if points > 0 else "below"
                apart.append(f"{arm.name} {_mean(figures)} is {abs(points):.1f} points {side} {reference.name}")
        ties = [f"{_join(tied)} {'ties' if len(tied) == 1 else 'tie'} with {reference.name}"] if tied else []
        return cls(f"{at}{_join([*apart, *ties, *silent])} ({_mean(base)})", apart=bool(apart))


def _list_figures(experiment: Experiment, arms: list[Arm], ratio: str) -> str:
    return _join([f"{arm.name} {_mean(accuracy(experiment, arm.name, ratio))}" for arm in arms])


def _mean(figures: Spread) -> str:
    if figures.mean is None:
        return "no number"
    lost = f" without {figures.lost} lost run{'s' if figures.lost > 1 else ''}" if figures.lost else ""
    return percent(figures.mean) + lost


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
