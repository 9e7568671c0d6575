"""The command line: arguments to calls, errors to one line and an exit status. No work of its own.

0 is success, 1 a reader of the output that left, 2 a mistake of the user or something missing, 3 a benchmark that
crashed, 130 Ctrl-C. What was wrong goes to standard error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from regimewrap._version import __version__
from regimewrap.errors import DataError, MissingExtraError, NoSitesError, RegimewrapError
from regimewrap.policy.policy import PRESETS, RegimePolicy
from regimewrap.recipes.data import load_data
from regimewrap.recipes.demo import DEMO_WORK, demo_experiment, demo_jobs
from regimewrap.recipes.live import CountBar, RunsBar, describe, say, stdout_console, stopping_on_interrupt, working
from regimewrap.recipes.models import load_model
from regimewrap.recipes.outputs import claimed_folder, save_weights
from regimewrap.recipes.records import device_text, versions
from regimewrap.recipes.study.commands import app as study_app
from regimewrap.recipes.training import TrainSettings, build_model, train_run
from regimewrap.recipes.wide_resnet import parse_arch
from regimewrap.recipes.workers import default_workers, train_jobs
from regimewrap.report import conclusion, console_table, write_report
from regimewrap.report.results import Arm, Experiment, Run
from regimewrap.wrap import plan as make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from regimewrap.recipes.data import ImageData
    from regimewrap.recipes.training import Status, Trained

# Every version of typer raises click's own exceptions, but not every one has click under that name.
_ClickError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_INTERRUPTED = 130
_FEWEST_STEPS = 800

app = typer.Typer(add_completion=False, help="Train one PyTorch network across many activation budgets.")
policy_app = typer.Typer(help="Show and check policies.")
app.add_typer(policy_app, name="policy")
app.add_typer(study_app, name="study")

_POLICY_HELP = f"A preset ({', '.join(PRESETS)}), rescaled to the run, or a policy file."


def run(arguments: Sequence[str]) -> int:
    """Run one command; return the exit status. Errors are printed, one line a problem, never a traceback."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = app(args=list(arguments), prog_name="regimewrap", standalone_mode=False)
        except _ClickError as error:
            return _failed(f"{error.format_message().rstrip('.')}. See --help.")
        except RegimewrapError as error:
            return _failed(str(error))
        except torch.OutOfMemoryError:
            return _failed("the GPU's memory is full. Choose smaller batches with --batch-size.")
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
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each arm.")] = 5,
) -> int:
    """Train one small network on digits: dense, and with two policies that move its budget. Write a report."""
    _require_plotting()
    console = stdout_console()
    with claimed_folder(out):
        data = load_data(DEMO_WORK.source, limit=DEMO_WORK.limit)
        jobs = demo_jobs(DEMO_WORK, len(data.train), range(seeds))
        workers = min(default_workers(), len(jobs))
        arms = ", ".join(dict.fromkeys(job.arm for job in jobs))
        say(
            console,
            f"{DEMO_WORK.settings.arch}, {len(data.train)} digits; {arms}: {len(jobs)} runs, {workers} at once.",
        )
        runs: list[Run] = []
        interrupted = False
        try:
            with RunsBar(console, len(jobs)) as bar:
                for job, message in train_jobs(jobs, DEMO_WORK, workers):
                    name = f"{job.arm}, seed {job.seed}"
                    if isinstance(message, Run):
                        runs.append(message)
                        bar.finish(name, f"{len(runs):>3}/{len(jobs)}  {name:<24}  {_outcome(message)}")
                    else:
                        bar.update(name, message)
        except KeyboardInterrupt:
            interrupted = True
            if not runs:
                say(console, "Interrupted before a run had ended; nothing was written.")
                return _INTERRUPTED
        command = f"regimewrap demo --seeds {seeds}"
        _report(console, demo_experiment(runs, DEMO_WORK, data, command, interrupted=interrupted), out)
    return _INTERRUPTED if interrupted else 0


@app.command()
def train(
    data: Annotated[str, typer.Option(help="digits, cifar10, or a folder or zip with train/ and test/ of images.")],
    arch: Annotated[str, typer.Option(help="wrn-DEPTH-WIDTH; DEPTH is 6n + 4.")] = "wrn-16-2",
    policy: Annotated[str, typer.Option(help=_POLICY_HELP)] = "loss-reset",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in an update.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = 0.1,
    limit: Annotated[int | None, typer.Option(min=1, help="Most training images, and most test images.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of weights, order, and the draw of --limit.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report and the weights.")] = Path("regimewrap-train"),
) -> int:
    """Train a wide residual network on images while its budget moves as the policy says. Write a report."""
    if not 0 < lr < float("inf"):
        raise typer.BadParameter(f"{lr:g} is not a positive number.", param_hint="'--lr'")
    parse_arch(arch)
    _policy_named(policy)
    _require_plotting()
    console = stdout_console()
    settings = TrainSettings(arch=arch, epochs=epochs, batch_size=batch_size, lr=lr)
    with claimed_folder(out):
        with CountBar(console, "reading images") as reading:
            images = load_data(data, limit=limit, test_limit=limit, seed=seed, on_progress=reading)
        say(console, f"Data: {images.about}.")
        trained, arm = _train_one(console, images, policy, settings, seed)
        options = {
            "--data": data,
            "--arch": arch,
            "--policy": policy,
            "--epochs": epochs,
            "--batch-size": batch_size,
            "--lr": lr,
            "--limit": limit,
            "--seed": seed,
        }
        shown = [str(word) for option in options.items() if option[1] is not None for word in option]
        total = settings.total_steps(len(images.train))
        interrupted = trained.updates < total
        record = {"data": images.about, **settings.as_record(), "updates": total}
        if interrupted:
            record["interrupted"] = f"after update {trained.updates} of {total}"
        experiment = Experiment(
            title=f"{arch} on {data}",
            command=shlex.join(["regimewrap", "train", *shown]),
            settings=record,
            versions=versions(),
            device=device_text(next(trained.model.parameters()).device),
            arms=[arm],
            runs=[trained.run],
        )
        save_weights(trained.model, out / "model.pt")
        _report(console, experiment, out)
    return _INTERRUPTED if interrupted else 0


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or PACKAGE.MODULE:CALLABLE.")],
    policy: Annotated[str, typer.Option(help=_POLICY_HELP)] = "loss-reset",
) -> int:
    """Show which activations of a model would be gated, and why. Changes nothing."""
    chosen = _policy_named(policy)
    with working(f"planning {model}"):
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


