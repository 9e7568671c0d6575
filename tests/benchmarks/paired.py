"""Time contenders against each other in one run, so that their ratios mean something on a busy machine."""

# ruff: noqa: T201  a script prints
from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

SEED = 0


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
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds, at least 3")
    parser.add_argument("--json", type=Path, help="also write the tables, with machine and versions, to this file")
    options = parser.parse_args()
    if options.quick:
        options.rounds = max(3, options.rounds // 5)
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    return options


def keep_memory() -> None:
    """Let the process keep the memory that it frees, so that time is not spent on new pages; glibc only.

    Otherwise each tensor above some size is mapped anew or not, from one call to the next, and touching new pages can
    cost several times what the arithmetic does.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def show(
    rows: list[dict[str, Any]],
    options: argparse.Namespace,
    *,
    by: tuple[str, ...] = (),
    targets: Mapping[str, str] | None = None,
) -> None:
    """Print rows as a table, and add them to the file that the options name.

    Args:
        rows: one dict a line, all with the same keys.
        options: as ``arguments`` returned them.
        by: the columns that say where a figure was taken; the others are figures.
        targets: what a figure should be, such as ``{"wrapped/dense": "<= 1.05"}``.
    """
    if not _shown:
        print(", ".join(f"{key} {value}" for key, value in machine(options).items() if value))
    widths = {key: max(len(key), *(len(text(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
    for row in rows:
        print("  ".join(f"{text(row[key]):>{width}}" for key, width in widths.items()))
    for key, target in (targets or {}).items():
        print(f"{key}: the target is {target}")
    _shown.append({"by": list(by), "targets": dict(targets or {}), "rows": rows})
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options), "tables": _shown}, indent=1) + "\n")


#: The tables of this process.
_shown: list[dict[str, Any]] = []


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return what figures depend on: the command, the machine and what else it does, versions."""
    words = iter(sys.argv[1:])
    shown = [word for word in words if word not in ("--json", "--plot") or not next(words, "")]
    return {
        "command": " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *shown]),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "threads": options.threads,
        "rounds": options.rounds,
        "seed": SEED,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("regimewrap", "torch", "numba", "triton", "timm", "transformers")},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def text(value: Any) -> str:
    """Return a figure as tables show it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
