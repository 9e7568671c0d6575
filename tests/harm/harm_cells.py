"""One cell: a task, a preset and a seed. Its file is named by everything that decides its outcome."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import deep_tasks
import image_tasks
import small_data
import table_tasks
import text_tasks
import torch
import trial
import view_tasks
from torch import nn

import regimewrap

HOME = Path(__file__).parent
CELLS = HOME / "cells"
TASKS = {**image_tasks.TASKS, **deep_tasks.TASKS, **table_tasks.TASKS, **view_tasks.TASKS, **text_tasks.TASKS}
ARMS = ("dense", "mixed", "sawtooth", "loss-reset", "accuracy-reset", "accuracy-relax")


@dataclass(frozen=True)
class Cell:
    """One training; ``changes`` are settings of the cycle that differ from the preset's."""

    task: str
    arm: str
    seed: int
    changes: str = "{}"

    @property
    def policy(self) -> regimewrap.RegimePolicy:
        return regimewrap.RegimePolicy.preset(self.arm).replace(cycle=json.loads(self.changes))

    @property
    def name(self) -> str:
        """Words to read, then a hash of the task's code and settings, of the seed, and of what the rule does."""
        known = json.dumps([self.task, self.seed, _task(self.task), _rule(self.arm, self.changes)])
        words = "-".join(re.findall(r"[a-z0-9]+", f"{self.task} {self.arm} {self.seed}".lower()))
        return f"{words}-{hashlib.sha256(known.encode()).hexdigest()[:10]}.json"

    def run(self) -> dict[str, Any]:
        """Train and return what the file holds."""
        torch.set_num_threads(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = trial.run(TASKS[self.task](self.seed), self.policy, self.seed)
        words = {"task": self.task, "arm": self.arm, "seed": self.seed, "changes": json.loads(self.changes)}
        return {**words, **outcome, "warnings": sorted({str(each.message)[:200] for each in caught})}


@cache
def _task(task: str) -> list[Any]:
    """Return the code that a task runs, without comments, imports and the list of tasks, and the task's settings."""
    build = TASKS[task]
    settings: dict[str, Any] = {}
    while isinstance(build, partial):
        settings, build = {**build.keywords, **settings}, build.func
    code = []
    for path in (trial.__file__, small_data.__file__, HOME / f"{build.__module__}.py"):
        module = ast.parse(Path(path).read_text(encoding="utf-8"))
        body = [node for node in module.body if not isinstance(node, ast.Assign | ast.Import | ast.ImportFrom)]
        code.append(hashlib.sha256("".join(map(ast.dump, body)).encode()).hexdigest())
    return [build.__name__, settings, code]


@cache
def _rule(arm: str, changes: str) -> str:
    """Return a hash of which units a preset keeps in a run of 480 updates: its version, as behaviour.

    The inputs are whole numbers and a signal that falls and comes back, so that every machine gets the same.
    """
    policy = Cell("", arm, 0, changes).policy
    model = regimewrap.wrap(nn.Sequential(nn.ReLU()), policy)
    cycler = regimewrap.RegimeCycler(model, total_steps=480)
    x = (torch.arange(6 * 64) * 37 % (6 * 64) + 1.0).view(6, 64)
    kept = hashlib.sha256()
    for update in range(480):
        kept.update((model(x) != 0).numpy().tobytes())
        share = 1 - math.exp(-update / 100) - 0.25 * (update % 60 > 50)
        cycler.step(2 - 2 * share, accuracy=share)
    return kept.hexdigest()
