"""One network, trained the way of one arm. What an arm is, is in arms.py; what comes out of it, in outcomes.py."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regimewrap import RegimeCycler, RegimePolicy, TopKGate, at_keep_ratio, gate_of, plan, unwrap, watch, wrap
from regimewrap.recipes.study.arms import CYCLES
from regimewrap.recipes.study.spec import Characters

if TYPE_CHECKING:
    from collections.abc import Callable

    from regimewrap import CyclePolicy
    from regimewrap.recipes.study.arms import Arm
    from regimewrap.recipes.study.spec import Images, Mnist1d
    from regimewrap.recipes.study.tasks import Data

_LOOKS = 50  # updates of a run at which the gates are watched
_POINTS = 40  # of a trace
_LOWEST = 0.05  # budget that the sandwich rule trains at
_DENSITY = 0.1  # that the L1 penalty aims at


@final
@dataclass(frozen=True)
class Setup:
    """What one network's training depends on besides its data and weights."""

    arm: Arm
    task: Mnist1d | Images | Characters
    lr: float
    knob: float | None
    seed: int
    cycle: CyclePolicy | None = None
    rank: int = 0
    ranks: int = 1


@final
@dataclass
class Trained:
    """What a training left besides the network. ``bound``: share of the updates looked at in which a gate cut."""

    loss: float = math.nan
    keep_ratio: float = 1.0
    cycles: int = 0
    bound: float = 0.0
    trace: list[tuple[int, float, float]] = field(default_factory=list)


def scope_of(task: Mnist1d | Images | Characters) -> str:
    """Return the scope in which units compete; only ``position`` is safe in a causal model."""
    return "position" if isinstance(task, Characters) else "sample"


def dense_policy(task: Mnist1d | Images | Characters) -> RegimePolicy:
    """Return the policy under which every arm's network is evaluated."""
    return RegimePolicy.preset("dense").replace(gate={"scope": scope_of(task)})


def train(model: nn.Module, data: Data, setup: Setup) -> Trained:
    """Train a network in place. Afterwards it is bare again.

    Args:
        model: new, bare, on its device.
        data: what to train on.
        setup: how.

    The order of the samples depends on the seed alone, so that arms are paired. A loss that is not finite ends the
    training: the network is judged as it is.
    """
    policy = dense_policy(setup.task)
    if setup.cycle is not None:
        policy = policy.replace(cycle=setup.cycle)
    gated = setup.arm.units == "top" and (setup.cycle is not None or setup.arm.loss == "sandwich")
    sites = [] if gated else _sites(model, policy)
    # A gate without a model moves all the same; which units survive is up to the hooks then.
    gate = gate_of(wrap(model, policy)) if gated else TopKGate(policy)
    cycler = RegimeCycler(gate)
    hooks, penalty = _hooked(sites, gate, setup)
    try:
        return _loop(model, cycler, data, setup, penalty, gated=gated)
    finally:
        for hook in hooks:
            hook.remove()
        if gated:
            unwrap(model)


def _loop(
    model: nn.Module, cycler: RegimeCycler, data: Data, setup: Setup, penalty: _Penalty | None, *, gated: bool
) -> Trained:
    arm, settings, device = setup.arm, setup.task.training, next(model.parameters()).device
    weight_decay = settings.weight_decay
    if arm.knob is not None and arm.knob.name == "weight_decay" and setup.knob is not None:
        # AdamW's decay is not divided by the size of the gradient, so what suits it is larger.
        weight_decay = setup.knob * (100 if settings.optimizer == "adamw" else 1)
    optimizer = _optimizer(model, settings.optimizer, setup.lr, weight_decay)
    net = DistributedDataParallel(model) if setup.ranks > 1 else model
    cast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    model.train()
    ratios, looks, bound, out = 0.0, 0, 0, Trained()
    # An odd number, so that of a rule that rests in turn not the same updates are looked at each time.
    look_every, point_every = max(1, settings.steps // _LOOKS) | 1, max(1, settings.steps // _POINTS)
    batches = data.order(setup.seed, settings.batch_size)
    for step, index in enumerate(islice(batches, settings.steps)):
        for group in optimizer.param_groups:
            group["lr"] = setup.lr * _schedule(step, settings.steps, arm.schedule)
        x, y = (each.to(device) for each in data.inputs(index[setup.rank :: setup.ranks]))
        looking = gated and step % look_every == 0
        ratio = cycler.keep_ratio
        with cast, watch(model) if looking else nullcontext() as seen:
            logits = net(x)
            loss = _cross_entropy(logits, y, setup.knob if arm.loss == "smooth" else 0.0)
        if penalty is not None:
            (loss + penalty.take()).backward()  # type: ignore[no-untyped-call]
        elif arm.loss == "sandwich":
            _sandwich(net, model, x, logits, loss, step)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (logits.detach().argmax(-1) == y).float().mean()
        last = step == settings.steps - 1
        if step % point_every == 0 or last:
            out.loss = float(loss.detach())
            out.trace.append((step + 1, round(ratio, 4), round(out.loss, 4)))
            if not math.isfinite(out.loss):
                break
        ratios += ratio
        if looking and seen is not None:
            looks, bound = looks + 1, bound + (seen.bound > 0)
        regime = cycler.step(loss.detach(), accuracy=accuracy)
        out.cycles = regime.cycle
    out.keep_ratio, out.bound = ratios / (step + 1), bound / max(1, looks)
    return out


def _sites(model: nn.Module, policy: RegimePolicy) -> list[nn.Module]:
    """Return the activation modules that the policy gates."""
    return [model.get_submodule(row.activation.name) for row in plan(model, policy).gated]


def _optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)


