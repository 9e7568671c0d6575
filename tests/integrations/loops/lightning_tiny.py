"""A Lightning module, its data and its trainer, as small as can be."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from regimewrap.integrations.lightning import RegimeCallback
from tiny import POLICY, bare, batch, sgd, with_nan
from torch import Tensor
from torch.nn.functional import mse_loss

from regimewrap import RegimePolicy

BATCHES_PER_EPOCH = 25
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = bare()

    def training_step(self, data: tuple[Tensor, Tensor, int]) -> Tensor:
        x, y, number = data
        return with_nan(mse_loss(self.net(x), y), number, self.global_rank)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self)


class Batches:
    """Batches by number, other ones on each rank, that can be resumed in the middle of an epoch."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return BATCHES_PER_EPOCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        while self.next < BATCHES_PER_EPOCH:
            self.next += 1
            yield *batch(self.next, int(os.environ.get("RANK", "0"))), self.next
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Say(Callback):
    """Prints each micro-batch's loss."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, *_: object) -> None:
        del pl_module
        print(trainer.global_step, outputs["loss"].item().hex(), flush=True)  # noqa: T201


def fit(
    updates: int,
    policy: RegimePolicy | None = POLICY,
    folder: Path | None = None,
    *,
    micro_batches: int = 1,
    say: bool = False,
) -> tuple[RegimeCallback | None, Module]:
    """Train, from the newest checkpoint in ``folder`` if there is one; save there every third update."""
    warnings.simplefilter("ignore")
    callback = None if policy is None else RegimeCallback(policy)
    callbacks: list[Callback] = [Say()] if say else []
    saves: list[Path] = []
    if folder is not None and callback is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1))
        saves = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    if callback is not None:
        callbacks.append(callback)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    module = Module()
    trainer = Trainer(
        max_steps=updates,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        accumulate_grad_batches=micro_batches,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=folder is not None and callback is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(), ckpt_path=saves[-1] if saves else None)
    return callback, module
