"""A training loop such as a user would write around ``wrap`` and ``cycler.step``, and the record it leaves.

One run: one policy, one seed. Which runs there are is for demo.py and the command line; nothing here prints or writes.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regimewrap import RegimeCycler, gate_of, sweep, watch, wrap
from regimewrap.errors import SignalError
from regimewrap.recipes.wide_resnet import WideResNet, parse_arch
from regimewrap.report.results import Run, TracePoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from regimewrap import Regime, RegimePolicy
    from regimewrap.measure.telemetry import Watch
    from regimewrap.recipes.data import ImageData, ImageSet

_TEST_BATCH = 500


@final
@dataclass(frozen=True)
class TrainSettings:
    """What a run needs besides data, policy and seed. SGD with Nesterov momentum, its rate along a cosine to zero."""

    arch: str = "wrn-16-2"
    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    keep_ratios: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1)

    def as_record(self) -> dict[str, Any]:
        """Return the settings as plain data, with what is fixed in words."""
        fixed = {"norm": "RMSNorm", "optimizer": "SGD, Nesterov; learning rate along a cosine to zero"}
        return {**asdict(self), "keep_ratios": list(self.keep_ratios), **fixed}

    def total_steps(self, images: int) -> int:
        """Return the optimizer updates of a run over so many training images."""
        return self.epochs * -(-images // self.batch_size)


@final
@dataclass(frozen=True)
class Status:
    """Where a run is, just after an optimizer update.

    ``step`` and ``epoch`` count from 1. ``loss`` (nats) is the mean training loss since the decision before or, where
    ``epoch_done``, over the epoch; nan before the first. ``keep_ratio`` and ``phase`` are in force from now on.
    """

    step: int
    total_steps: int
    epoch: int
    epoch_done: bool
    loss: float
    keep_ratio: float
    phase: str


@final
@dataclass(frozen=True)
class Trained:
    """A run with its model; ``updates`` were made, fewer than planned if the run was stopped."""

    run: Run
    model: nn.Module
    updates: int


def build_model(arch: str, data: ImageData) -> WideResNet:
    """Return a new network for the images, such as ``"wrn-16-2"``; PyTorch's global generator draws its weights.

    Raises:
        PolicyError: ``arch`` names no network.
    """
    depth, width = parse_arch(arch)
    return WideResNet(depth, width, len(data.classes), in_channels=data.channels)


def train_run(
    arm: str,
    policy: RegimePolicy,
    data: ImageData,
    settings: TrainSettings,
    *,
    seed: int,
    device: torch.device | None = None,
    on_step: Callable[[Status], None] = lambda _: None,
    on_evaluate: Callable[[int, int], None] = lambda _done, _total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train one model from scratch and evaluate it at each of the settings' keep ratios.

    Args:
        arm: name of the run's arm.
        policy: as for ``wrap``.
        data: what to train and test on.
        settings: of the run.
        seed: of the initial weights and of the order of the images. On the CPU, with the same number of threads, runs
            of the same seed are equal bit for bit.
        device: the CPU if ``None``.
        on_step: called after each optimizer update.
        on_evaluate: called during the evaluation with the images done, over all keep ratios, and their total.
        should_stop: asked after each optimizer update; if true, training ends there and the model is evaluated.

    Raises:
        SignalError: the loss is not finite any more.
        RegimewrapError: the model or policy cannot be built or wrapped.
    """
    device = torch.device("cpu") if device is None else device
    total_steps = settings.total_steps(len(data.train))
    torch.manual_seed(seed)
    model = wrap(build_model(settings.arch, data).to(device), policy)
    cycler = RegimeCycler(model)
    optimizer, schedule = _optimizer(model, settings, total_steps)
    recorder = _Recorder(model, policy.cycle.every, total_steps)
    model.train()
    for epoch, last, x, y in _batches(data.train, settings, seed, device):
        with recorder.watching():
            logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recorder.saw(loss)
        regime = cycler.step(loss, accuracy=(logits.argmax(1) == y).float().mean())
        on_step(recorder.made_update(regime, epoch, last))
        if should_stop():
            break
    return Trained(recorder.run(arm, seed, data.test, settings, on_evaluate), model, recorder.step)


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, on_batch: Callable[[int], None] = lambda _: None) -> float:
    """Return the share of images, in 0..1, that the model classifies rightly, in the mode it is in.

    ``on_batch`` is called with the number of images in each batch.
    """
    device = next(model.parameters()).device
    right = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in images.batches(_TEST_BATCH):
        right += (model(x.to(device)).argmax(1) == y.to(device)).sum()
        on_batch(len(y))
    return int(right) / len(images)


