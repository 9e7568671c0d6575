"""Run the benchmarks of this folder, each in a process of its own, and put their figures beside their targets.

    python tests/benchmarks/run_all.py [--only NAME ...] [--quick] [--out DIR]

Every script here is a benchmark and stands by itself; ``paired.py`` holds what they share. This file only starts them,
reads the JSON that they write and makes one table of it. It must not measure anything.
"""

# ruff: noqa: T201  a script prints
from __future__ import annotations

import argparse
import difflib
import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from regimewrap.errors import DataError
from regimewrap.files import claimed_folder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Benchmarks of one script with different options; a script that is not named here runs once, without any.
VARIANTS: dict[str, dict[str, list[str]]] = {
    "step_speed": {
        "wrn": ["--model", "wrn"],
        "wrn-batch-128": ["--model", "wrn", "--batch", "128"],
        "vit": ["--model", "vit"],
        "bert": ["--model", "bert"],
        "wrn-network": ["--model", "wrn", "--scope", "network"],
        "wrn-compiled": ["--model", "wrn", "--compile", "1"],
    },
    "serve_speed": {
        "wrn": ["--model", "wrn", "--thresholds", "1"],
        "wrn-batch-8": ["--model", "wrn", "--batch", "8", "--thresholds", "1"],
        **{model: ["--model", model, "--thresholds", "1"] for model in ("mlp", "relu", "gelu", "swiglu")},
    },
    "saved_bytes": {model: ["--model", model] for model in ("wrn", "functions", "vit", "bert")},
}
PICTURE = {"gate_scaling": "gate-scaling.png", "serve_curve": "serve-curve.png"}
ON_GPUS = {"gpu_speed"}  # left out where there is none, unless it is named
SLOW = {"step_speed-wrn-batch-128"}  # a minute a round: not part of a quick run
COMPARE = {"<=": operator.le, ">=": operator.ge}
CRASHED = 3
INTERRUPTED = 130


def run_all(only: Sequence[str] = (), *, quick: bool = False, out: Path = Path("regimewrap-bench")) -> int:
    """Run benchmarks, print their tables and one of all figures that have a target, write both to ``out``.

    Args:
        only: names of benchmarks, or of scripts for all their variants; none for all.
        quick: a fifth of the rounds, and without those that take minutes, unless they are named.
        out: folder for ``bench.md``, ``bench.json`` and pictures.

    Returns:
        0; 3 if a benchmark crashed, after the others have run; 130 after Ctrl-C, with what had ended.

    Raises:
        DataError: there is no benchmark of such a name, or ``out`` cannot be written.
    """
    chosen = choose(only, quick)
    done: list[dict[str, Any]] = []
    with claimed_folder(out):
        status = 0
        try:
            for name, command in chosen.items():
                print(f"== {name}", flush=True)
                done.append(run_one(name, command, quick, out))
        except KeyboardInterrupt:
            status = INTERRUPTED
        if done:
            (out / "bench.json").write_text(json.dumps({"commit": commit(), "benchmarks": done}, indent=1) + "\n")
            (out / "bench.md").write_text("\n".join(markdown(done)) + "\n")
            print("\n".join(aligned(verdicts(done))))
            print(f"Written: {out / 'bench.md'}, {out / 'bench.json'}")
    return status or (CRASHED if any("error" in each for each in done) else 0)


def benchmarks() -> dict[str, list[str]]:
    """Return every benchmark's name with its script and options."""
    scripts = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("paired", Path(__file__).stem))
    return {
        f"{script}-{variant}" if variant else script: [f"{script}.py", *options]
        for script in scripts
        for variant, options in VARIANTS.get(script, {"": []}).items()
    }


def choose(only: Sequence[str], quick: bool) -> dict[str, list[str]]:
    """Return the benchmarks asked for, in their order."""
    known = benchmarks()
    if not only:
        left_out = (SLOW if quick else set()) | (set() if torch.cuda.is_available() else ON_GPUS)
        return {name: command for name, command in known.items() if name not in left_out}
    names = [*known, *VARIANTS]
    for name in only:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"no benchmark is called {name!r}; choose from {', '.join(known)}.{hint}")
    return {name: command for name, command in known.items() if name in only or command[0][:-3] in only}


