"""``regimewrap train``, ``predict``, ``sweep`` and ``export``: arguments to calls. No work of their own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from regimewrap.files import terminal_width
from regimewrap.policy.policy import PRESETS, RegimePolicy, require_ratio
from regimewrap.recipes.workers import default_workers

POLICY_HELP = f"A preset ({', '.join(PRESETS)}), scaled to the run, or a policy file."
_RUN_HELP = "Folder or .pt file that train left."
_RATIOS_HELP = "Budgets to evaluate at, in (0, 1], with commas."
_RATIOS = "1,0.5,0.2,0.1"


def train(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Folder: train/ and val/ with a folder a class, or a folder a class.")],
    model: Annotated[str, typer.Option(help="Any model of timm, such as resnet18.")],
    policy: Annotated[str, typer.Option(help=POLICY_HELP)] = "mixed",
    out: Annotated[Path, typer.Option(help="Folder for model.pt and summary.csv.")] = Path("regimewrap-train"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training pictures.")] = 30,
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures in an update.")] = 64,
    img_size: Annotated[int | None, typer.Option(min=8, help="Height and width; else the model's own.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Begin with timm's weights.")] = False,
    model_kwargs: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For timm, repeatable.")] = None,
    opt: Annotated[str, typer.Option(help="An optimizer of timm's.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Largest learning rate; it falls along a cosine.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of the optimizer.")] = 0.05,
    warmup_epochs: Annotated[float, typer.Option(min=0, help="Epochs in which the learning rate rises.")] = 1.0,
    clip_grad: Annotated[float | None, typer.Option(min=0, help="Largest norm of the gradient.")] = None,
    smoothing: Annotated[float, typer.Option(min=0, max=0.99, help="Of the labels.")] = 0.0,
    ema: Annotated[float | None, typer.Option(min=0, max=1, help="Average weights; the share of the past.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Compute in bfloat16 where that is safe.")] = False,
    augment: Annotated[bool, typer.Option(help="Crop, flip and so on at random.")] = True,
    crop_scale: Annotated[float, typer.Option(min=0.01, max=1, help="Least share of a picture in a crop.")] = 0.35,
    hflip: Annotated[float, typer.Option(min=0, max=1, help="Share of pictures that are mirrored.")] = 0.5,
    color_jitter: Annotated[float, typer.Option(min=0, help="How far colours change.")] = 0.0,
    aa: Annotated[str | None, typer.Option(help="timm's auto-augment, such as rand-m9-mstd0.5.")] = None,
    re_prob: Annotated[float, typer.Option(min=0, max=1, help="Share of pictures with a part erased.")] = 0.0,
    mixup: Annotated[float, typer.Option(min=0, help="Alpha of mixup; 0 is without.")] = 0.0,
    keep_ratios: Annotated[str, typer.Option(help=_RATIOS_HELP)] = _RATIOS,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of weights, order and augmentation.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many runs, with seeds from --seed on.")] = 1,
    compare: Annotated[bool, typer.Option("--compare", help="Train a dense twin with each run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on, or begin if there is no checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read pictures.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.")] = None,
) -> int:
    """Train a model on your pictures while its budget moves; leave one file that predicts at every budget."""
    # Imported here, as in the commands below, so that the others need not wait for timm.
    from regimewrap.train.folder import Folder
    from regimewrap.train.settings import settings_from

    settings = settings_from({**context.params, "keep_ratios": _ratios(keep_ratios)})
    folder = Folder(
        out,
        data,
        settings,
        RegimePolicy.of(policy),
        seeds=range(seed, seed + seeds),
        compare=compare,
        device=_device(device),
        workers=default_workers() if workers is None else workers,
        say=_say,
        show=_show,
    )
    status = folder.train(resume=resume, overwrite=overwrite)
    if status:
        words = [word for word in context.obj if word not in ("--resume", "--overwrite")]
        _say(f"Go on with: {shlex.join(['regimewrap', *words, '--resume'])}")
    else:
        _say(f"{folder.table(terminal_width())}\nModel: {out / 'model.pt'}.")
        _say(f"Try: regimewrap predict {out} PICTURE --keep-ratio 0.1")
    return status


def predict(
    run: Annotated[Path, typer.Argument(help=_RUN_HELP)],
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Files.")],
    keep_ratio: Annotated[float, typer.Option(help="The budget, in (0, 1].")] = 1.0,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 1,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.")] = None,
) -> None:
    """Say which classes pictures are of, at any budget."""
    from regimewrap.train import saved, uses

    for path, classes in uses.predict(saved.load(run, _device(device)), pictures, keep_ratio, top):
        typer.echo(f"{path}: {', '.join(f'{name} {100 * share:.1f} %' for name, share in classes)}")


def sweep(
    run: Annotated[Path, typer.Argument(help=_RUN_HELP)],
    data: Annotated[Path | None, typer.Argument(help="Folder of pictures; else the training's.")] = None,
    keep_ratios: Annotated[str, typer.Option(help=_RATIOS_HELP)] = "1,0.5,0.3,0.2,0.1,0.05",
    recalibrate: Annotated[bool, typer.Option("--recalibrate", help="Re-estimate BatchNorm at each.")] = False,
    save: Annotated[Path | None, typer.Option(help="A .csv or .json file for the figures.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read pictures.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.")] = None,
) -> None:
    """Show the accuracy on pictures at each budget."""
    from regimewrap.train import saved, uses

    readers = default_workers() if workers is None else workers
    trained = saved.load(run, _device(device))
    swept = uses.sweep(trained, _ratios(keep_ratios), data, workers=readers, recalibrate=recalibrate)
    typer.echo(swept)
    if save is not None:
        swept.save(save)


def export(
    run: Annotated[Path, typer.Argument(help=_RUN_HELP)],
    onnx: Annotated[Path, typer.Option(help="The file to write.")],
    data: Annotated[Path | None, typer.Option(help="Pictures to find thresholds on.")] = None,
    keep_ratio: Annotated[float, typer.Option(help="The budget, in (0, 1].")] = 1.0,
) -> None:
    """Write a trained model at one budget as ONNX."""
    from regimewrap.train import saved, uses

    uses.export_onnx(saved.load(run), onnx, keep_ratio, data)
    typer.echo(f"Written: {onnx}, at keep ratio {keep_ratio:g}.")


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(require_ratio("--keep-ratios", float(part)) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected {_RATIOS} or the like; got {text}", param_hint="'--keep-ratios'") from None


def _device(name: str | None) -> torch.device:
    try:
        return torch.zeros(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise typer.BadParameter(str(error).partition("\n")[0], param_hint="'--device'") from None


def _say(line: str) -> None:
    """Print a line that stays."""
    typer.echo(f"\r\x1b[K{line}" if sys.stdout.isatty() else line)


def _show(line: str) -> None:
    """Print, in a terminal, a line that the next one takes the place of."""
    if sys.stdout.isatty():
        typer.echo(f"\r\x1b[K{line[: (terminal_width() or 80) - 1]}", nl=False)
