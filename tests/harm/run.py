"""Train every task with every preset and paired seeds, and say what that did to it.

    python tests/harm/run.py [--arms dense,mixed] [--tasks CNN,Llama] [--seeds 0-4] [--workers 1] [--table]

Each cell (a task, a preset, a seed) is one training in a worker process and one file in ``tests/harm/cells``; cells
that are there are not run again. The table goes to the terminal and into ``docs/explanation/harm.md``.
"""

# ruff: noqa: T201  a script prints
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # sums over several threads round differently

from harm_cells import ARMS, CELLS, TASKS, Cell
from harm_tables import PAGE, into_page, tables

from regimewrap.files import write_whole


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arms", default=",".join(ARMS), help=f"presets, separated by commas ({', '.join(ARMS)})")
    parser.add_argument("--tasks", default="", help="parts of tasks' names, separated by commas (all)")
    parser.add_argument("--seeds", default="0-4", help="first-last; the table uses 0-4")
    parser.add_argument("--changes", default="{}", help='settings of the cycle as JSON, such as {"full_share": 0.75}')
    parser.add_argument("--cells", type=Path, default=CELLS, help="folder of the cells")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each (1)")
    parser.add_argument(
        "--table", action="store_true", help="train nothing, make the table of the cells that are there"
    )
    return parser.parse_args()


def _cells(options: argparse.Namespace) -> list[Cell]:
    """Return the cells asked for; all presets of a task and seed in a row, which share what they prepare."""
    parts = options.tasks.lower().split(",")
    tasks = [task for task in TASKS if any(part in task.lower() for part in parts)]
    first, _, last = options.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    arms = options.arms.split(",")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not tasks:
        raise SystemExit(f"no such preset: {', '.join(unknown)}" if unknown else f"no such task: {options.tasks}")
    # The dense arm has nothing to change.
    changes = {arm: "{}" if arm == "dense" else options.changes for arm in arms}
    return [Cell(task, arm, seed, changes[arm]) for seed in seeds for task in tasks for arm in arms]


def _train(cell: Cell, folder: Path) -> str:
    start = time.process_time()
    outcome = cell.run()
    outcome["seconds"] = round(time.process_time() - start, 1)
    write_whole(folder / cell.name, json.dumps(outcome) + "\n")
    values = "  ".join(f"{value:7.3f}" for value in outcome["values"].values())
    return f"{cell.task:34s} {cell.arm:15s} seed {cell.seed}  {values}  {outcome['seconds']:5.1f} s"


def main() -> None:
    """Train the cells that are missing, then make the table."""
    options = _arguments()
    options.cells.mkdir(parents=True, exist_ok=True)
    wanted = _cells(options)
    missing = [] if options.table else [cell for cell in wanted if not (options.cells / cell.name).exists()]
    print(f"{len(wanted)} cells, {len(missing)} to train")
    if missing:
        context = multiprocessing.get_context("spawn")  # forking a process that has used torch may hang
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that workers end as well
        pool = ProcessPoolExecutor(options.workers, context, os.nice, (10,))
        try:
            for done in as_completed([pool.submit(_train, cell, options.cells) for cell in missing]):
                print(done.result(), flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (options.cells / cell.name for cell in wanted)
        if path.exists()
    ]
    text = tables(found, len(wanted))
    print(text)
    if options.cells == CELLS and options.changes == "{}" and options.seeds == "0-4":
        into_page(text)
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