def run_one(name: str, command: list[str], quick: bool, out: Path) -> dict[str, Any]:
    """Run one benchmark; return what it wrote, or an ``error``: the last line that it wrote before it ended."""
    words = [*command, *(["--quick"] if quick else [])]
    picture = PICTURE.get(name)
    pictured = ["--plot", str((out / picture).resolve())] if picture else []
    before = load()
    with TemporaryDirectory() as scratch:
        written = Path(scratch) / "figures.json"
        process = subprocess.Popen(
            [sys.executable, HERE / words[0], *words[1:], "--json", written, *pictured],
            stderr=subprocess.PIPE,
            text=True,
            # The figures belong to this checkout, whatever else is installed.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        try:
            complaints = process.communicate()[1]
        finally:
            process.kill()
        record = {"name": name, "command": " ".join(["python", f"tests/benchmarks/{words[0]}", *words[1:]])}
        if process.returncode or not written.exists():
            sys.stderr.write(complaints)
            lines = [line for line in complaints.splitlines() if line.strip()] or ["it said nothing"]
            return {**record, "error": f"exit status {process.returncode}: {lines[-1].strip()}"}
        record |= json.loads(written.read_text())
    return {**record, "load before": before, "load after": load(), **({"picture": picture} if picture else {})}


def load() -> float | None:
    """Return how many processes wanted a core in the last minute, where that is known."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """Return the checkout's commit, where git tells; ``-dirty`` if files differ from it."""
    try:
        return subprocess.check_output(
            ["git", "-C", ROOT, "describe", "--always", "--dirty"],
            text=True,
            stderr=subprocess.DEVNULL,
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def verdicts(done: list[dict[str, Any]]) -> list[list[str]]:
    """Return a table of every figure that has a target; the first row names its columns."""
    table = [["benchmark", "where", "figure", "value", "target", ""]]
    for record in done:
        if "error" in record:
            table.append([record["name"], "", "", "", "", f"crashed, {record['error']}"])
        for each in record.get("tables", ()):
            for row in each["rows"]:
                where = ", ".join(f"{key} {shown(row[key])}" for key in each["by"])
                for figure, target in each["targets"].items():
                    verdict = "met" if meets(row[figure], target) else "missed"
                    table.append([record["name"], where, figure, shown(row[figure]), target, verdict])
    return table


def meets(value: float, target: str) -> bool:
    """Say whether a figure is as a target such as ``"<= 1.05"`` asks."""
    comparison, bound = target.split()
    return bool(COMPARE[comparison](value, float(bound)))


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def aligned(table: list[list[str]]) -> list[str]:
    """Return the lines of a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def markdown(done: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a page: the figures that have a target, then everything that was measured, with where."""
    yield f"# Benchmarks, commit {commit() or 'unknown'}\n"
    yield from piped(verdicts(done))
    for record in done:
        yield f"\n## {record['name']}\n"
        yield f"`{record['command']}`\n"
        if "error" in record:
            yield f"Crashed: {record['error']}"
            continue
        facts = {**record["machine"], "load before": record["load before"], "load after": record["load after"]}
        yield ", ".join(
            f"{key} {value}" for key, value in facts.items() if value is not None and key not in ("command", "load")
        )
        for each in record["tables"]:
            yield ""
            keys = list(each["rows"][0])
            yield from piped([keys, *([shown(row[key]) for key in keys] for row in each["rows"])])
        if "picture" in record:
            yield f"\n![{record['name']}]({record['picture']})"


def piped(table: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    head, *rows = table
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Run the benchmarks of this folder.")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="benchmarks, or scripts for all variants")
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds, and not those that take minutes")
    parser.add_argument("--out", type=Path, default=Path("regimewrap-bench"), help="folder for the tables")
    options = parser.parse_args()
    try:
        return run_all(options.only, quick=options.quick, out=options.out)
    except DataError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    sys.exit(main())