@app.command()
def bench(
    only: Annotated[list[str] | None, typer.Option(help="A benchmark's name; give it once for each.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, and not those that take minutes.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("regimewrap-bench"),
) -> int:
    """Measure what the gate costs, beside the targets. From a checkout: it runs the scripts in tests/benchmarks/."""
    script = Path(__file__).parents[1] / "tests" / "benchmarks" / "run_all.py"
    if not script.is_file():
        raise DataError(
            f"bench runs the scripts of a checkout, and there are none beside {Path(__file__).parent}. "
            "Run python -m regimewrap bench in the top folder of a checkout."
        )
    spec: Any = importlib.util.spec_from_file_location("regimewrap_benchmarks", script)
    benchmarks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmarks)
    status: int = benchmarks.run_all(only or (), quick=quick, out=out)
    return status


@policy_app.command("show")
def policy_show(
    policy: Annotated[str, typer.Argument(help=_POLICY_HELP)] = "loss-reset",
    steps: Annotated[int | None, typer.Option(min=1, help="Rescale a preset to a run of so many updates.")] = None,
) -> None:
    """Print a policy as YAML, ready for a file."""
    typer.echo(_policy_named(policy, steps).to_yaml(), nl=False)


@policy_app.command("validate")
def policy_validate(file: Annotated[Path, typer.Argument(help="A policy file, .yaml or .json.")]) -> None:
    """Check a policy file."""
    cycle = RegimePolicy.from_file(file).cycle
    typer.echo(f"{file} is valid: {cycle.strategy.kind} on {cycle.monitor}, a decision every {cycle.every} updates.")


@policy_app.command("schema")
def policy_schema() -> None:
    """Print the JSON schema of policy files."""
    typer.echo(json.dumps(RegimePolicy.json_schema(), indent=2))


def _train_one(
    console: Console, images: ImageData, policy: str, settings: TrainSettings, seed: int
) -> tuple[Trained, Arm]:
    total = settings.total_steps(len(images.train))
    chosen = _policy_named(policy, max(total, _FEWEST_STEPS))
    say(console, str(make_plan(build_model(settings.arch, images), chosen)).splitlines()[0] + ".")
    decisions = total // chosen.cycle.every
    say(console, f"{total} updates; the policy decides every {chosen.cycle.every}, so {decisions} times.")
    arm = Arm(
        name=policy if policy in PRESETS else Path(policy).stem,
        about=f"Strategy {chosen.cycle.strategy.kind}, watching {chosen.cycle.monitor}.",
        policy=chosen.model_dump(mode="json"),
    )
    began = time.monotonic()

    def show(status: Status) -> None:
        bar.update(arm.name, status)
        if status.epoch_done:
            epoch = f"epoch {status.epoch:>{len(str(settings.epochs))}}/{settings.epochs}"
            bar.say(f"{epoch}  {describe(status)}  {time.monotonic() - began:.1f} s")

    def stopping() -> None:
        bar.say("Stopping after this update, then evaluating; Ctrl-C again leaves at once.")

    with RunsBar(console) as bar, stopping_on_interrupt(stopping) as asked:
        trained = train_run(
            arm.name,
            chosen,
            images,
            settings,
            seed=seed,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            on_step=show,
            on_evaluate=bar.evaluated,
            should_stop=asked,
        )
    return trained, arm


def _policy_named(name: str, total_steps: int | None = None) -> RegimePolicy:
    """Return a preset, rescaled, or the policy in a file as it is."""
    looks_like_file = name not in PRESETS and (Path(name).suffix or os.sep in name or os.path.lexists(name))
    return RegimePolicy.from_file(name) if looks_like_file else RegimePolicy.preset(name, total_steps)


def _require_plotting() -> None:
    # Asked before training: the report is drawn after it.
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "cli")


def _outcome(run: Run) -> str:
    figures = ", ".join(f"{100 * value:.1f} % at {ratio}" for ratio, value in run.accuracy.items())
    return f"{figures}; cycles {run.cycles}; {run.train_seconds:.1f} s"


def _report(console: Console, experiment: Experiment, out: Path) -> None:
    with working("writing the report"):
        write_report(experiment, out)
    console.print(console_table(experiment))
    say(console, conclusion(experiment))
    say(console, f"Report: {out / 'report.html'}")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"Warning: {' '.join(str(message).split())}\n")


def _failed(text: str) -> int:
    for line in text.splitlines():
        sys.stderr.write(f"Error: {line}\n")
    return 2
