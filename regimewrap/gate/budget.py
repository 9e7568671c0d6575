"""The budget in force at a gate: what was set, or the ratio that an open block of ``at_keep_ratio`` forces."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from regimewrap import torch_private
from regimewrap.errors import BudgetError, PolicyError
from regimewrap.gate.find import gate_of
from regimewrap.policy.policy import require_ratio
from regimewrap.topk import sampling

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regimewrap.gate.gate import TopKGate

#: Changes of the budget that are remembered, for a backward pass that comes late.
_REMEMBERED = 64


class Setting(NamedTuple):
    """A budget as plain numbers; fields as in ``TopKGate.set_budget``."""

    keep_ratio: float
    full_share: float = 0.0
    update: int = 0

    @classmethod
    def checked(cls, keep_ratio: float, full_share: float, update: int) -> Setting:
        """Return what a user set.

        Raises:
            PolicyError: a value is out of range or not a number.
        """
        ratio = require_ratio("keep_ratio", keep_ratio)
        if isinstance(full_share, bool) or not isinstance(full_share, Real) or not 0.0 <= full_share < 1.0:
            raise PolicyError(f"full_share must be a fraction in [0, 1); got {full_share!r}.")
        if isinstance(update, bool) or not isinstance(update, int) or update < 0:
            raise PolicyError(f"update must be a whole number of updates, 0 or more; got {update!r}.")
        return cls(ratio, float(full_share), update)

    def __str__(self) -> str:
        rows = f", {self.full_share:g} of the rows dense as in update {self.update}" if self.full_share else ""
        return f"keep ratio {self.keep_ratio:g}{rows}"


class _Block(NamedTuple):
    keep_ratio: float
    thread: int
    in_backward: bool


@final
class Budget:
    """What all sites of one gate read.

    Attributes:
        keep_ratio: 0-d float64 tensor on the CPU.
        dense_rows: full_share and update; float64 tensor of shape (2,) on the CPU. Both are only ever filled in place:
            compiled graphs hold them.
        settled: what was set, and is in force whenever no block is open.
        forced: whether a block is open.
        blocks_so_far: how many blocks have been opened.
    """

    def __init__(self, settled: Setting) -> None:
        self.settled = self._in_force = settled
        self.forced = False
        with torch.inference_mode(mode=False):  # else nothing could change them outside of it
            self.keep_ratio = torch.full((), settled.keep_ratio, dtype=torch.float64, device="cpu")
            self.dense_rows = torch.tensor(settled[1:], dtype=torch.float64, device="cpu")
            self._share, self._update = self.dense_rows[0], self.dense_rows[1]
        self._recorded = False  # in a CUDA graph
        self._blocks: dict[object, _Block] = {}  # the last one holds
        self.blocks_so_far = 0
        # What was in force while autograd's functions from one number to another were called, in one thread.
        self._past: deque[tuple[int, int, Setting]] = deque(maxlen=_REMEMBERED)
        self._since = torch_private.functions_so_far()
        self._thread: int | None = threading.get_ident()  # None: there are several

    def settle(self, setting: Setting) -> None:
        """Set what holds outside of blocks."""
        if self._recorded and setting != self.settled:
            self._recorded = False
            warnings.warn(  # first of all: where warnings are errors, nothing has changed
                f"a CUDA graph was recorded at {self.settled} and replays that, not {setting}; "
                "record it again after each change, or use torch.compile, which reads the budget in every run.",
                RuntimeWarning,
                stacklevel=4,
            )
        self.settled = setting
        if not self._blocks:
            self._remember()
            self._put_in_force(setting)

    @contextmanager
    def forcing(self, keep_ratio: float) -> Iterator[None]:
        """Let all rows run at a ratio, whatever is set meanwhile; blocks may overlap, and the newest one holds."""
        block, key = _Block(keep_ratio, threading.get_ident(), torch_private.in_backward()), object()
        if any(other.keep_ratio != keep_ratio and other.thread != block.thread for other in self._blocks.values()):
            warnings.warn(
                f"at_keep_ratio({keep_ratio:g}) while another thread is in a block at another ratio: a model has one "
                "ratio at a time, that of the newest block. Give each thread a copy.deepcopy of the model.",
                RuntimeWarning,
                stacklevel=5,
            )
        self._open(key, block)
        try:
            yield
        finally:
            self._close(key)

    def _open(self, key: object, block: _Block) -> None:
        self.blocks_so_far += 1
        if not block.in_backward:
            self._remember()
        if not self._blocks:
            sampling.pause(self.keep_ratio)
        self._blocks[key] = block
        self._follow_blocks()

    def _close(self, key: object) -> None:
        block = self._blocks.pop(key)
        if not block.in_backward:
            self._remember()
        self._follow_blocks()
        if not self._blocks:
            sampling.resume(self.keep_ratio)

    def _follow_blocks(self) -> None:
        newest = next(reversed(self._blocks.values()), None)
        self.forced = newest is not None
        self._put_in_force(self.settled if newest is None else Setting(newest.keep_ratio))

    def _put_in_force(self, now: Setting) -> None:
        before, self._in_force = self._in_force, now
        if now.keep_ratio != before.keep_ratio:
            self.keep_ratio.fill_(now.keep_ratio)
        if now.full_share != before.full_share:
            self._share.fill_(now.full_share)
        if now.update != before.update:
            self._update.fill_(now.update)

    def look(self, x: Tensor) -> None:
        """Notice, in eager mode, a backward pass that repeats a forward pass, and the recording of a CUDA graph.

        Raises:
            BudgetError: see ``check_recomputation``.
        """
        if torch_private.in_backward():
            self.check_recomputation()
        elif not torch.is_grad_enabled():
            self.note_caller()
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            self._recorded = True

    def note_caller(self) -> None:
        """Notice the thread that calls the gate without gradients, as a checkpoint does in its forward pass."""
        if self._thread != threading.get_ident():
            self._thread = None

    def _remember(self) -> None:
        """Note what has been in force up to now, before it changes."""
        self.note_caller()
        number = torch_private.functions_so_far()
        if self._thread is not None and number > self._since:
            self._past.append((self._since, number, self._in_force))
            self._since = number

    def check_recomputation(self) -> None:
        """Refuse to run a function again, inside a backward pass, at another budget than it ran at first.

        ``torch.utils.checkpoint`` (reentrant) and checkpoints written by hand do that in a function of autograd's.
        Autograd numbers its functions in the order in which a thread calls them, so the number of the one that is
        running backward tells when its forward pass was. Numbers of several threads cannot be compared: then nothing
        is refused. In the other mode of ``torch.utils.checkpoint`` the operators see for themselves; see ``topk.op``.

        Raises:
            BudgetError: the budgets differ.
        """
        number = torch_private.recomputing_function()
        if number is None or number >= self._since or self._thread is None:
            return
        if any(block.in_backward for block in self._blocks.values()):
            return  # a block that is part of the function, and forces its ratio again
        for since, until, then in self._past:
            if since <= number < until and _acts_as(then) != _acts_as(self._in_force):
                raise BudgetError(str(then), str(self._in_force))

    def __getstate__(self) -> Setting:
        # Copies and files have what was set: a block ends for the model it was opened on.
        return self.settled

    def __setstate__(self, settled: Setting) -> None:
        self.__init__(settled)

    def __deepcopy__(self, memo: dict[int, Any]) -> Budget:
        twin = memo[id(self)] = Budget(self.settled)
        memo[id(self.keep_ratio)], memo[id(self.dense_rows)] = twin.keep_ratio, twin.dense_rows
        return twin


def _acts_as(setting: Setting) -> Setting:
    """Return a setting without the fields that make no difference."""
    if setting.keep_ratio >= 1.0:
        return Setting(1.0)
    return setting if setting.full_share else setting._replace(update=0)


@contextmanager
def at_keep_ratio(model: nn.Module, keep_ratio: float) -> Iterator[TopKGate]:
    """Run a wrapped model at any budget, in train or eval mode, whatever ``eval_keep_ratio`` says.

    All rows run at the ratio, whatever share of them training keeps dense. What is set meanwhile, by
    ``RegimeCycler.step`` or ``gate.set_keep_ratio``, holds from the end of the block on. A model has one ratio at a
    time, also in several threads: that of the newest block.

    Call ``backward`` inside the block too where activation checkpointing repeats the forward pass: outside, it would
    repeat it at another ratio. That raises ``BudgetError``, or torch's ``CheckpointError`` where one of the ratios is
    1. It cannot be seen where a checkpoint is around compiled code, or where several threads run the model.

    Args:
        model: a wrapped model.
        keep_ratio: a fraction in (0, 1].

    Yields:
        The gate. What was set is in force again on the way out, also after an exception.

    Raises:
        NotWrappedError: the model is not wrapped.
        PolicyError: the ratio is outside (0, 1].

    >>> model = regimewrap.wrap(torch.nn.Sequential(torch.nn.Linear(4, 100), torch.nn.ReLU()))
    >>> with regimewrap.at_keep_ratio(model, 0.1):
    ...     int((model(torch.ones(1, 4)) != 0).sum())
    10
    """
    gate = gate_of(model)
    with gate.forcing(require_ratio("keep_ratio", keep_ratio)):
        yield gate
