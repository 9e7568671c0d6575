"""Time contenders against each other in one run, so that their ratios mean something on a busy machine."""

# ruff: noqa: T201  a script prints
from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Rounds:
    """Seconds of each contender in each round.

    All contenders run in turn within a round, so what else the machine does falls on all alike, and seconds are the
    processor's, so waiting for other processes does not count. With several threads that is the work of all of them.
    """

    def __init__(
        self, contenders: Mapping[str, Callable[[], object]], rounds: int, least_seconds: float = 0.02
    ) -> None:
        repeats = {}
        for name, run in contenders.items():
            run()  # first calls compile and warm up
            repeats[name] = max(1, int(least_seconds / max(_seconds(run, 1), 1e-7)))
        self.rounds = [{name: _seconds(run, repeats[name]) for name, run in contenders.items()} for _ in range(rounds)]

    def seconds(self, name: str) -> float:
        """Return the median over rounds."""
        return statistics.median(times[name] for times in self.rounds)

    def ratio(self, name: str, to: str) -> float:
        """Return the median over rounds of the ratio within a round."""
        return statistics.median(times[name] / times[to] for times in self.rounds)


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def arguments(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Parse the options every benchmark has, and its own, given with their defaults."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    for name, default in {"rounds": 11, "threads": 1, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})")
    parser.add_argument("--json", type=Path, help="also write the rows, with machine and versions, to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print rows as a table, and write them where the options say."""
    machine = {
        "command": " ".join(sys.argv),
        "processor": _processor(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    widths = {key: max(len(key), *(len(_text(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
    for row in rows:
        print("  ".join(f"{_text(row[key]):>{width}}" for key, width in widths.items()))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
