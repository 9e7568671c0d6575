"""What paired seeds show: an interval, a test, and the words they allow. Needs scipy; no records and no training here.

Two arms that share a seed share initial weights, order and samples, so each seed gives one difference, in which what
the seed did to both has gone.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from regimewrap.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: The word for a comparison. ``open``: the seeds do not say.
Verdict = Literal["above", "below", "tie", "open"]

#: Differences of accuracy within this distance of zero are as good as none: 0.2 points.
EQUIVALENT = 0.002

#: Fewer seeds support no claim.
FEWEST_SEEDS = 8

_LEVEL = 0.95
_RESAMPLES = 9999

TIE_RULE = (
    "Arms are paired by seed. An arm is above or below another only where the 95 % bootstrap interval (BCa) of the "
    "mean difference and a sign-flip permutation test, its p corrected by Holm over the arms, agree, over "
    f"{FEWEST_SEEDS} seeds or more. Arms tie where the interval lies within ±0.2 points. Else the seeds do not tell "
    "them apart."
)


@dataclass(frozen=True)
class Difference:
    """The paired differences of one arm to another, larger being better.

    Attributes:
        seeds: pairs.
        mean: of the differences.
        low: lower end of the 95 % interval of the mean; ``nan`` below two pairs.
        high: upper end.
        p: two-sided, by flipping signs; corrected over the arms where ``compared`` made it. ``nan`` below two pairs.
        wins: share of the pairs in which the first arm is better, an equal pair counting half.
    """

    seeds: int
    mean: float
    low: float
    high: float
    p: float
    wins: float

    def verdict(self, equivalent: float = EQUIVALENT) -> Verdict:
        """Return the word that interval and test allow; ``equivalent`` bounds what is as good as no difference."""
        if self.seeds < FEWEST_SEEDS:
            return "open"
        if -equivalent <= self.low and self.high <= equivalent:
            return "tie"
        if self.p < 1 - _LEVEL and self.low > 0:
            return "above"
        if self.p < 1 - _LEVEL and self.high < 0:
            return "below"
        return "open"

    def holds(self, equivalent: float = EQUIVALENT) -> bool:
        """Whether the first arm is at least as good, but for what is as good as no difference."""
        return self.seeds >= FEWEST_SEEDS and self.low > -equivalent


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Compare two arms over the seeds that both have.

    Args:
        first: seed to figure, larger being better. Figures that are not finite leave their pair out.
        second: the same for the other arm.

    Raises:
        MissingExtraError: scipy is missing.

    >>> found = difference({s: 0.9 + s / 1000 for s in range(8)}, {s: 0.8 for s in range(8)})
    >>> found.verdict(), found.p
    ('above', 0.0078125)
    """
    values = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    values = [value for value in values if math.isfinite(value)]
    n = len(values)
    if n < 2:
        return Difference(n, values[0] if values else math.nan, math.nan, math.nan, math.nan, math.nan)
    low, high = _interval(values)
    wins = sum(1.0 if value > 0 else 0.5 if value == 0 else 0.0 for value in values) / n
    return Difference(n, fmean(values), low, high, _sign_flip(values), wins)


def compared(arms: Mapping[str, Mapping[int, float]], reference: Mapping[int, float]) -> dict[str, Difference]:
    """Compare several arms with one, their p corrected by Holm: the chance of one false claim among all stays 5 %."""
    found = {name: difference(figures, reference) for name, figures in arms.items()}
    corrected = holm({name: each.p for name, each in found.items() if not math.isnan(each.p)})
    return {name: replace(each, p=corrected.get(name, each.p)) for name, each in found.items()}


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Return p values corrected for their number, by Holm's step-down rule.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected, worst = {}, 0.0
    for place, name in enumerate(sorted(ps, key=lambda each: ps[each])):
        worst = max(worst, min(1.0, ps[name] * (len(ps) - place)))
        corrected[name] = worst
    return corrected


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if max(values) - min(values) < 1e-12:
        return min(values), max(values)
    stats, numpy = _scipy()
    for method in ("BCa", "percentile"):  # BCa has no answer where leaving out one value changes nothing
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (numpy.asarray(values),),
                numpy.mean,
                confidence_level=_LEVEL,
                n_resamples=_RESAMPLES,
                method=method,
                random_state=numpy.random.default_rng(0),
            ).confidence_interval
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return float(found.low), float(found.high)


def _sign_flip(values: Sequence[float]) -> float:
    """Return the share of all sign patterns (drawn ones beyond 13 values) whose mean is as far from zero."""
    stats, numpy = _scipy()

    def mean(sample: Any, axis: int) -> Any:
        # Rounded, so that sums of the same numbers in another order count as equal.
        return numpy.round(numpy.mean(sample, axis=axis), 12)

    found = stats.permutation_test(
        (numpy.asarray(values),),
        mean,
        permutation_type="samples",
        n_resamples=_RESAMPLES,
        vectorized=True,
        random_state=numpy.random.default_rng(0),
    )
    return float(found.pvalue)


def _scipy() -> tuple[Any, Any]:
    try:
        import numpy
        from scipy import stats
    except ImportError:
        raise MissingExtraError("scipy", "cli") from None
    return stats, numpy
