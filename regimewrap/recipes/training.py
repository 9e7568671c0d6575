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
    from collections.abc import Iterator

    from regimewrap import Regime, RegimePolicy
    from regimewrap.measure.telemetry import Watch
    from regimewrap.recipes.data import ImageData, ImageSet

_TEST_BATCH = 500
_LOOKS = 200  # in a run whose ratio moves at each update, at odd intervals as it may rest in turn


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
class Trained:
    """A run's record with its model, which is still wrapped."""

    run: Run
    model: nn.Module


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

    Raises:
        SignalError: the loss is not finite any more.
        RegimewrapError: the model or policy cannot be built or wrapped.
    """
    device = torch.device("cpu") if device is None else device
    total_steps = settings.total_steps(len(data.train))
    torch.manual_seed(seed)
    model = wrap(build_model(settings.arch, data).to(device), policy)
    cycler = RegimeCycler(model, total_steps=total_steps)
    optimizer, schedule = _optimizer(model, settings, total_steps)
    cycle = cycler.policy
    recorder = _Recorder(model, max(1, total_steps // _LOOKS) | 1 if cycle.strategy.each_update else cycle.every)
    model.train()
    for x, y in _batches(data.train, settings, seed, device):
        with recorder.watching():
            logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recorder.saw(loss)
        regime = cycler.step(loss, accuracy=(logits.argmax(1) == y).float().mean())
        recorder.made_update(regime)
    return Trained(recorder.run(arm, seed, data.test, settings), model)


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Return the share of images, in 0..1, that the model classifies rightly, in the mode it is in."""
    device = next(model.parameters()).device
    right = torch.zeros((), dtype=torch.int64, device=device)
    for x, y in images.batches(_TEST_BATCH):
        right += (model(x.to(device)).argmax(1) == y.to(device)).sum()
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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels of all epochs, each in an order of its own."""
    order = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        for x, y in images.batches(settings.batch_size, order):
            yield x.to(device), y.to(device)


@final
class _Recorder:
    """Keeps what ``results.Run`` wants to know, and looks at the gates only at every ``every``-th update.

    Looking at every gate at every update would cost a few per cent, and reading the loss waits for the device.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self._model, self._every, self._step = model, every, 0
        self._trace: list[TracePoint] = []
        self._losses: list[Tensor] = []  # since the decision before; on their device until they are read
        self._cycles = 0
        self._seen: Watch | None = None
        self._keep_ratio = 1.0
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Go around the forward pass of an update."""
        self._step += 1
        self._keep_ratio, self._seen = float(gate_of(self._model).keep_ratio), None
        if self._step % self._every:
            yield
        else:
            with watch(self._model) as self._seen:
                yield

    def saw(self, loss: Tensor) -> None:
        """Take the loss of the update."""
        self._losses.append(loss.detach())

    def made_update(self, regime: Regime) -> None:
        """Take what the cycler made of the update."""
        self._cycles = regime.cycle
        if self._seen is None:
            return
        self._trace.append(
            TracePoint(
                step=self._step,
                loss=self._mean_loss(),
                keep_ratio=self._keep_ratio,
                phase=regime.phase,
                event=regime.event,
                bound=self._seen.bound,
                density=self._seen.density,
            )
        )

    def run(self, arm: str, seed: int, test: ImageSet, settings: TrainSettings) -> Run:
        """Evaluate the model and return the record of the run."""
        if self._losses:
            self._mean_loss()  # refuses what diverged after the last decision
        seconds = time.perf_counter() - self._started
        densities: list[float] = []

        def evaluate(model: nn.Module) -> float:
            with watch(model) as seen:
                result = accuracy(model, test)
            densities.append(seen.density)
            return result

        values = sweep(self._model, evaluate, settings.keep_ratios).values
        return Run(
            arm=arm,
            seed=seed,
            accuracy={str(ratio): value for ratio, value in values.items()},
            density=dict(zip(map(str, values), densities, strict=True)),
            trace=self._trace,
            cycles=self._cycles,
            bound_share=sum(point.bound > 0 for point in self._trace) / max(len(self._trace), 1),
            train_seconds=seconds,
        )

    def _mean_loss(self) -> float:
        mean = float(torch.stack(self._losses).mean())
        self._losses.clear()
        if not abs(mean) < float("inf"):
            raise SignalError(
                f"the training loss became {mean} at or before update {self._step}; lower the learning rate."
            )
        return mean