def _optimizer(
    model: nn.Module, settings: TrainSettings, total_steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.CosineAnnealingLR]:
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)


def _batches(
    images: ImageSet, settings: TrainSettings, seed: int, device: torch.device
) -> Iterator[tuple[int, bool, Tensor, Tensor]]:
    """Yield the epoch, whether this is its last batch, images and labels, for all epochs."""
    order = torch.Generator().manual_seed(seed)
    per_epoch = settings.total_steps(len(images)) // settings.epochs
    for epoch in range(1, settings.epochs + 1):
        for number, (x, y) in enumerate(images.batches(settings.batch_size, order), start=1):
            yield epoch, number == per_epoch, x.to(device), y.to(device)


class _Mean:
    """A mean that stays on its device until it is read."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, value: Tensor) -> None:
        self._sum = self._sum + value.detach()
        self._count += 1

    def take(self) -> float:
        """Return the mean of what was added, and begin anew."""
        mean = float(self._sum) / self._count
        self._sum, self._count = 0.0, 0
        return mean


@final
class _Recorder:
    """Keeps what ``results.Run`` wants to know, and looks at the gates only at the update before a decision.

    Looking at every gate at every update would cost a few per cent, and reading the loss waits for the device.
    """

    def __init__(self, model: nn.Module, every: int, total_steps: int) -> None:
        self.step = 0
        self._model, self._every, self._total_steps = model, every, total_steps
        self._trace: list[TracePoint] = []
        self._since_decision, self._in_epoch = _Mean(), _Mean()
        self._loss = float("nan")
        self._cycles = 0
        self._seen: Watch | None = None
        self._keep_ratio = 1.0
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Go around the forward pass of an update."""
        self.step += 1
        self._keep_ratio, self._seen = float(gate_of(self._model).keep_ratio), None
        if self.step % self._every:
            yield
        else:
            with watch(self._model) as self._seen:
                yield

    def saw(self, loss: Tensor) -> None:
        """Take the loss of the update."""
        self._since_decision.add(loss)
        self._in_epoch.add(loss)
        if self._seen is not None:
            self._loss = self._finite(self._since_decision.take())

    def made_update(self, regime: Regime, epoch: int, epoch_done: bool) -> Status:
        """Take what the cycler made of the update; return where the run is."""
        self._cycles = regime.cycle
        if self._seen is not None:
            self._trace.append(
                TracePoint(
                    step=self.step,
                    loss=self._loss,
                    keep_ratio=self._keep_ratio,
                    phase=regime.phase,
                    event=regime.event,
                    bound=self._seen.bound,
                    density=self._seen.density,
                )
            )
        loss = self._finite(self._in_epoch.take()) if epoch_done else self._loss
        return Status(self.step, self._total_steps, epoch, epoch_done, loss, regime.keep_ratio, regime.phase)

    def run(
        self, arm: str, seed: int, test: ImageSet, settings: TrainSettings, on_evaluate: Callable[[int, int], None]
    ) -> Run:
        """Evaluate the model and return the record of the run."""
        seconds = time.perf_counter() - self._started
        total, done = len(test) * len(settings.keep_ratios), 0

        def count(images: int) -> None:
            nonlocal done
            done += images
            on_evaluate(done, total)

        values = sweep(self._model, lambda model: accuracy(model, test, count), settings.keep_ratios).values
        return Run(
            arm=arm,
            seed=seed,
            accuracy={str(ratio): value for ratio, value in values.items()},
            trace=self._trace,
            cycles=self._cycles,
            bound_share=sum(point.bound > 0 for point in self._trace) / max(len(self._trace), 1),
            train_seconds=seconds,
        )

    def _finite(self, loss: float) -> float:
        if not abs(loss) < float("inf"):
            raise SignalError(
                f"the training loss became {loss} at or before update {self.step}; lower the learning rate."
            )
        return loss
