"""What the ranks of one run exchange, and which of them is missing when that fails.

A decision takes one reduction and one broadcast in the default process group, on any backend; nothing is exchanged in
between, except in scope "network", which takes one reduction at the end of each step. Before a decision the ranks meet
in the process group's store: an exchange begins only when all have come to it, so it cannot be taken for one of DDP's,
and a rank that does not come in time is named. No policy and no gate is known here.
"""

from __future__ import annotations

import time
import zlib
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from regimewrap.errors import SyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

#: How long a rank that was left alone lives on, in seconds: it may hold the store, which the others have to read.
GRACE_S = 1.0


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
        SyncError: a rank does not come.
    """
    size = world_size()
    if size == 1:
        return value, refused, True
    # All are alike if and only if the mean of the squares is the square of the mean; exact up to 2^13 ranks.
    mark = zlib.crc32(identity.encode()) >> 12
    shared = torch.tensor(
        [value or 0.0, value is not None, refused, mark, mark * mark], dtype=torch.float64, device=_device()
    )
    _meet("the decision", update)
    _exchange(f"the decision at update {update}", lambda: dist.all_reduce(shared))
    total, count, refusals, marks, squares = shared.tolist()
    return (total / count if count else None), refusals > 0, int(squares) * size == int(marks) ** 2


def from_rank_0(numbers: Sequence[float], update: int) -> list[float]:
    """Return rank 0's numbers, bit for bit; one broadcast, right after ``mean``.

    Raises:
        SyncError: a rank ended meanwhile.
    """
    if world_size() == 1:
        return list(numbers)
    shared = torch.tensor(numbers, dtype=torch.float64, device=_device())
    _exchange(f"the decision at update {update}", lambda: dist.broadcast(shared, src=0))
    return shared.tolist()


def add_up(numbers: Tensor, update: int, *, meet: bool) -> None:
    """Replace numbers, in place, by their sum over all ranks; one reduction.

    Args:
        numbers: of the same shape and dtype on all ranks. They stay on their device if the process group reaches it.
        update: where we are, for messages.
        meet: make sure first that all ranks have come. This waits for them, though for no device.

    Raises:
        SyncError: a rank does not come (only with ``meet``), or ended meanwhile.
    """
    if world_size() == 1:
        return
    if meet:
        _meet("the end of the step", update)
    reached = f"{numbers.device.type}:" in str(dist.get_backend_config())
    shared = numbers if reached else numbers.to(_device())
    _exchange(f"the end of the step at update {update}", lambda: dist.all_reduce(shared), met=meet)
    if shared is not numbers:
        numbers.copy_(shared)


def gathered(mine: object, what: str, update: int) -> list[Any]:
    """Return every rank's object, by rank; for rare occasions.

    Args:
        mine: anything that pickles.
        what: what is being done, the same on all ranks.
        update: where we are, for messages.

    Raises:
        SyncError: a rank does not come.
    """
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    _meet(what, update)
    _exchange(f"{what} at update {update}", lambda: dist.all_gather_object(everyone, mine))
    return everyone


def require_same(mine: Mapping[str, object], what: str, update: int) -> None:
    """Compare values with those of all other ranks.

    Args:
        mine: anything that pickles and compares, by name; nested mappings are compared name by name.
        what: what is being done, the same on all ranks.
        update: where we are, for messages.

    Raises:
        SyncError: they differ, and the message says who has what; or a rank does not come.
    """
    everyone = gathered(_flat(mine), what, update)
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


def _flat(nested: Mapping[str, object], path: str = "") -> dict[str, object]:
    """Return nested mappings as one level, by dotted name."""
    flat: dict[str, object] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


def _device() -> torch.device | None:
    """Return where the default process group can reach a tensor."""
    on_cpu = any(backend in str(dist.get_backend_config()) for backend in ("cpu:", "gloo", "mpi"))
    return torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()


def _meet(what: str, update: int) -> None:
    """Wait until all ranks have come to the same exchange, whatever their update.

    Raises:
        SyncError: some have not when the process group's timeout is nearly over. Not quite, because what they are in
            instead may end the process then.
    """
    store, size, timeout = dist.distributed_c10d._get_default_store(), dist.get_world_size(), _timeout()
    here = f"{what} at update {update}"
    try:
        store.set(_place(dist.get_rank()), here)
        turn, behind = divmod(store.add(f"regimewrap/{what}", 1) - 1, size)
        all_here = f"regimewrap/{what}/{turn}"
        if behind < size - 1:
            store.wait([all_here], timeout * 0.9)
        else:
            store.delete_key(f"regimewrap/{what}/{turn - 1}")  # all ranks have left that one
            store.set(all_here, "")
    except RuntimeError as error:
        raise SyncError(f"{here} failed: {_absent(store, here, timeout)}") from error


def _absent(store: Any, here: str, timeout: timedelta) -> str:
    """Say which ranks did not come to an exchange."""
    advice = "Each rank must call RegimeCycler.step once per optimizer update; look into the log of that rank."
    try:
        seen = {}
        for number in range(dist.get_world_size()):
            there = store.check([_place(number)])
            seen[number] = f"at {store.get(_place(number)).decode()}" if there else "nowhere"
        time.sleep(GRACE_S)
    except RuntimeError:
        return f"rank 0, or the launcher, which holds the store for all, has ended. {advice}"
    absent = [number for number in seen if seen[number] != f"at {here}"]
    places = ", ".join(dict.fromkeys(seen[number] for number in absent))
    seconds = f"{0.9 * timeout.total_seconds():g} s"
    return f"{_named(absent)} did not come to it within {seconds}, last seen {places}. {advice}"


def _exchange(what: str, exchange: Callable[[], object], *, met: bool = True) -> None:
    """Carry out a collective call, to which all ranks have come if they met."""
    try:
        exchange()
    except RuntimeError as error:  # torch.distributed raises this for every failure
        reason = str(error).partition("\n")[0]
        happened = "all ranks came to it, and one has ended since" if met else "a rank did not come to it, or has ended"
        raise SyncError(f"{what} failed: {happened}: {reason}") from error


def _timeout() -> timedelta:
    """Return the default process group's timeout."""
    group: Any = dist.group.WORLD
    options = getattr(group._get_backend(_device()), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else dist.constants.default_pg_timeout


def _place(number: int) -> str:
    return f"regimewrap/rank {number}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
