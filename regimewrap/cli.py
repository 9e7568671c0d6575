"""The command line: arguments to calls, errors to one line and an exit status. No work of its own.

0 is success, 1 a reader of the output that left, 2 a mistake of the user or something missing, 130 Ctrl-C, 143 SIGTERM.
What was wrong goes to standard error.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from regimewrap import __version__
from regimewrap.errors import NoSitesError, RegimewrapError
from regimewrap.files import claimed_folder, terminal_width
from regimewrap.policy.policy import RegimePolicy, require_ratio
from regimewrap.recipes.data import load_data
from regimewrap.recipes.demo import DEMO_WORK, demo_experiment, demo_jobs
from regimewrap.recipes.models import load_model
from regimewrap.recipes.study.commands import app as study_app
from regimewrap.recipes.workers import default_workers, train_jobs
from regimewrap.report import conclusion, console_table, write_report
from regimewrap.serve.bench import bench, with_memory
from regimewrap.train import commands as train_commands
from regimewrap.wrap import plan as make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regimewrap.report.results import Experiment, Run

# Every version of typer raises click's own exceptions, but not every one has click under that name.
_ClickError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_INTERRUPTED = 130

app = typer.Typer(add_completion=False, help="Train one PyTorch network across many activation budgets.")
policy_app = typer.Typer(help="Show and check policies.")
app.add_typer(policy_app, name="policy")
app.add_typer(study_app, name="study")


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


for _command in (train_commands.train, train_commands.predict, train_commands.export):
    app.command()(_command)
app.command("sweep")(train_commands.sweep)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or PACKAGE.MODULE:CALLABLE.")],
    policy: Annotated[str, typer.Option(help=train_commands.POLICY_HELP)] = "mixed",
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
        timed = bench(built, torch.randn(each, *sizes), keep_ratio, rounds=rounds)
        typer.echo(f"{timed.text(terminal_width())}\n")
    return 0


@policy_app.command("show")
def policy_show(
    policy: Annotated[str, typer.Argument(help=train_commands.POLICY_HELP)] = "mixed",
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


def _outcome(run: Run) -> str:
    figures = ", ".join(f"{100 * value:.1f} % at {ratio}" for ratio, value in run.accuracy.items())
    return f"{figures}; cycles {run.cycles}; {run.train_seconds:.1f} s"


def _report(experiment: Experiment, out: Path) -> None:
    write_report(experiment, out)
    typer.echo(console_table(experiment, terminal_width()))
    typer.echo(conclusion(experiment))
    typer.echo(f"Report: {out / 'report.html'}")


def _whole_numbers(option: str, text: str) -> list[int]:
    words = text.replace("x", ",").split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{text!r} is not whole numbers with commas.", param_hint=f"'{option}'")
    return [int(word) for word in words]


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
