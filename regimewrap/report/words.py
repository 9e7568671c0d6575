"""What the figures show, in one sentence that claims no more than they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regimewrap.report.statistics import FEWEST_SEEDS
from regimewrap.report.summary import (
    Spread,
    accuracy,
    budget,
    compare,
    keep_ratios,
    percent,
    reference_arm,
    seed_count,
)

if TYPE_CHECKING:
    from regimewrap.report.results import Arm, Experiment


def opening(experiment: Experiment) -> str:
    """Return what was done, for a reader who knows none of the words yet."""
    arms = [arm.name for arm in experiment.arms if experiment.runs_of(arm.name)]
    ratios = keep_ratios(experiment)
    if not arms or not ratios:
        return "Networks were to be trained and tested at several budgets."
    trained = (
        f"{_count(len(arms), 'way')} of training a network ({_join(arms)}), tested at {_count(len(ratios), 'budget')}."
    )
    trained = trained[:1].upper() + trained[1:]
    small = min(map(float, ratios))
    example = (
        "" if small == 1 else f" at keep ratio {small:g} the largest {100 * small:g} % stay and the rest are zero."
    )
    return (
        f"{trained} A budget is the share of its units that each gated layer may keep{':' if example else '.'}{example}"
    )


def conclusion(experiment: Experiment) -> str:
    """Return one plain sentence about what the figures show, at the largest and the smallest keep ratio evaluated.

    Arms are compared with the dense one, by ``statistics.TIE_RULE``. Few seeds support no claim, and the sentence says
    so.
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
        said = [_compared(experiment, arms, reference, ratio) for ratio in budgets]
        caution = f"; fewer than {FEWEST_SEEDS} seeds support no claim" if seeds < FEWEST_SEEDS else ""
        return f"{over}: {'; '.join(said)}{caution}."
    figures = "; ".join(f"at {budget(ratio)}, {_list_figures(experiment, arms, ratio)}" for ratio in budgets)
    why = "without a dense arm to compare with, this does not judge the method"
    return f"{over}: {figures}; {'one seed shows nothing certain' if seeds == 1 else why}."


def _compared(experiment: Experiment, arms: list[Arm], reference: Arm, ratio: str) -> str:
    """Return what one budget shows."""
    base = accuracy(experiment, reference.name, ratio)
    at = f"at {budget(ratio)}, "
    if len(base.values) < 2:
        return f"{at}{reference.name} left too few numbers to compare with"
    found = compare(experiment, reference, ratio)
    apart, tied, open_, silent = [], [], [], []
    for arm in arms:
        if arm is reference:
            continue
        figures = accuracy(experiment, arm.name, ratio)
        name, verdict = f"{arm.name} {_mean(figures)}", found[arm.name].verdict()
        if found[arm.name].seeds < 2:
            silent.append(f"{arm.name} left too few numbers to compare")
        elif verdict == "tie":
            tied.append(name)
        elif verdict == "open":
            open_.append(name)
        else:
            apart.append(f"{name} is {abs(100 * found[arm.name].mean):.1f} points {verdict} {reference.name}")
    ties = [f"{_join(tied)} {'ties' if len(tied) == 1 else 'tie'} with {reference.name}"] if tied else []
    unknown = [f"{_join(open_)} cannot be told from {reference.name}"] if open_ else []
    return f"{at}{_join([*apart, *ties, *unknown, *silent])} ({_mean(base)})"


def _list_figures(experiment: Experiment, arms: list[Arm], ratio: str) -> str:
    return _join([f"{arm.name} {_mean(accuracy(experiment, arm.name, ratio))}" for arm in arms])


def _count(number: int, what: str) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six")
    return f"{words[number] if number < len(words) else number} {what}{'s' * (number != 1)}"


def _mean(figures: Spread) -> str:
    if figures.mean is None:
        return "no number"
    lost = f" without {figures.lost} lost run{'s' if figures.lost > 1 else ''}" if figures.lost else ""
    return percent(figures.mean) + lost


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
