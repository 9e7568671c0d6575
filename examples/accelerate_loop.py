"""regimewrap in a loop with Accelerate and gradient accumulation. Ten seconds on one core.

Needs ``pip install -e '.[accelerate]'`` in a checkout. The data is generated.
``python examples/accelerate_loop.py`` runs it on one process, ``accelerate launch --cpu --num_processes 2``
instead of ``python`` on two.
"""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from regimewrap.integrations.accelerate import AccelerateCycler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regimewrap

EPOCHS, SAMPLES, BATCH, MICRO_BATCHES = 20, 1024, 16, 2


def main() -> None:
    """Train, save in the middle, and go on from there."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    set_seed(0)
    x = torch.randn(SAMPLES, 16)
    loader = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=BATCH, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    steps = EPOCHS * SAMPLES // (BATCH * MICRO_BATCHES * accelerator.num_processes)
    regimewrap.wrap(model)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.02), loader)
    cycler = AccelerateCycler(accelerator, model, "loss-reset", total_steps=steps)

    folder = broadcast_object_list([tempfile.mkdtemp()])[0]
    for epoch in range(EPOCHS):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                cycler.step(loss)
        if epoch == EPOCHS // 2:
            accelerator.save_state(folder)  # the cycle is in it
            accelerator.load_state(folder)
        if epoch % 4 == 3:
            accelerator.print(f"epoch {epoch + 1}: loss {loss:.3f}, keep ratio {cycler.keep_ratio:.2f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
