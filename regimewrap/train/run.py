"""One run: one policy, one seed, from the first update to the last, or on from any update in between.

An update is a function of the state and of its place: the order of pictures, their crops, dropout and mixup are drawn
from seed, epoch and update alone, and the learning rate is a formula. So what is saved is small, and a resumed run is
the same bit for bit as one that was never stopped (on a CPU with as many threads; on a GPU as far as its kernels are
deterministic). Nothing here prints or writes.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from regimewrap import RegimeCycler, at_keep_ratio, watch, wrap
from regimewrap.errors import DataError, PolicyError, RegimewrapError, SignalError
from regimewrap.train.pictures import batches, fixed_order, plain_transform, seed_draws, training_order
from regimewrap.train.saved import create

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from regimewrap import RegimePolicy
    from regimewrap.train.pictures import Pictures, Sample
    from regimewrap.train.settings import Settings

_LOOK_EVERY = 50  # updates between two looks at the loss, each of which waits for the device


@final
class Stopped(Exception):  # noqa: N818 - not an error
    """The user asked the run to stop; it can go on from where it is."""


@final
class Run:
    """A run and where it is.

    Attributes:
        model: wrapped; ``evaluated_model`` is the averaged one where there is one.
        update: updates made.
        rows: figures of the epochs that ended, oldest first.
    """

    def __init__(
        self,
        settings: Settings,
        pictures: Pictures,
        policy: RegimePolicy,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> None:
        """Build everything; nothing is trained yet.

        Raises:
            RegimewrapError: a setting cannot be used; the message says which.
        """
        self.settings, self.pictures, self.seed, self.device, self.workers = settings, pictures, seed, device, workers
        self.per_epoch = max(1, len(pictures.train) // settings.batch_size)
        self.total = settings.epochs * self.per_epoch
        seed_draws(seed)
        model, self.model_kwargs = create(
            settings.model,
            len(pictures.classes),
            settings.model_kwargs,
            pretrained=settings.pretrained,
            img_size=settings.img_size,
        )
        self.model: nn.Module = model.to(device)
        self.look: dict[str, Any] = resolve_model_data_config(model)
        if settings.img_size is not None:
            self.look["input_size"] = (3, settings.img_size, settings.img_size)
        self._try_out()
        wrap(self.model, policy)
        self.cycler = RegimeCycler(self.model, total_steps=self.total)
        self.policy = policy
        if policy.cycle.strategy.needs_signal and policy.cycle.monitor not in ("loss", "accuracy"):
            raise PolicyError(
                f"regimewrap train knows loss and accuracy; the policy monitors {policy.cycle.monitor!r}."
            )
        try:
            self.optimizer: torch.optim.Optimizer = create_optimizer_v2(
                self.model, opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, momentum=0.9
            )
        except Exception as error:  # timm refuses with errors of many kinds
            raise RegimewrapError(f"timm has no use for --opt {settings.opt}: {error}.") from error
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = None if settings.ema is None else ModelEmaV3(self.model, decay=settings.ema, use_warmup=True)
        if self.ema is not None:
            self.cycler.bind(self.ema.module)
        classes = len(pictures.classes)
        self._mixup = (
            Mixup(settings.mixup, label_smoothing=settings.smoothing, num_classes=classes) if settings.mixup else None
        )
        self.update = 0
        self.rows: list[dict[str, Any]] = []
        self._begin_epoch()

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose figures count and which is saved."""
        return self.model if self.ema is None else self.ema.module

    def train(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        on_update: Callable[[Run], None] = lambda _: None,
        on_epoch: Callable[[Run], None] = lambda _: None,
    ) -> None:
        """Train to the end, from where the run is.

        Args:
            should_stop: asked between two updates and between two batches of an evaluation.
            on_update: called after each update.
            on_epoch: called after each epoch, once its figures are in ``rows``.

        Raises:
            Stopped: ``should_stop`` said so. The run's state is that between two updates.
            SignalError: the loss is not finite any more.
            DataError: a picture is damaged.
        """
        order = training_order(
            len(self.pictures.train), self.settings.batch_size, self.settings.epochs, self.seed, self.update
        )
        feed = self._batches(self.pictures.train, self._training_transform(), order)
        while True:
            if self.update >= (len(self.rows) + 1) * self.per_epoch:
                self.rows.append(self._figures(should_stop))
                on_epoch(self)
            if self.update == self.total:
                return
            if should_stop():
                raise Stopped
            began = time.perf_counter()
            self._step(*next(feed))
            self._seconds += time.perf_counter() - began
            on_update(self)

    def state(self) -> dict[str, Any]:
        """Return everything that the next update depends on: tensors and plain data."""
        return {
            "update": self.update,
            "rows": self.rows,
            "epoch": (self._loss_sum.cpu(), self._ratio_sum, self._lowest, self._seconds),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "cycler": self.cycler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of a run with the same settings."""
        self.cycler.load_state_dict(state["cycler"])
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.update, self.rows = state["update"], list(state["rows"])
        loss_sum, self._ratio_sum, self._lowest, self._seconds = state["epoch"]
        self._loss_sum = loss_sum.to(self.device)

    def _step(self, pictures: Tensor, labels: Tensor) -> None:
        """Make one update."""
        settings, cycle = self.settings, self.policy.cycle
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._share_of_rate()
        seed_draws(self.seed, self.update, 1)
        self.model.train()
        targets = labels
        if self._mixup is not None and len(labels) % 2 == 0:  # it pairs the pictures of a batch
            pictures, targets = self._mixup(pictures, labels)
        with self._autocast():
            output = self.model(pictures)
        smoothing = settings.smoothing if targets is labels else 0.0  # mixup has smoothed its own
        loss = F.cross_entropy(output.float(), targets, label_smoothing=smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        signal: dict[str, Tensor] = {}
        if cycle.strategy.needs_signal:
            right = (output.argmax(1) == labels).float().mean()
            signal = {"loss": loss} if cycle.monitor == "loss" else {"accuracy": right}
        self._ratio_sum += self.cycler.keep_ratio
        self._lowest = min(self._lowest, self.cycler.keep_ratio)
        self.cycler.step(**signal)
        self.update += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.update)
        self._loss_sum += loss.detach()
        if self.update % _LOOK_EVERY == 0:
            self.mean_loss()

    def mean_loss(self) -> float:
        """Return the mean training loss since the epoch began, in nats.

        Raises:
            SignalError: it is not finite.
        """
        mean = float(self._loss_sum) / max(1, self.update - len(self.rows) * self.per_epoch)
        if not math.isfinite(mean):
            raise SignalError(
                f"the training loss became {mean} at or before update {self.update}; choose a smaller --lr."
            )
        return mean

    def _figures(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        """Return the figures of the epoch that ended: all keep ratios after the last, the largest and smallest else."""
        ratios = sorted(set(self.settings.keep_ratios), reverse=True)
        shown = ratios if self.update == self.total else [ratios[0], ratios[-1]]
        figures: dict[str, Any] = {
            "epoch": len(self.rows) + 1,
            "updates": self.update,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.mean_loss(),
            "keep_ratio_mean": self._ratio_sum / self.per_epoch,
            "keep_ratio_min": self._lowest,
            "train_seconds": self._seconds,
        }
        figures |= {f"{name}_at_{ratio:g}": None for name in ("accuracy", "val_loss") for ratio in ratios}
        model = self.evaluated_model
        for ratio in dict.fromkeys(shown):
            with at_keep_ratio(model, ratio), watch(model) as seen:
                loss, accuracy = self._evaluate(model, should_stop)
            figures |= {f"accuracy_at_{ratio:g}": accuracy, f"val_loss_at_{ratio:g}": loss}
        figures |= {f"density_at_{ratio:g}": seen.density, f"bound_at_{ratio:g}": seen.bound}
        self._begin_epoch()
        return figures

    def _begin_epoch(self) -> None:
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._ratio_sum, self._lowest, self._seconds = 0.0, 1.0, 0.0

    def _evaluate(self, model: nn.Module, should_stop: Callable[[], bool]) -> tuple[float, float]:
        order = fixed_order(len(self.pictures.val), self.settings.batch_size)
        feed = self._batches(self.pictures.val, plain_transform(self.look), order)
        with self._autocast():
            return evaluate(model, feed, should_stop)

    def _batches(self, samples: list[Sample], transform: Any, order: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(samples, transform, order, workers=self.workers, device=self.device, seed=self.seed)

    def _training_transform(self) -> Any:
        settings = self.settings
        look = {name: value for name, value in self.look.items() if name not in ("crop_pct", "crop_mode")}
        options: dict[str, Any] = {
            "no_aug": not settings.augment,
            "scale": (settings.crop_scale, 1.0),
            "hflip": settings.hflip,
            "color_jitter": settings.color_jitter or None,
            "auto_augment": settings.aa,
            "re_prob": settings.re_prob,
        }
        try:
            return create_transform(**look, is_training=True, **options)
        except (AssertionError, KeyError, ValueError) as error:  # timm raises these for unknown words
            raise DataError(f"timm has no use for --aa {settings.aa}: {error}.") from error

    def _share_of_rate(self) -> float:
        """Return what the learning rate of this update is multiplied with: up in a line, then down along a cosine."""
        warmup = min(round(self.settings.warmup_epochs * self.per_epoch), self.total - 1)
        if self.update < warmup:
            return (self.update + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (self.update - warmup) / (self.total - warmup)))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp)

    def _try_out(self) -> None:
        """Run the model once: some take pictures of certain sizes only."""
        size = self.look["input_size"]
        try:
            with torch.no_grad():
                self.model.eval()(torch.zeros(2, *size, device=self.device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises
            reason = " ".join(str(error).split())[:200]
            name = self.settings.model
            raise DataError(
                f"{name} cannot take pictures of {size[1]}×{size[2]}: {reason}. Change --img-size."
            ) from error


@torch.no_grad()
def evaluate(
    model: nn.Module, feed: Iterator[tuple[Tensor, Tensor]], should_stop: Callable[[], bool] = lambda: False
) -> tuple[float, float]:
    """Return mean cross-entropy (nats) and the share of pictures, 0..1, that the model classifies rightly.

    Raises:
        Stopped: ``should_stop`` said so.
    """
    model.eval()
    losses, right, count = [], [], 0
    for pictures, labels in feed:
        if should_stop():
            raise Stopped
        output = model(pictures).float()
        losses.append(F.cross_entropy(output, labels, reduction="sum").double())
        right.append((output.argmax(1) == labels).sum())
        count += len(labels)
    return float(torch.stack(losses).sum()) / count, int(torch.stack(right).sum()) / count
