"""The ways of training that a study compares, as a table. What each setting does to an update is in train.py.

Every arm trains the same network on the same samples in the same order, from the same weights, and is evaluated by the
same gates at the same budgets. Where an arm differs in more than one thing from another, its sentence says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from regimewrap.policy.policy import RegimePolicy
from regimewrap.policy.strategies import Constant, Spread

if TYPE_CHECKING:
    from collections.abc import Callable

#: The recipe's version: a cell made by another one is another cell. Raise it when a change alters figures.
RECIPE = 1

#: Cycles in a run, of the presets and of the learning rate's restarts.
CYCLES = 12

_LR_SPAN = 4.0  # trials look at learning rates from a fourth to four times that of the spec


@final
@dataclass(frozen=True)
class Knob:
    """A number of an arm's own that trials choose, between ``low`` and ``high`` on a logarithmic scale."""

    name: str
    default: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        about: a sentence for the report.
        policy: what moves the keep ratio, from the number of updates; ``None``: nothing does.
        units: which units of an activation survive in training: ``top`` (the gate), ``random``, ``not-largest``.
        knob: the arm's own number.
        loss: ``plain``, ``smooth`` (labels), ``l1`` (activations), ``sandwich``.
        schedule: the learning rate's.
        nets: ``one`` for all budgets, or a net of its own for each budget: ``narrow`` has the budget's share of the
            multiply-adds, ``container`` the budget's share of one net's memory, so that all of them fill that.
        home: the budget at which trials choose.
    """

    about: str
    policy: Callable[[int], RegimePolicy] | None = None
    units: Literal["top", "random", "not-largest"] = "top"
    knob: Knob | None = None
    loss: Literal["plain", "smooth", "l1", "sandwich"] = "plain"
    schedule: Literal["cosine", "restarts"] = "cosine"
    nets: Literal["one", "narrow", "container"] = "one"
    home: float = 1.0


def _preset(name: str, full_share: float) -> Callable[[int], RegimePolicy]:
    def build(steps: int) -> RegimePolicy:
        return RegimePolicy.preset(name, steps, full_share=full_share)

    return build


def _fixed(keep_ratio: float) -> Callable[[int], RegimePolicy]:
    def build(steps: int) -> RegimePolicy:
        cycle = RegimePolicy.preset("dense", steps).cycle
        return RegimePolicy(cycle=cycle.replace(strategy=Constant(keep_ratio=keep_ratio), full_share=0.0))

    return build


def _dense_then(keep_ratio: float) -> Callable[[int], RegimePolicy]:
    fixed = _fixed(keep_ratio)

    def build(steps: int) -> RegimePolicy:
        return fixed(steps).replace(cycle={"warmup": steps * 4 // 5, "every": 1})

    return build


def _mixed_always(steps: int) -> RegimePolicy:
    return RegimePolicy.preset("mixed", steps).replace(cycle={"strategy": Spread(rest=0.0)})


#: Every arm by name. ``dense`` comes first; the others are compared with it.
ARMS: dict[str, Arm] = {
    "dense": Arm("The full budget throughout, no regularisation."),
    "weight-decay": Arm(
        "Dense, with weight decay; 100 times the number where the optimizer is AdamW.",
        knob=Knob("weight_decay", 1e-3, 1e-4, 1e-2),
    ),
    "dropout": Arm(
        "Dense, with dropout of single units at the gated activations.",
        units="random",
        knob=Knob("rate", 0.1, 0.02, 0.5),
    ),
    "label-smoothing": Arm("Dense, with smoothed labels.", loss="smooth", knob=Knob("smoothing", 0.1, 0.01, 0.4)),
    "restarts": Arm(f"Dense, the learning rate along {CYCLES} cosines in a row.", schedule="restarts"),
    "max-dropping": Arm(
        "Dense, but each update zeroes the largest units of each sample, a share drawn between 0 and the rate.",
        units="not-largest",
        knob=Knob("rate", 0.02, 0.002, 0.2),
    ),
    "l1": Arm("Dense, with an L1 penalty on activations whose weight moves towards a density of 0.1.", loss="l1"),
    "sandwich": Arm(
        "Three passes an update: full budget, 0.05 and a random one; the two learn from the full one's outputs.",
        loss="sandwich",
    ),
    "fixed-0.2": Arm("Keep ratio 0.2 throughout.", _fixed(0.2), home=0.2),
    "fixed-0.1": Arm("Keep ratio 0.1 throughout.", _fixed(0.1), home=0.1),
    "fixed-0.05": Arm("Keep ratio 0.05 throughout.", _fixed(0.05), home=0.05),
    "dense-then-0.1": Arm(
        "Dense for four fifths of the updates, keep ratio 0.1 throughout the last fifth.", _dense_then(0.1), home=0.1
    ),
    "sawtooth": Arm("The keep ratio from 1 to 0.05 in cycles, for the whole batch.", _preset("sawtooth", 0.0)),
    "sawtooth-half": Arm("The same for half of the batch; the other half dense.", _preset("sawtooth", 0.5)),
    "random-sawtooth": Arm(
        "As sawtooth, but the units that survive are drawn, zeros among them, and none is scaled.",
        _preset("sawtooth", 0.0),
        units="random",
    ),
    "accuracy-reset": Arm("The method's reset strategy, rescaled to the run.", _preset("accuracy-reset", 0.0)),
    "accuracy-reset-half": Arm("The same for half of the batch.", _preset("accuracy-reset", 0.5)),
    "accuracy-relax": Arm("The method's relax strategy, rescaled to the run.", _preset("accuracy-relax", 0.0)),
    "accuracy-relax-half": Arm("The same for half of the batch.", _preset("accuracy-relax", 0.5)),
    "mixed": Arm(
        "Two updates with half of the batch dense and half at a ratio spread over [0.05, 1], two dense, and so on.",
        _preset("mixed", 0.5),
    ),
    "mixed-always": Arm("As mixed, but at every update.", _mixed_always),
    "random-mixed": Arm(
        "As mixed-always, but the units that survive are drawn, zeros among them, and none is scaled.",
        _mixed_always,
        units="random",
    ),
    "narrow": Arm("For each budget a narrower dense net with that share of the multiply-adds.", nets="narrow"),
    "container": Arm("For each budget a narrower dense net; all of them together as large as one.", nets="container"),
}

#: An arm without training: thresholds on the dense arm's networks, measured in its cells.
POSTHOC = "post-hoc"


def trial(arm: Arm, lr: float, number: int) -> tuple[float, float | None]:
    """Return the learning rate and the knob of an arm's trial.

    Trial 0 has the defaults. The others follow a Halton sequence, the same for every arm: spread evenly over the
    learning rate alone where there is no knob, over both where there is one. Its first term, the middle, is left out.
    """
    knob = arm.knob
    if number == 0:
        return lr, None if knob is None else knob.default
    rate = float(f"{lr * _LR_SPAN ** (2 * _halton(number + 1, 2) - 1):.3g}")
    if knob is None:
        return rate, None
    span = math.log(knob.high / knob.low)
    return rate, float(f"{knob.low * math.exp(span * _halton(number + 1, 3)):.3g}")


def _halton(number: int, base: int) -> float:
    """Return the ``number``-th term, from 1, of van der Corput's sequence in ``base``, in (0, 1)."""
    value, share = 0.0, 1.0
    while number:
        share /= base
        number, digit = divmod(number, base)
        value += digit * share
    return value
