"""Uses of a saved model: classes of pictures, accuracy at any budget, a file for another runtime."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from regimewrap import Sweep, at_keep_ratio, calibrate, recalibrate_batchnorm
from regimewrap import sweep as sweep_model
from regimewrap.errors import DataError, MissingExtraError, RegimewrapError
from regimewrap.files import write_whole
from regimewrap.train.pictures import batches, find_pictures, fixed_order, list_pictures, open_picture, plain_transform
from regimewrap.train.run import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from regimewrap.train.pictures import Sample
    from regimewrap.train.saved import Trained

_BATCH = 64
_TO_CALIBRATE = 256  # pictures


def predict(
    trained: Trained, pictures: Iterable[Path], keep_ratio: float, top: int = 1
) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """Yield each picture with its likeliest classes and their probabilities, 0..1.

    Args:
        trained: from ``saved.load``.
        pictures: files.
        keep_ratio: the budget, in (0, 1].
        top: how many classes.

    Raises:
        DataError: a picture is damaged or missing.
        PolicyError: the ratio is outside (0, 1].
    """
    device = next(trained.model.parameters()).device
    for path in pictures:
        x = trained.prepare(open_picture(path)).unsqueeze(0).to(device)
        with torch.no_grad(), at_keep_ratio(trained.model, keep_ratio):
            shares = trained.model(x).float().softmax(1)[0]
        best = shares.topk(min(top, len(trained.classes)))
        yield path, [(trained.classes[n], p) for n, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def sweep(
    trained: Trained,
    keep_ratios: Sequence[float],
    data: Path | None = None,
    *,
    workers: int = 0,
    recalibrate: bool = False,
) -> Sweep:
    """Return the accuracy at each keep ratio.

    Args:
        trained: from ``saved.load``.
        keep_ratios: fractions in (0, 1].
        data: a folder as for training, of which the validation pictures count, or with a folder for each class, all of
            which count; by default the validation pictures of the training.
        workers: processes that read pictures.
        recalibrate: re-estimate BatchNorm's statistics for each budget, on pictures of the training; the model keeps
            those of the last one.

    Raises:
        DataError: there are no pictures, or one of a class that the model does not know.
        WrapError: ``recalibrate``, and the model has no BatchNorm.
    """
    samples = _samples(trained, data, training=False)

    def accuracy(model: nn.Module) -> float:
        return evaluate(model, _feed(trained, samples, workers))[1]

    if not recalibrate:
        return sweep_model(trained.model, accuracy, keep_ratios)
    inputs = _some_inputs(trained)
    values: dict[float, float] = {}
    for ratio in keep_ratios:
        recalibrate_batchnorm(trained.model, inputs, ratio)
        values |= sweep_model(trained.model, accuracy, [ratio]).values
    return Sweep(values)


def export_onnx(trained: Trained, path: Path, keep_ratio: float = 1.0, data: Path | None = None) -> None:
    """Write the model at one budget as ONNX: input (n, 3, height, width), output (n, classes), any n.

    Below the full budget a fixed threshold at each site stands in for the selection (see ``calibrate``), found on
    training pictures.

    Args:
        trained: from ``saved.load``.
        path: of the file.
        keep_ratio: the budget, in (0, 1].
        data: the folder of pictures; by default that of the training.

    Raises:
        MissingExtraError: onnx or onnxscript is missing.
        DataError: there are no pictures, or the file cannot be written.
        RegimewrapError: torch cannot export the model.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "onnx") from None
    model, size = trained.model, trained.look["input_size"]
    x = torch.zeros(2, *size, device=next(model.parameters()).device)
    dynamic = ({0: torch.export.Dim("batch")},)
    with _fixed(trained, keep_ratio, data):
        try:
            program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
        except Exception as error:  # the exporter raises many kinds
            raise RegimewrapError(f"torch cannot export {trained.about['model']} to ONNX: {error!r:.300}") from error
    assert program is not None  # noqa: S101 - it is for exports to files
    made = program.model_proto
    facts = {"classes": "\n".join(trained.classes), "keep_ratio": f"{keep_ratio:g}"}
    onnx.helper.set_model_props(made, {**facts, **{name: str(value) for name, value in trained.look.items()}})
    write_whole(path, made.SerializeToString())


def _fixed(trained: Trained, keep_ratio: float, data: Path | None) -> AbstractContextManager[object]:
    """Return a context in which fixed thresholds stand in for the selection."""
    if keep_ratio == 1.0:
        return nullcontext()
    calibration = calibrate(trained.model, _some_inputs(trained, data), keep_ratios=(keep_ratio,))
    return calibration.apply(trained.model, keep_ratio)


def _some_inputs(trained: Trained, data: Path | None = None) -> list[Tensor]:
    """Return batches of a few hundred training pictures of all classes."""
    samples = _samples(trained, data, training=True)
    samples = samples[:: max(1, len(samples) // _TO_CALIBRATE)][:_TO_CALIBRATE]
    return [x for x, _ in _feed(trained, samples)]


def _samples(trained: Trained, data: Path | None, *, training: bool) -> list[Sample]:
    folder = Path(trained.about["data"]) if data is None else data
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; pass the folder of pictures.")
    whole = (folder / "train").is_dir() or folder.resolve() == Path(trained.about["data"]).resolve()
    if whole:
        pictures = find_pictures(folder)
        part = pictures.train if training else pictures.val
        named = [(path, pictures.classes[label]) for path, label in part]
    else:
        named = list_pictures(folder)
    numbers = {name: number for number, name in enumerate(trained.classes)}
    if unknown := sorted({name for _, name in named} - numbers.keys()):
        raise DataError(
            f"{folder} has class {unknown[0]}, which the model does not know; it knows {', '.join(numbers)}."
        )
    return [(path, numbers[name]) for path, name in named]


def _feed(trained: Trained, samples: Sequence[Sample], workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(trained.model.parameters()).device
    order = fixed_order(len(samples), _BATCH)
    return batches(samples, plain_transform(trained.look), order, workers=workers, device=device)
