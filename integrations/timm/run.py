"""One training run built from timm's parts: loaders, optimizer, schedule, averaged model, task and checkpoint files.

What is added to timm is the keep ratio (in ``RegimeTask``, and in columns of ``summary.csv``) and a resume that goes on
exactly where a run was killed: everything that an update depends on is saved between two updates, for each rank.
Which settings there are is ``train``'s part.
"""

from __future__ import annotations

import contextlib
import csv
import sys
import zlib
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm import utils
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, TrainingTask
from timm.utils import CheckpointSaver
from torch import Tensor, nn

import regimewrap
from regimewrap import at_keep_ratio, watch
from regimewrap.errors import AlreadyWrappedError, DataError, RegimewrapError, StateError
from regimewrap.recipes.data import load_data

from . import checkpoints
from .images import TrainImages, batches_of, make_loaders
from .task import STATE_KEY, RegimeTask, is_wrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from regimewrap import RegimeCycler
    from regimewrap.recipes.data import ImageData

# A resumed run may have other values of these. What --data and --policy name is compared by its contents.
_FREE = frozenset(
    ("out", "resume", "data", "policy", "workers", "device", "log_interval", "recovery_interval", "checkpoint_hist")
)
# Rescaled to fewer updates, a preset would compress to its floor within a handful.
_FEWEST_STEPS = 800
_OF_PROCESS = frozenset(("distributed", "world_size", "rank", "local_rank"))


def start_from(folder: Path, resume: str | None) -> Path | None:
    """Return the checkpoint that a run goes on from; ``None`` to begin.

    Args:
        folder: of the run.
        resume: a file; an empty text for the newest in ``folder``, if there is one; ``None`` for a new run.

    Raises:
        DataError: a new run is wanted where there is one already.
        StateError: the newest checkpoint cannot be told.
    """
    if resume:
        return Path(resume)
    found = checkpoints.newest(folder)
    if resume is None and (found is not None or (folder / "summary.csv").exists()):
        raise DataError(f"{folder} holds a run already. Go on with it with --resume, or choose another --out.")
    return found


class _Resumable(TrainingTask):
    """A task that saves, with its own state, where its run is."""

    progress: dict[str, Any]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        state: dict[str, Any] = super().get_task_state(module=module, ema=ema)
        return state if ema else {**state, checkpoints.PROGRESS_KEY: self.progress}


@final
class _GatedTask(_Resumable, RegimeTask):
    pass


@final
class _BareTask(_Resumable, ClassificationTask):
    pass


