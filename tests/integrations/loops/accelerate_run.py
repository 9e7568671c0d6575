# ruff: noqa: T201 - scripts print
"""A loop with Accelerate and gradient accumulation, on one process or several; usage and output as ``plain_run.py``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from regimewrap.integrations.accelerate import AccelerateCycler
from tiny import UPDATES, bare, batch, digest, policy_named, sgd, trace, wrapped
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

SAVE_EVERY = 3  # also between two decisions
MICRO_BATCHES = 2
UPDATES_PER_EPOCH = 10


class Samples(Dataset):
    def __len__(self) -> int:
        return 4 * MICRO_BATCHES * UPDATES_PER_EPOCH * accelerator.num_processes

    def __getitem__(self, number: int) -> object:
        x, y = batch(number)
        return x[0], y[0]


folder, policy = Path(sys.argv[1]), policy_named(sys.argv[2])
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
model = bare() if policy is None else wrapped(policy=policy)
model, optimizer, loader = accelerator.prepare(model, sgd(model), DataLoader(Samples(), batch_size=4))
cycler = None if policy is None else AccelerateCycler(accelerator, model)
saves = sorted(int(path.name) for path in folder.glob("[0-9]*"))
if saves:
    accelerator.load_state(str(folder / str(saves[-1])))
update = cycler.cycler.updates if cycler is not None else 0

while update < UPDATES:
    seen = update % UPDATES_PER_EPOCH * MICRO_BATCHES
    for x, y in accelerator.skip_first_batches(loader, seen) if seen else loader:
        with accelerator.accumulate(model):
            loss = mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if cycler is not None:
                cycler.step(loss)
        if not accelerator.sync_gradients:
            continue
        update += 1
        if cycler is not None and update % SAVE_EVERY == 0:
            accelerator.save_state(str(folder / "saving"))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                os.replace(folder / "saving", folder / str(update))  # noqa: PTH105 - all of it or nothing
            accelerator.wait_for_everyone()
        print(update, loss.item().hex())
        if update == UPDATES:
            break
decisions = [] if cycler is None else trace(cycler.cycler)
print(json.dumps({"trace": decisions, "digest": digest(accelerator.unwrap_model(model))}))
