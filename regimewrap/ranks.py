"""What the ranks of one run tell each other, and which of them is missing when that fails.

A decision takes one reduction and one broadcast in the default process group, on any backend; nothing is exchanged in
between. Before a decision a rank leaves a mark in the process group's store (a message without an answer), so that when
it fails or times out, those that never came can be named. No policy and no gate is known here.
"""

from __future__ import annotations

import time
import zlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from regimewrap.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: How long a rank whose exchange failed waits for signs of life from the others, in seconds.
GRACE_S = 3.0
_FAILED = " failed"


def world_size() -> int:
    """Return the number of ranks of this run, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def mean(value: float | None, refused: bool, identity: str, update: int) -> tuple[float | None, bool, bool]:
    """Return the mean over the ranks that have a value, whether any rank refuses, and whether all are alike.

    One reduction.

    Args:
        value: this rank's, or ``None``.
        refused: whether this rank refuses to decide.
        identity: what must be the same on all ranks.
        update: where we are, for messages.

    Raises:
        SyncError: a rank does not answer.
    """
    size = world_size()
    if size == 1:
        return value, refused, True
    # All are alike if and only if the mean of the squares is the square of the mean; exact up to 2^13 ranks.
    mark = zlib.crc32(identity.encode()) >> 12
    shared = _tensor(value or 0.0, value is not None, refused, mark, mark * mark)
    _exchange(f"the decision at update {update}", lambda: dist.all_reduce(shared, async_op=True), shared.device)
    total, count, refusals, marks, squares = shared.tolist()
    return (total / count if count else None), refusals > 0, int(squares) * size == int(marks) ** 2


def from_rank_0(numbers: Sequence[float], update: int) -> list[float]:
    """Return rank 0's numbers, bit for bit; one broadcast.

    Raises:
        SyncError: rank 0 does not answer.
    """
    if world_size() == 1:
        return list(numbers)
    shared = _tensor(*numbers)
    what = f"the decision at update {update}"  # as above, so no new mark
    _exchange(what, lambda: dist.broadcast(shared, 0, async_op=True), shared.device, mark=False)
    return shared.tolist()


def gathered(mine: object, what: str) -> list[Any]:
    """Return every rank's object, by rank; for rare occasions.

    Args:
        mine: anything that pickles.
        what: what this is, for messages.

    Raises:
        SyncError: a rank does not answer.
    """
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    _exchange(what, lambda: dist.all_gather_object(everyone, mine), None)
    return everyone


def require_same(mine: Mapping[str, object], what: str) -> None:
    """Compare values with those of all other ranks.

    Args:
        mine: anything that pickles and compares, by name.
        what: what is being done, for messages.

    Raises:
        SyncError: they differ, and the message says who has what; or a rank does not answer.
    """
    everyone = gathered(dict(mine), what)
    names = dict.fromkeys(name for each in everyone for name in each)
    differing = [name for name in names if any(each.get(name) != everyone[0].get(name) for each in everyone)]
    if differing:
        having: dict[str, list[int]] = {}
        for number, each in enumerate(everyone):
            having.setdefault(", ".join(f"{name} {each.get(name)}" for name in differing), []).append(number)
        raise SyncError(
            f"the ranks differ: {'; '.join(f'{_named(ranks)}: {state}' for state, ranks in having.items())}. "
            "Build model and cycler alike on all ranks, and load the same checkpoint on all of them or on none."
        )


def _tensor(*numbers: float) -> Tensor:
    """Return the numbers as a tensor where the default process group can reach it."""
    on_cpu = any(backend in str(dist.get_backend_config()) for backend in ("cpu:", "gloo", "mpi"))
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _exchange(what: str, start: Callable[[], Any], device: torch.device | None, *, mark: bool = True) -> None:
    """Carry out one collective call, or say which rank it failed for."""
    store = dist.distributed_c10d._get_default_store()
    try:
        if mark:
            store.set(_key(dist.get_rank()), what)
        work = start()
        if work is not None:
            patience = _patience(device)
            work.wait(patience) if patience else work.wait()
    except RuntimeError as error:  # what torch.distributed raises, whatever happened
        reason = str(error).partition("\n")[0]
        raise SyncError(f"{what} failed: {_culprits(store, what)} (torch.distributed: {reason})") from error


def _patience(device: torch.device | None) -> timedelta | None:
    """Return a little less than the process group's timeout.

    On NCCL the watchdog ends the process once the timeout itself is over, before anybody can be named.
    """
    group: Any = dist.group.WORLD
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout * 0.95 if isinstance(timeout, timedelta) else None


def _culprits(store: Any, what: str) -> str:
    """Say which ranks did not come to an exchange, or did not come out of it."""
    advice = "Each rank must call RegimeCycler.step once per optimizer update; look into the log of that rank"
    others = [number for number in range(dist.get_world_size()) if number != dist.get_rank()]
    last_seen: dict[int, str] = {}
    deadline = time.monotonic() + GRACE_S
    try:
        store.set(_key(dist.get_rank()), what + _FAILED)
        while time.monotonic() < deadline and set(last_seen.values()) != {what + _FAILED}:
            time.sleep(0.05)
            last_seen = {n: store.get(_key(n)).decode() if store.check([_key(n)]) else "nowhere" for n in others}
    except RuntimeError:  # its holder has failed too and is through; what was seen until then holds
        if not last_seen:
            return f"the process that holds the store, rank 0 or the launcher, has ended. {advice}"
    absent = [number for number in others if last_seen[number] not in (what, what + _FAILED)]
    if absent:
        seen = ", ".join(dict.fromkeys(last_seen[number].removesuffix(_FAILED) for number in absent))
        return f"{_named(absent)} did not come to it, last seen: {seen}. {advice}"
    silent = [number for number in others if last_seen[number] == what]
    return f"{_named(silent or others)} came to it and did not answer. {advice}"


def _key(number: int) -> str:
    return f"regimewrap/{number}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
