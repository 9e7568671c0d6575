"""One wrapped model at many budgets: a metric at each, and BatchNorm statistics for one.

Only evaluates: no training, and no drawing beyond the one curve of a ``Sweep``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsFloat, TypeVar, final

import torch
from torch import Tensor, nn

from regimewrap.errors import DataError, PolicyError, WrapError
from regimewrap.files import Table, Tabled, axes_for, write_whole
from regimewrap.gate.gate import at_keep_ratio, gate_of
from regimewrap.measure.batchnorm import layers_with_statistics, of_another_budget, remember
from regimewrap.policy.policy import require_ratio
from regimewrap.torch_private import BatchNorm

M = TypeVar("M", bound=nn.Module)


@final
@dataclass(frozen=True, repr=False)
class Sweep(Tabled):
    """A metric at each of several budgets. Prints as a table.

    Attributes:
        values: keep ratio, in (0, 1], to the metric there, in the order evaluated.

    >>> print(regimewrap.Sweep({1.0: 0.95, 0.1: 0.9}))
    keep ratio   value
             1  0.9500
           0.1  0.9000
    """

    values: Mapping[float, float]

    def __reduce__(self) -> tuple[Any, ...]:
        return _swept, (dict(self.values),)  # a read-only view can be neither copied nor pickled

    def __repr__(self) -> str:
        return f"Sweep({dict(self.values)})"

    def _table(self) -> Table:
        values = [(f"{ratio:g}", f"{value:.4f}") for ratio, value in self.values.items()]
        return Table([("keep ratio", "value"), *values], left=())

    def plot(self, ax: Any = None) -> Any:
        """Draw the metric over the keep ratio, on a logarithmic axis.

        Args:
            ax: matplotlib axes to draw on; new ones if ``None``.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        ax = axes_for(ax)
        ratios = sorted(self.values)
        ax.plot(ratios, [self.values[ratio] for ratio in ratios], marker="o")
        ax.set_xscale("log")
        ax.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        ax.minorticks_off()
        ax.set_xlabel("keep ratio")
        ax.set_ylabel("value")
        return ax

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.json`` (a mapping from keep ratio to value) or ``.csv`` (two columns), whole or not at all.

        Raises:
            DataError: the suffix is another one, or the file cannot be written.
        """
        values = {f"{ratio:g}": value if math.isfinite(value) else None for ratio, value in self.values.items()}
        save_figures(path, "a sweep", values, [("keep_ratio", "value"), *self.values.items()])


def _swept(values: dict[float, float]) -> Sweep:
    return Sweep(MappingProxyType(values))


def sweep(
    model: M,
    evaluate: Callable[[M], SupportsFloat],
    keep_ratios: Iterable[float] = (1.0, 0.5, 0.2, 0.1),
) -> Sweep:
    """Evaluate a wrapped model at several budgets.

    Args:
        model: a wrapped model. It is evaluated in eval mode and without gradients, at each ratio whatever its policy's
            ``eval_keep_ratio``; afterwards every module's mode and the keep ratio are as they were, also on an error.
        evaluate: takes the model, returns a number such as the accuracy on a fixed set.
        keep_ratios: fractions in (0, 1], evaluated in this order.

    Raises:
        NotWrappedError: the model is not wrapped.
        PolicyError: there is no ratio, or one is outside (0, 1].
        WrapError: ``evaluate`` returned something other than a number.

    BatchNorm's running statistics belong to one budget. Where they were taken at another one than a budget evaluated,
    a warning says so; ``evaluate`` may call ``recalibrate_batchnorm`` first.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 10), nn.GELU()))
    >>> x = torch.randn(3, 4)
    >>> share = regimewrap.sweep(model, lambda model: (model(x) != 0).float().mean(), keep_ratios=(1.0, 0.2))
    >>> {ratio: round(value, 2) for ratio, value in share.values.items()}
    {1.0: 1.0, 0.2: 0.2}
    """
    gate_of(model)
    ratios = [require_ratio("keep_ratios", ratio) for ratio in keep_ratios]
    if not ratios:
        raise PolicyError("keep_ratios must hold at least one fraction in (0, 1]; got none.")
    values: dict[float, float] = {}
    notice: str | None = None
    with modes_restored(model), torch.no_grad():
        model.eval()
        for ratio in ratios:
            with at_keep_ratio(model, ratio):
                values[ratio] = metric(evaluate(model))
            notice = notice or of_another_budget(model, [ratio])
    if notice is not None:
        warnings.warn(notice, RuntimeWarning, stacklevel=2)
    return _swept(values)


def recalibrate_batchnorm(model: nn.Module, loader: Iterable[Any], keep_ratio: float) -> None:
    """Re-estimate BatchNorm's running statistics, in place, for the budget the model will serve at.

    The statistics become the plain average over the batches. Only BatchNorm layers are in train mode meanwhile; modes
    and momenta come back afterwards. If anything fails, so do the statistics.

    Args:
        model: a wrapped model with BatchNorm layers that track running statistics.
        loader: batches of training inputs: tensors, tuples or lists whose first item is the input, or dicts of keyword
            arguments. A few hundred samples are enough. Tensors are moved to the device of the model.
        keep_ratio: the budget, in (0, 1].

    Raises:
        NotWrappedError: the model is not wrapped.
        PolicyError: the ratio is outside (0, 1].
        WrapError: no layer tracks running statistics.
        DataError: the loader gave no batch, or a batch of another kind.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.BatchNorm1d(32)))
    >>> regimewrap.recalibrate_batchnorm(model, [torch.randn(8, 4) for _ in range(3)], keep_ratio=0.1)
    >>> int(model[2].num_batches_tracked)
    3
    """
    gate_of(model)
    layers = layers_with_statistics(model)
    if not layers:
        raise WrapError(
            f"{type(model).__name__} has no BatchNorm layer with running statistics; there is nothing to recalibrate."
        )
    with at_keep_ratio(model, keep_ratio), modes_restored(model), _averaging(layers), torch.no_grad():
        model.eval()
        for layer in layers:
            layer.train()
        batches, device = 0, next(layers[0].buffers()).device
        for batch in loader:
            run_batch(model, batch, device)
            batches += 1
        if batches == 0:
            raise DataError("the loader gave no batch; BatchNorm needs at least one to recalibrate from.")
    remember(model, require_ratio("keep_ratio", keep_ratio))


def save_figures(path: str | os.PathLike[str], what: str, values: Any, table: Iterable[Iterable[Any]]) -> None:
    """Write ``values`` to a ``.json`` file or ``table`` to a ``.csv`` file, whole or not at all.

    Raises:
        DataError: the suffix is another one, or the file cannot be written.
    """
    path = Path(path)
    match path.suffix.lower():
        case ".json":
            text = json.dumps(values, indent=1) + "\n"
        case ".csv":
            lines = io.StringIO()
            csv.writer(lines, lineterminator="\n").writerows(table)
            text = lines.getvalue()
        case suffix:
            raise DataError(f"{what} is saved as .json or .csv; got {suffix!r} ({path}).")
    write_whole(path, text)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Put every module's mode back on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # One by one: a user may have frozen some modules in eval mode.
        for module, training in modes:
            module.training = training


@contextmanager
def _averaging(layers: list[BatchNorm]) -> Iterator[None]:
    """Let layers average their statistics from scratch; put the old ones back if that fails."""
    before = [(layer, layer.momentum, {name: b.clone() for name, b in layer.named_buffers()}) for layer in layers]
    try:
        for layer in layers:
            layer.momentum = None  # PyTorch's word for the plain average
            layer.reset_running_stats()
        yield
    except BaseException:
        for layer, _, buffers in before:
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])
        raise
    finally:
        for layer, momentum, _ in before:
            layer.momentum = momentum


def run_batch(model: nn.Module, batch: Any, device: torch.device) -> None:
    """Run a model on one batch of a loader; see ``recalibrate_batchnorm`` for the kinds of batches.

    Raises:
        DataError: the batch is of another kind.
    """

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    match batch:
        case Tensor():
            model(moved(batch))
        case Mapping():
            model(**{name: moved(value) for name, value in batch.items()})
        case [Tensor() as inputs, *_]:
            model(moved(inputs))
        case _:
            raise DataError(
                f"a batch must be a tensor, a tuple or list starting with one, or a dict; got {type(batch).__name__}."
            )


def metric(value: SupportsFloat) -> float:
    """Return what ``evaluate`` returned as a number.

    Raises:
        WrapError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise WrapError(f"evaluate must return one number, such as an accuracy; got {value!r:.80}.") from None
