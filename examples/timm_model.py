"""regimewrap in a training loop of timm's parts: task, averaged model, checkpoint. About ten seconds on one core.

Needs ``pip install -e '.[demo,timm]'`` in a checkout. Run it with ``python examples/timm_model.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import timm
import torch
from regimewrap.integrations.timm import RegimeTask
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn

EPOCHS, BATCH, TRAINING_IMAGES = 12, 25, 300


def make_task() -> RegimeTask:
    """Return the task: timm's ``ClassificationTask``, with the gate and the cycler in it."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    return RegimeTask(model, nn.CrossEntropyLoss(), policy="mixed")


def main() -> None:
    """Train, save, resume."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[:TRAINING_IMAGES] / 16
    labels = torch.tensor(digits.target)[:TRAINING_IMAGES]
    task = make_task()
    task.setup_ema(decay=0.9)
    optimizer = create_optimizer_v2(task.trainable_module, "adamw", lr=0.003)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(TRAINING_IMAGES).split(BATCH):
            loss = task(images[batch], labels[batch])["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()  # timm's loops call this once per update; here it also steps the cycler
        print(f"epoch {epoch}: loss {loss:.3f}, keep ratio {task.cycler.keep_ratio:.2f}, {task.regime.phase}")
    with tempfile.TemporaryDirectory() as folder:
        CheckpointSaver(task.trainable_module, optimizer, checkpoint_dir=folder, task=task).save_checkpoint(
            0, metric=0.0
        )
        resumed = make_task()
        resume_task_checkpoint(resumed, str(Path(folder) / "last.pth.tar"))
    print(f"resumed after {resumed.cycler.updates} updates, at keep ratio {resumed.cycler.keep_ratio:.2f}")


if __name__ == "__main__":
    main()
