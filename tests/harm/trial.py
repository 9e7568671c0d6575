"""One training of one task, as its author would write it, with a wrapped model: the loop that all tasks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import regimewrap

KEEP_RATIOS = (1.0, 0.5, 0.2, 0.1, 0.05)
_TRACED = 48  # points that are kept of what went on in a run


@dataclass
class Trial:
    """Everything a training needs. The seed that built it decides weights, split, order and augmentation.

    Attributes:
        model: not wrapped yet.
        optimizer: of the model's parameters.
        batches: for each update the micro-batches whose gradients are added up.
        updates: how many there are.
        loss: takes the model and a micro-batch; returns the loss and a share in 0..1 that grows as the model learns.
        evaluate: takes the model in eval mode; returns points (larger is better) or nats (smaller is better).
        calibration: inputs of training data, from which BatchNorm's statistics are estimated again; none without it.
        decays: whether the learning rate goes down along half a cosine; if not it stays.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[list[Any]]
    updates: int
    loss: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
    evaluate: Callable[[nn.Module], float]
    unit: Literal["points", "nats"] = "points"
    scope: Literal["sample", "position"] = "sample"
    calibration: list[Tensor] = field(default_factory=list)
    decays: bool = True


def run(trial: Trial, policy: regimewrap.RegimePolicy, seed: int) -> dict[str, Any]:
    """Train at the policy's budgets and return the outcome at each keep ratio, with a trace of the run."""
    model, optimizer = trial.model, trial.optimizer
    policy = policy.replace(gate={"scope": trial.scope})
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, trial.updates)
    regimewrap.wrap(model, policy)
    cycler = regimewrap.RegimeCycler(model, total_steps=trial.updates)
    torch.manual_seed(seed)  # dropout draws the same in all arms
    ratios, losses = [], []
    start = time.process_time()
    model.train()
    for batch in trial.batches:
        signals = []
        for micro in batch:
            loss, share = trial.loss(model, micro)
            (loss / len(batch)).backward()
            signals.append(torch.stack((loss.detach(), share.detach())))
        optimizer.step()
        optimizer.zero_grad()
        if trial.decays:
            cosine.step()
        ratios.append(cycler.keep_ratio)
        loss, share = torch.stack(signals).float().mean(0)
        losses.append(loss)
        cycler.step(loss, accuracy=share)
    seconds = time.process_time() - start
    size = max(1, len(ratios) // _TRACED)
    return {
        "unit": trial.unit,
        "values": _swept(trial, recalibrate=False),
        "recalibrated": _swept(trial, recalibrate=True) if trial.calibration else None,
        "updates": len(ratios),
        "parameters": sum(each.numel() for each in model.parameters()),
        "train_seconds": round(seconds, 2),
        "keep_ratio": [float(f"{ratio:.3g}") for ratio in ratios[::size]],
        "loss": [float(f"{torch.stack(losses[i : i + size]).mean():.4g}") for i in range(0, len(losses), size)],
    }


def _swept(trial: Trial, *, recalibrate: bool) -> dict[str, float]:
    values = {}
    for ratio in KEEP_RATIOS:
        before = {name: buffer.clone() for name, buffer in trial.model.named_buffers()}
        if recalibrate:
            regimewrap.recalibrate_batchnorm(trial.model, trial.calibration, ratio)
        value = regimewrap.sweep(trial.model, trial.evaluate, (ratio,)).values[ratio]
        for name, buffer in trial.model.named_buffers():
            buffer.copy_(before[name])
        values[f"{ratio:g}"] = round(value, 4)
    return values


def minibatches(n: int, size: int, updates: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of so many batches, each epoch in a new order and without its incomplete last batch."""
    while True:
        order = torch.randperm(n, generator=generator)
        for i in range(0, n - size + 1, size):
            if updates == 0:
                return
            updates -= 1
            yield order[i : i + size]


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the share of rows (or positions) whose largest logit is the label's."""
    return (logits.argmax(-1) == y).float().mean()