@final
class Run:
    """A run and where it is: its epoch, and the updates made in that epoch."""

    def __init__(self, args: Namespace, device: torch.device, checkpoint: Path | None = None) -> None:
        """Build everything, and load a checkpoint; writes nothing.

        Args:
            args: the settings of ``train``, with timm's ``distributed``, ``rank`` and ``world_size``.
            device: where to train.
            checkpoint: where to go on from.

        Raises:
            RegimewrapError: a setting cannot be used.
            StateError: the checkpoint is damaged, or belongs to another run.
        """
        self.args, self.device = args, device
        data = load_data(args.data, limit=args.limit, test_limit=args.test_limit, seed=args.seed)
        self.images = TrainImages(
            data.train, args.batch_size, seed=args.seed, rank=args.rank, world_size=args.world_size
        )
        self.train_loader, self.test_loader, size = make_loaders(
            data,
            self.images,
            img_size=args.img_size,
            augment=args.augment,
            auto_augment=args.aa,
            workers=args.workers,
            device=device,
        )
        self.updates_per_epoch: int = -(-self.images.batches // args.grad_accum_steps)
        utils.random_seed(args.seed)  # the same weights on all ranks
        model = self._model(len(data.classes), size)
        self.optimizer = self._optimizer(model)
        self.schedule, self.epochs = self._schedule()
        self.task = self._task(model)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        self.settings = {
            **{name: _plain(value) for name, value in vars(args).items() if name not in _FREE | _OF_PROCESS},
            "gated": isinstance(self.task, RegimeTask),
            "images": f"{len(data.train)} and {len(data.test)}, checksum {_checksum(data):08x}",
            "ranks": args.world_size,
        }
        self.epoch = self.update = 0
        self.metric: float | None = None  # of the epoch that a resumed run begins after
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        utils.random_seed(args.seed, args.rank)
        if checkpoint is not None:
            self._load(checkpoint)
        if args.distributed:
            self.task.prepare_distributed(device_ids=None if device.type == "cpu" else [device])
        self._say(
            f"{args.model}: {sum(each.numel() for each in model.parameters()):,} parameters. Data: {data.about}. "
            f"{self.epochs} epochs of {self.updates_per_epoch} updates"
            + (f", from epoch {self.epoch}, update {self.update}." if checkpoint else ".")
        )

    def train(self) -> None:
        """Train to the end, with a checkpoint and a line of ``summary.csv`` for each epoch.

        Raises:
            SignalError: see ``RegimeCycler.step``.
        """
        saver = self._saver() if self.args.rank == 0 else None
        summary = self.args.out / "summary.csv"
        if saver is not None:
            _keep_rows_before(self.epoch, summary)
        if self.metric is not None:
            self._save_epoch(saver, self.metric)  # timm can have been stopped before it had ranked this one
        while self.epoch < self.epochs:
            epoch, trained = self.epoch, self._train_epoch(saver)
            self._share_statistics()
            evaluated = self._evaluate()
            rate = sum(group["lr"] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
            if self.schedule is not None:
                self.schedule.step(epoch + 1, evaluated["top1"])
            self.epoch, self.update = epoch + 1, 0
            self.loss_sum.zero_()
            if saver is not None:
                utils.update_summary(epoch, trained, evaluated, summary, lr=rate, write_header=not summary.exists())
            self._save_epoch(saver, evaluated["top1"])
            self._say(f"epoch {epoch}: {_in_words(trained)}; test {_in_words(evaluated)}")
        self._say(f"Done. The run is in {self.args.out}.")

    def _train_epoch(self, saver: CheckpointSaver | None) -> OrderedDict[str, Any]:
        """Train from where the run is to the end of the epoch; return the epoch's figures."""
        args, task = self.args, self.task
        module = task.trainable_module
        module.train()
        self.images.epoch, self.images.first_batch = self.epoch, self.update * args.grad_accum_steps
        batches = batches_of(self.train_loader, self.device)
        while self.update < self.updates_per_epoch:
            is_last = self.update + 1 == self.updates_per_epoch
            with watch(module) if is_last and self._gated else contextlib.nullcontext() as seen:
                loss = self._backward(batches)
            if args.clip_grad is not None:
                utils.dispatch_clip_grad(task.get_clip_parameters(), args.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.update += 1
            self.loss_sum += loss
            task.update_ema(step=self._updates)
            if self.schedule is not None:
                self.schedule.step_update(self._updates)
            if not is_last and self._updates % args.recovery_interval == 0:  # after the last comes the epoch's own
                task.progress = self._progress()
                if saver is not None:
                    saver.save_recovery(self.epoch, self.update)
            if not is_last and self.update % args.log_interval == 0:
                figures = {"loss": float(loss), **self._regime()}
                self._say(f"epoch {self.epoch}, update {self.update}: {_in_words(figures)}")
        losses = _from_all_ranks(self.loss_sum.item() / self.updates_per_epoch)
        row = OrderedDict(loss=sum(losses) / len(losses), **self._regime())
        if seen is not None and isinstance(task, RegimeTask):
            row["keep_ratio_min"] = _lowest(task.cycler, self._updates - self.updates_per_epoch, self._updates)
            row["bound"], row["density"] = seen.bound, seen.density
        return row

    def _backward(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Add up the gradients of the next update's batches; return the mean of their losses."""
        steps = self.args.grad_accum_steps
        window = min(steps, self.images.batches - self.update * steps)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number in range(1, window + 1):
            images, labels = next(batches)
            with contextlib.nullcontext() if number == window else self.task.no_sync():  # type: ignore[no-untyped-call]
                with self._autocast():
                    loss = self.task(images, labels)["loss"]
                (loss / window).backward()
            total += loss.detach() / window
        return total

    def _evaluate(self) -> OrderedDict[str, float]:
        """Return loss and accuracies (per cent) of all test images; also at the keep ratio in force."""
        model = utils.unwrap_model(self.task.get_eval_model(ema=self.args.model_ema))
        model.eval()
        figures = self._measured(model)
        if isinstance(self.task, RegimeTask):
            with at_keep_ratio(model, self.task.cycler.keep_ratio):
                figures["top1_at_keep_ratio"] = self._measured(model)["top1"]
        return figures

    @torch.no_grad()
    def _measured(self, model: nn.Module) -> OrderedDict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, right at once, right within five, images
        for images, labels in batches_of(self.test_loader, self.device):
            with self._autocast():
                output = model(images).float()
            right = output.topk(min(5, output.shape[-1])).indices == labels[:, None]
            loss = F.cross_entropy(output, labels, reduction="sum")
            sums += torch.stack((loss, right[:, 0].sum(), right.sum(), torch.tensor(len(labels), device=self.device)))
        if self.args.distributed:
            dist.all_reduce(sums)
        loss_sum, top1, top5, count = sums.tolist()
        return OrderedDict(loss=loss_sum / count, top1=100 * top1 / count, top5=100 * top5 / count)

    def _share_statistics(self) -> None:
        """Give all ranks rank 0's BatchNorm statistics, which are what DDP shares and what checkpoints hold."""
        if self.args.distributed:
            for ema in (False, True):
                module = self.task.get_trainable_module(ema=ema)
                if module is not None:
                    utils.distribute_bn(module, self.args.world_size)

    # What is saved, and comes back

    def _save_epoch(self, saver: CheckpointSaver | None, metric: float) -> None:
        """Save after the last update of an epoch. Every rank must call it."""
        self.task.progress = self._progress()
        if saver is not None:
            saver.save_checkpoint(self.epoch - 1, metric=metric)
            for path in checkpoints.recoveries(self.args.out):
                path.unlink()

    def _saver(self) -> CheckpointSaver:
        folder = str(self.args.out)
        saver = CheckpointSaver(
            self.task.trainable_module,
            self.optimizer,
            args=Namespace(**{name: _plain(value) for name, value in vars(self.args).items()}),
            checkpoint_dir=folder,
            recovery_dir=folder,
            max_history=self.args.checkpoint_hist,
            task=self.task,
        )
        # timm finds its files again since 1.0.31 only; here, the files themselves say what they are.
        until = self.epoch if self.metric is None else self.epoch - 1
        ranked = sorted(checkpoints.ranked(self.args.out, before_epoch=until), key=lambda each: (-each[1], each[0]))
        saver.checkpoint_files = [(str(path), metric) for _, metric, path in ranked]
        if ranked:
            saver.best_epoch, saver.best_metric = ranked[0][:2]
        return saver

    def _progress(self) -> dict[str, Any]:
        """Return where the run is, with what is each rank's own. Every rank must call it."""
        own = {"random": torch.get_rng_state(), "loss_sum": self.loss_sum.cpu()}
        if self.device.type == "cuda":
            own["random_of_device"] = torch.cuda.get_rng_state(self.device)
        if isinstance(self.task, RegimeTask):
            cycler = self.task.cycler.state_dict()
            own |= {"pending": cycler["pending"], "skipped": cycler["state"]["skipped"]}
        return {
            "version": checkpoints.PROGRESS_VERSION,
            "settings": self.settings,
            "versions": _versions(),
            "epoch": self.epoch,
            "update": self.update,
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "ranks": _from_all_ranks(own),
        }

    def _load(self, path: Path) -> None:
        saved = checkpoints.read(path)
        progress = checkpoints.progress_of(saved, path)
        checkpoints.require_same(progress["settings"], self.settings, path)
        if progress["versions"] != _versions():
            there, here = (
                ", ".join(f"{n} {v}" for n, v in each.items()) for each in (progress["versions"], _versions())
            )
            self._say(f"Warning: {path} was written with {there}; with {here} the run may go on a little differently.")
        try:
            own, task_state = progress["ranks"][self.args.rank], saved["task_state"]
            if isinstance(self.task, RegimeTask):
                # timm saves what rank 0 knows. All ranks agree about the rest.
                regime = task_state[STATE_KEY]
                state = {**regime["cycler"]["state"], "skipped": own["skipped"]}
                cycler = {**regime["cycler"], "pending": own["pending"], "state": state}
                task_state = {**task_state, STATE_KEY: {**regime, "cycler": cycler}}
            self.task.load_checkpoint_state(saved["state_dict"], task_state)
            if self.args.model_ema:
                self.task.load_checkpoint_state(saved["state_dict_ema"], ema=True)
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(progress["schedule"])
            self.epoch, self.update = progress["epoch"], progress["update"]
            self.metric = saved["metric"] if self.update == 0 else None
            self.loss_sum.copy_(own["loss_sum"])
            torch.set_rng_state(own["random"])
            if self.device.type == "cuda" and "random_of_device" in own:
                torch.cuda.set_rng_state(own["random_of_device"], self.device)
        except RegimewrapError as error:
            raise StateError(f"{path}: {error}") from None
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(f"{path} does not fit this run: {_one_line(error)}.") from None

    # What it is built from

    def _model(self, classes: int, size: tuple[int, int, int]) -> nn.Module:
        args = self.args
        with _refusals_of_timm(f"--model {args.model}"):
            model: nn.Module = timm.create_model(
                args.model, pretrained=args.pretrained, num_classes=classes, in_chans=size[0], **dict(args.model_kwargs)
            )
        model.to(self.device)
        shape = "×".join(map(str, size))
        advice = "try --img-size, or --model-kwargs img_size="
        with torch.no_grad(), _refusals_of_timm(f"images of {shape} for --model {args.model} ({advice})"):
            model.eval()(torch.zeros(2, *size, device=self.device))
        return model

    def _task(self, model: nn.Module) -> _GatedTask | _BareTask:
        args = self.args
        criterion = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
        if is_wrapped(model) and args.policy is not None:
            raise AlreadyWrappedError(
                f"{args.model} is wrapped already: give the policy in --model-kwargs, or the base model in --model."
            )
        if args.policy == "none":
            return _BareTask(model, criterion, device=self.device, verbose=False)
        policy = None
        if not is_wrapped(model):
            total_steps = max(self.epochs * self.updates_per_epoch, _FEWEST_STEPS)
            policy = regimewrap.RegimePolicy.of(args.policy or "mixed", total_steps)
        return _GatedTask(model, criterion, device=self.device, verbose=False, policy=policy)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        args = self.args
        options = {"lr": args.lr, "weight_decay": args.weight_decay, "momentum": args.momentum, **dict(args.opt_kwargs)}
        with _refusals_of_timm(f"--opt {args.opt}"):
            return create_optimizer_v2(model, opt=args.opt, **options)

    def _schedule(self) -> tuple[Any, int]:
        """Return timm's learning rate schedule and the number of epochs that it makes of those asked for."""
        args = self.args
        if args.sched == "plateau":
            raise RegimewrapError("--sched plateau cannot be resumed exactly: timm does not save all of its state.")
        with _refusals_of_timm(f"--sched {args.sched}"):
            schedule, epochs = create_scheduler_v2(
                self.optimizer,
                args.sched,
                num_epochs=args.epochs,
                warmup_epochs=args.warmup_epochs,
                warmup_lr=args.warmup_lr,
                step_on_epochs=not args.sched_on_updates,
                updates_per_epoch=self.updates_per_epoch,
                **dict(args.sched_kwargs),
            )
        if schedule is None and args.sched != "none":  # so did timm before 1.0.31
            raise RegimewrapError(f"timm refused --sched {args.sched}: there is no such schedule.")
        return schedule, int(epochs)

    # Words

    @property
    def _gated(self) -> bool:
        return isinstance(self.task, RegimeTask)

    @property
    def _updates(self) -> int:
        """Updates since the run began."""
        return self.epoch * self.updates_per_epoch + self.update

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp)

    def _regime(self) -> dict[str, Any]:
        """Return what is in force from the next update on, for lines and columns; nothing without a gate."""
        regime = self.task.regime if isinstance(self.task, RegimeTask) else None
        return {} if regime is None else {"keep_ratio": regime.keep_ratio, "phase": regime.phase, "cycle": regime.cycle}

    def _say(self, text: str) -> None:
        if self.args.rank == 0:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _lowest(cycler: RegimeCycler, first: int, last: int) -> float:
    """Return the lowest keep ratio of the updates after ``first``, up to ``last``."""
    lowest = cycler.policy.strategy.initial_keep_ratio
    for decision in cycler.history:
        if decision.step <= first:
            lowest = decision.keep_ratio
        elif decision.step < last:
            lowest = min(lowest, decision.keep_ratio)
    return lowest


def _from_all_ranks(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def _refusals_of_timm(what: str) -> Iterator[None]:
    """Say in one line what timm, or a model of it, would not have."""
    try:
        yield
    except RegimewrapError:
        raise
    except Exception as error:  # timm refuses with errors of many kinds
        raise RegimewrapError(f"timm refused {what}: {_one_line(error)}") from error


def _keep_rows_before(epoch: int, summary: Path) -> None:
    """Take out of a summary the rows of epochs that will be trained (again), whole or not at all."""
    if not summary.exists():
        return
    with summary.open(newline="") as file:
        header, *rows = csv.reader(file)
    kept = [row for row in rows if len(row) == len(header) and int(row[0]) < epoch]
    beside = summary.with_name(f".{summary.name}.tmp")
    with beside.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
    beside.replace(summary)


def _versions() -> dict[str, str]:
    return {"regimewrap": regimewrap.__version__, "torch": str(torch.__version__), "timm": timm.__version__}


def _checksum(data: ImageData) -> int:
    checksum = 0
    for part in (data.train.pixels, data.train.labels, data.test.pixels, data.test.labels):
        checksum = zlib.crc32(part.contiguous().numpy().data, checksum)
    return checksum


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _in_words(figures: dict[str, Any]) -> str:
    shown = (f"{value:.4g}" if isinstance(value, float) else value for value in figures.values())
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(figures, shown, strict=True))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
