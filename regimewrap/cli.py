"""The command line: arguments to calls, errors to one line and an exit status. No work of its own.

0 is success, 1 a reader of the output that left, 2 a mistake of the user or something missing, 130 Ctrl-C, 143 SIGTERM.
What was wrong goes to standard error.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from regimewrap._version import __version__
from regimewrap.errors import MissingExtraError, NoSitesError, RegimewrapError
from regimewrap.files import claimed_folder
from regimewrap.policy.policy import PRESETS, RegimePolicy, require_ratio
from regimewrap.recipes.data import load_data
from regimewrap.recipes.demo import DEMO_WORK, demo_experiment, demo_jobs
from regimewrap.recipes.models import load_model
from regimewrap.recipes.study.commands import app as study_app
from regimewrap.recipes.workers import default_workers, train_jobs
from regimewrap.report import conclusion, console_table, write_report
from regimewrap.serve.bench import bench, with_memory
from regimewrap.wrap import plan as make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regimewrap.report.results import Experiment, Run

# Every version of typer raises click's own exceptions, but not every one has click under that name.
_ClickError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_INTERRUPTED = 130

_RUN_HELP = "Folder or .pt file that train left."
_RATIOS_HELP = "Budgets to evaluate at, in (0, 1], with commas."
_RATIOS = "1,0.5,0.2,0.1"

app = typer.Typer(add_completion=False, help="Train one PyTorch network across many activation budgets.")
policy_app = typer.Typer(help="Show and check policies.")
app.add_typer(policy_app, name="policy")
app.add_typer(study_app, name="study")

_POLICY_HELP = f"A preset ({', '.join(PRESETS)}), scaled to the run, or a policy file."


def run(arguments: Sequence[str]) -> int:
    """Run one command; return the exit status. Errors are printed, one line a problem, never a traceback."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = app(args=list(arguments), prog_name="regimewrap", standalone_mode=False, obj=list(arguments))
            sys.stdout.flush()
        except _ClickError as error:
            return _failed(f"{error.format_message().rstrip('.')}. See --help.")
        except RegimewrapError as error:
            return _failed(str(error))
        except torch.OutOfMemoryError:
            return _failed("the GPU's memory is full. Choose smaller batches with --batch-size.")
        except OSError as error:
            return _output_lost(error)
        except (KeyboardInterrupt, typer.Abort):
            return _INTERRUPTED
    return status if isinstance(status, int) else 0


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"regimewrap {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("regimewrap-demo"),
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each arm.")] = 8,
) -> int:
    """Train one small network on digits for many budgets, and a dense twin. Write a report."""
    _require_plotting()
    with claimed_folder(out):
        data = load_data(DEMO_WORK.source, limit=DEMO_WORK.limit)
        jobs = demo_jobs(range(seeds))
        workers = min(default_workers(), len(jobs))
        arms = ", ".join(dict.fromkeys(job.arm for job in jobs))
        typer.echo(f"{DEMO_WORK.settings.arch}, {len(data.train)} digits; {arms}: {len(jobs)} runs, {workers} at once.")
        runs: list[Run] = []
        interrupted = False
        try:
            for job, made in train_jobs(jobs, DEMO_WORK, workers):
                runs.append(made)
                name = f"{job.arm}, seed {job.seed}"
                typer.echo(f"{len(runs):>3}/{len(jobs)}  {name:<24}  {_outcome(made)}")
        except KeyboardInterrupt:
            interrupted = True
            if not runs:
                typer.echo("Interrupted before a run had ended; nothing was written.")
                return _INTERRUPTED
        command = f"regimewrap demo --seeds {seeds}"
        _report(demo_experiment(runs, DEMO_WORK, data, command, interrupted=interrupted), out)
    return _INTERRUPTED if interrupted else 0