def _schedule(step: int, steps: int, kind: str) -> float:
    if kind == "restarts":
        steps = max(1, -(-steps // CYCLES))
        step %= steps
    return (1 + math.cos(math.pi * step / steps)) / 2


def _cross_entropy(logits: Tensor, y: Tensor, smoothing: float | None = 0.0) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten(), label_smoothing=smoothing or 0.0)


def _sandwich(net: nn.Module, model: nn.Module, x: Tensor, full: Tensor, loss: Tensor, step: int) -> None:
    """Add the gradients of the full budget, the lowest, and one between; the two learn from the full one's outputs."""
    (loss / 3).backward()  # type: ignore[no-untyped-call]
    aim = full.detach().float().softmax(-1).flatten(0, -2)
    between = _LOWEST ** (((step + 1) * 0.6180339887) % 1.0)  # spread evenly over the logarithm
    for keep_ratio in (_LOWEST, between):
        with at_keep_ratio(model, keep_ratio):
            logits = net(x).flatten(0, -2).float()
            (F.cross_entropy(logits, aim) / 3).backward()  # type: ignore[no-untyped-call]


@final
class _Penalty:
    """L1 on activations, with a weight that grows while they are denser than ``_DENSITY`` and falls while not."""

    def __init__(self) -> None:
        self._weight = 1e-3
        self._sizes: list[Tensor] = []
        self._dense: list[Tensor] = []

    def see(self, y: Tensor) -> None:
        self._sizes.append(y.abs().mean())
        self._dense.append((y.detach() != 0).float().mean())

    def take(self) -> Tensor:
        density = float(torch.stack(self._dense).mean())
        penalty = self._weight * torch.stack(self._sizes).mean()
        self._weight *= math.exp(0.1 * (density - _DENSITY))
        self._sizes, self._dense = [], []
        return penalty


def _hooked(sites: list[nn.Module], gate: TopKGate, setup: Setup) -> tuple[list[Any], _Penalty | None]:
    arm, change = setup.arm, None
    penalty = _Penalty() if arm.loss == "l1" else None
    if arm.units == "random":
        change = _random_units(gate, setup.knob if setup.cycle is None else None)
    elif arm.units == "not-largest":
        change = _without_largest(setup.knob or 0.0)

    def hook(module: nn.Module, _inputs: Any, y: Tensor) -> Tensor | None:
        if penalty is not None and module.training:
            penalty.see(y)
        return change(y) if change is not None and module.training else None

    wanted = penalty is not None or change is not None
    return [site.register_forward_hook(hook) for site in sites if wanted], penalty


def _random_units(gate: TopKGate, rate: float | None) -> Callable[[Tensor], Tensor]:
    """Return dropout at a rate or, without one, what keeps units at random at the gate's ratio, unscaled as it does."""

    def change(y: Tensor) -> Tensor:
        if rate is not None:
            return F.dropout(y, rate)
        keep_ratio = float(gate.keep_ratio)
        dropped = torch.where(torch.rand_like(y) < keep_ratio, y, 0.0) if keep_ratio < 1 else y
        rows = getattr(gate, "dense_rows", None)
        if rows is None:
            return dropped
        share, update = rows.tolist()
        n = len(y)
        dense = math.floor((update + 1) * n * share) - math.floor(update * n * share)
        leading = update % 2 == 0
        whole = torch.arange(n, device=y.device) < dense if leading else torch.arange(n, device=y.device) >= n - dense
        return torch.where(whole.view(-1, *[1] * (y.dim() - 1)), y, dropped)

    return change


def _without_largest(rate: float) -> Callable[[Tensor], Tensor]:
    """Return what zeroes each sample's largest units, a share drawn anew between 0 and ``rate``."""

    def change(y: Tensor) -> Tensor:
        flat = y.flatten(1)
        count = int(float(torch.rand(())) * rate * flat.shape[1])
        if count == 0:
            return y
        least = flat.detach().topk(count, dim=1).values[:, -1:]
        return torch.where(flat >= least, 0.0, flat).view_as(y)

    return change
