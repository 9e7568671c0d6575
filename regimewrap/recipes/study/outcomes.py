"""One cell from its settings to its figures: trains, then judges the network at each budget. Writes nothing."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regimewrap import at_keep_ratio, calibrate, recalibrate_batchnorm, unwrap, watch, wrap
from regimewrap.errors import DataError
from regimewrap.recipes.study.arms import ARMS
from regimewrap.recipes.study.nets import build, fitting_width, multiply_adds, parameters
from regimewrap.recipes.study.spec import Characters
from regimewrap.recipes.study.tasks import load, load_before
from regimewrap.recipes.study.train import Setup, Trained, dense_policy, train
from regimewrap.torch_private import BatchNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from regimewrap.recipes.study.cells import Cell
    from regimewrap.recipes.study.tasks import Data

_BATCH = 1000
_BINS = 15  # of the calibration error
_CALIBRATION = 512  # training samples that thresholds and BatchNorm statistics come from
_CORRUPTED = 5000  # test samples that are corrupted
_CORRUPTED_AT = (1.0, 0.1)


def make(cell: Cell, folder: Path | None = None, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train and judge what a cell says.

    Args:
        cell: the settings.
        folder: where data files are looked for.
        rank: of this process, where several train one network.
        ranks: how many do.

    Returns:
        Plain data: accuracy (0..1), negative log-likelihood (nats) and calibration error (0..1) by budget; the same
        accuracies of corrupted samples; thresholds on a dense network; how the training went.
    """
    arm, task = ARMS[cell.arm], cell.task
    data = load(task, cell.seed, cell.part, folder)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    setup = Setup(arm, task, cell.lr, cell.knob, cell.seed, cell.cycle, rank, ranks)

    def fresh(width: float = 1.0) -> nn.Module:
        torch.manual_seed(cell.seed)
        return build(task, data, width)

    def trained_before(width: float = 1.0) -> nn.Module:
        model = fresh(width).to(device)
        if isinstance(task, Characters) and task.before is not None:
            first = task.replace(training=task.before.model_dump())
            train(
                model,
                load_before(task),
                Setup(ARMS["dense"], first, task.before.lr, None, cell.seed, None, rank, ranks),
            )
        return model

    if arm.nets != "one":
        return _one_net_each(cell, data, setup, fresh, trained_before)
    model = trained_before()
    trained = train(model, data, setup)
    full = cell.part == "test"
    out = _judged(model, data, task, cell.budgets, corrupt=full)
    if full and cell.arm == "dense" and not _has_batchnorm(model):
        out["post-hoc"] = _post_hoc(model, data, task, cell.budgets)
    return (
        out | _about(trained) | {"parameters": parameters(model, data), "multiply_adds": multiply_adds(fresh(), data)}
    )


def _one_net_each(
    cell: Cell,
    data: Data,
    setup: Setup,
    fresh: Callable[[float], nn.Module],
    trained_before: Callable[[float], nn.Module],
) -> dict[str, Any]:
    memory = sum(cell.budgets)
    out: dict[str, Any] = {"accuracy": {}, "nll": {}, "ece": {}, "parameters": 0, "widths": {}}
    trained = Trained()
    for budget in cell.budgets:
        narrow = setup.arm.nets == "narrow"
        share, measure = (budget, multiply_adds) if narrow else (budget / memory, parameters)
        width = fitting_width(fresh, share, partial(measure, data=data))
        model = trained_before(width)
        trained = train(model, data, setup)
        judged = _judged(model, data, cell.task, (1.0,), corrupt=False)
        for name in ("accuracy", "nll", "ece"):
            out[name][f"{budget:g}"] = judged[name]["1"]
        out["parameters"] += parameters(model, data)
        out["widths"][f"{budget:g}"] = width
    return out | _about(trained)


def _about(trained: Trained) -> dict[str, Any]:
    return {
        "train_loss": trained.loss,
        "mean_keep_ratio": trained.keep_ratio,
        "cycles": trained.cycles,
        "bound": trained.bound,
        "trace": [list(point) for point in trained.trace],
    }