@app.command()
def train(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Folder: train/ and val/ with a folder a class, or a folder a class.")],
    model: Annotated[str, typer.Option(help="Any model of timm, such as resnet18.")],
    policy: Annotated[str, typer.Option(help=_POLICY_HELP)] = "mixed",
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
        _say(f"{folder.table(_width())}\nModel: {out / 'model.pt'}.")
        _say(f"Try: regimewrap predict {out} PICTURE --keep-ratio 0.1")
    return status


@app.command()
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


@app.command("sweep")
def sweep_command(
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


@app.command()
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


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or PACKAGE.MODULE:CALLABLE.")],
    policy: Annotated[str, typer.Option(help=_POLICY_HELP)] = "mixed",
) -> int:
    """Show which activations of a model would be gated, and why. Changes nothing."""
    chosen = RegimePolicy.of(policy)
    planned = make_plan(load_model(model), chosen)
    if not planned.rows:
        raise NoSitesError(f"{model} has no activation that is known; there is nothing to gate.")
    typer.echo(str(planned))
    if planned.unreachable:
        count = len(planned.unreachable)
        typer.echo(f"wrap would refuse: {count} selected cannot be gated. Exclude them, or pass it strict=False.")
    elif not planned.gated:
        raise NoSitesError("the policy selects none of these activations. Widen sites.kinds or sites.include.")
    return 0


@app.command("bench")
def bench_command(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or PACKAGE.MODULE:CALLABLE.")],
    keep_ratio: Annotated[float, typer.Option(help="The budget to serve at.")] = 0.1,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    size: Annotated[str, typer.Option("--input", help="Size of one input, without the batch.")] = "3,224,224",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; else torch's own number.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Forward passes of each, in turn.")] = 15,
) -> int:
    """Time a model on this machine: dense, by its rivals, and served at a budget. Weights are random."""
    require_ratio("--keep-ratio", keep_ratio)
    sizes, batches = _whole_numbers("--input", size), _whole_numbers("--batch", batch)
    if threads is not None:
        torch.set_num_threads(threads)
    built = with_memory(load_model(model))
    for each in batches:
        typer.echo(f"{bench(built, torch.randn(each, *sizes), keep_ratio, rounds=rounds)}\n")
    return 0


@policy_app.command("show")
def policy_show(
    policy: Annotated[str, typer.Argument(help=_POLICY_HELP)] = "mixed",
    steps: Annotated[int | None, typer.Option(min=1, help="Rescale a preset to a run of so many updates.")] = None,
) -> None:
    """Print a policy as YAML, ready for a file."""
    typer.echo(RegimePolicy.of(policy, steps).to_yaml(), nl=False)


@policy_app.command("validate")
def policy_validate(file: Annotated[Path, typer.Argument(help="A policy file, .yaml or .json.")]) -> None:
    """Check a policy file."""
    cycle = RegimePolicy.from_file(file).cycle
    typer.echo(f"{file} is valid: {cycle.strategy.kind} on {cycle.monitor}, a decision every {cycle.every} updates.")


@policy_app.command("schema")
def policy_schema() -> None:
    """Print the JSON schema of policy files."""
    typer.echo(json.dumps(RegimePolicy.json_schema(), indent=2))


def _require_plotting() -> None:
    # Asked before training: the report is drawn after it.
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "cli")


def _outcome(run: Run) -> str:
    figures = ", ".join(f"{100 * value:.1f} % at {ratio}" for ratio, value in run.accuracy.items())
    return f"{figures}; cycles {run.cycles}; {run.train_seconds:.1f} s"


def _report(experiment: Experiment, out: Path) -> None:
    write_report(experiment, out)
    typer.echo(console_table(experiment, _width()))
    typer.echo(conclusion(experiment))
    typer.echo(f"Report: {out / 'report.html'}")


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(require_ratio("--keep-ratios", float(part)) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected {_RATIOS} or the like; got {text}", param_hint="'--keep-ratios'") from None


def _whole_numbers(option: str, text: str) -> list[int]:
    words = text.replace("x", ",").split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{text!r} is not whole numbers with commas.", param_hint=f"'{option}'")
    return [int(word) for word in words]


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
        typer.echo(f"\r\x1b[K{line[: (_width() or 80) - 1]}", nl=False)


def _width() -> int | None:
    """Return the terminal's columns; ``None`` where nobody looks at one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"Warning: {' '.join(str(message).split())}\n")


def _failed(text: str) -> int:
    for line in text.splitlines():
        sys.stderr.write(f"Error: {line}\n")
    return 2


def _output_lost(error: OSError) -> int:
    """Say why standard output cannot be written, and keep Python from trying once more on its way out."""
    with contextlib.suppress(OSError, ValueError):  # no file at all behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        return 1
    return _failed(f"{error.filename or 'standard output'} cannot be used: {error.strerror or error}.")
