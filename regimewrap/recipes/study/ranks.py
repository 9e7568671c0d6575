"""Several processes that ``torchrun`` started train each network together, a part of every batch each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist

from regimewrap.errors import RegimewrapError
from regimewrap.recipes.study.cells import make_file
from regimewrap.recipes.study.outcomes import make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from regimewrap.recipes.study.cells import Cell


def rank_of_torchrun() -> int | None:
    """Return this process's rank where ``torchrun`` started several, else ``None``."""
    return int(os.environ["RANK"]) if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ else None


def join() -> None:
    """Meet the other processes."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def follow() -> None:
    """Train along with rank 0 until it has no more cells."""
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told)
        if told[0] is None:
            dist.destroy_process_group()
            return
        cell, data = told[0]
        make(cell, data, dist.get_rank(), dist.get_world_size())


@final
class Together:
    """Rank 0's executor: makes a cell at once, with all ranks. Where one cannot, the run ends."""

    def submit(self, function: Callable[..., Any], cell: Cell, folder: str, data: str | None) -> _Done:  # noqa: ARG002
        """Make ``cell`` now."""
        said = make_file(cell, folder, data, _make_together)
        if said.startswith("failed"):
            raise RegimewrapError(f"{cell.file}: {said}; see {folder}/failed. The ranks no longer agree; run again.")
        return _Done(said)

    def stop(self) -> None:
        """Let the other ranks go."""
        dist.broadcast_object_list([None])
        dist.destroy_process_group()


@final
class _Done:
    def __init__(self, said: str) -> None:
        self._said = said

    def done(self) -> bool:
        return True

    def result(self) -> str:
        return self._said


def _make_together(cell: Cell, data: Path | None) -> dict[str, Any]:
    dist.broadcast_object_list([(cell, data)])
    return make(cell, data, 0, dist.get_world_size())