def _judged(model: nn.Module, data: Data, task: Any, budgets: tuple[float, ...], *, corrupt: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"accuracy": {}, "nll": {}, "ece": {}}
    wrap(model, dense_policy(task))
    with torch.no_grad():
        model.eval()
        with watch(model) as seen:
            _logits(model, data, data.test_x[:_CALIBRATION])
        out["density"] = seen.density
        for budget in budgets:
            judge = _recalibrated(model, data, budget)
            with at_keep_ratio(judge, budget):
                figures = _figures(_logits(judge, data, data.test_x), data.test_y)
            for name, value in figures.items():
                out[name][f"{budget:g}"] = value
        if corrupt and not isinstance(task, Characters):
            out["corrupted"] = _corrupted(model, data)
    unwrap(model)
    return out


def _corrupted(model: nn.Module, data: Data) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    clean, y = data.ready(data.test_x[:_CORRUPTED]), data.test_y[:_CORRUPTED]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    pool = F.avg_pool1d if clean.dim() == 3 else F.avg_pool2d
    mean = clean.mean(dim=tuple(range(1, clean.dim())), keepdim=True)
    kinds = {
        "noise": clean + 0.5 * noise,
        "blur": pool(clean, 3, stride=1, padding=1, count_include_pad=False),
        "contrast": mean + 0.4 * (clean - mean),
    }
    for budget in _CORRUPTED_AT:
        judge = _recalibrated(model, data, budget)
        with at_keep_ratio(judge, budget):
            for kind, x in kinds.items():
                logits = torch.cat([judge(part.to(_device(judge))).cpu() for part in torch.split(x, _BATCH)])
                right = (logits.argmax(-1) == y).float().mean() if logits.isfinite().all() else math.nan
                out.setdefault(kind, {})[f"{budget:g}"] = float(right)
    return out


def _post_hoc(model: nn.Module, data: Data, task: Any, budgets: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Cut a dense network's activations at thresholds found on training samples: the arm without training.

    Not for BatchNorm, whose statistics depend on the cut and the cut on them.
    """
    out: dict[str, dict[str, float]] = {"accuracy": {}, "nll": {}, "ece": {}}
    wrap(model, dense_policy(task))
    model.eval()
    x = data.ready(data.x[:_CALIBRATION]).to(_device(model))
    try:
        calibration = calibrate(model, [x], keep_ratios=budgets)
    except DataError:  # activations that are not finite: the training broke
        unwrap(model)
        return {name: {f"{budget:g}": math.nan for budget in budgets} for name in out}
    for budget in budgets:
        calibration.apply(model, budget)
        with torch.no_grad():
            figures = _figures(_logits(model, data, data.test_x), data.test_y)
        for name, value in figures.items():
            out[name][f"{budget:g}"] = value
    unwrap(model)
    return out


def _has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, BatchNorm) for module in model.modules())


def _recalibrated(model: nn.Module, data: Data, budget: float) -> nn.Module:
    """Return the model, or a copy with BatchNorm statistics of this budget where it has any: for every arm alike."""
    if not _has_batchnorm(model):
        return model
    judge = copy.deepcopy(model)
    batches = [data.ready(part) for part in torch.split(data.x[:_CALIBRATION], 128)]
    recalibrate_batchnorm(judge, batches, budget)
    return judge


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _logits(model: nn.Module, data: Data, inputs: Tensor) -> Tensor:
    return torch.cat([model(x).float().cpu() for x in _batches(model, data, inputs)])


def _batches(model: nn.Module, data: Data, inputs: Tensor) -> Iterator[Tensor]:
    for part in torch.split(inputs, _BATCH):
        yield data.ready(part).to(_device(model))


def _figures(logits: Tensor, y: Tensor) -> dict[str, float]:
    logits, y = logits.flatten(0, -2), y.flatten()
    if not logits.isfinite().all():  # a network that broke has no guess; the largest of NaN is the first class
        return dict.fromkeys(("accuracy", "nll", "ece"), math.nan)
    share, guess = logits.softmax(-1).max(-1)
    right = (guess == y).double()
    bins = (share * _BINS).long().clamp(0, _BINS - 1)
    gap = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, right - share.double()).abs().sum() / len(y)
    return {"accuracy": float(right.mean()), "nll": float(F.cross_entropy(logits, y)), "ece": float(gap)}
