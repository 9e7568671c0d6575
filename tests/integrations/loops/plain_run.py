# ruff: noqa: T201 - scripts print
"""A loop of one's own, on one rank or on several with DDP or FSDP2, that goes on from its checkpoint when restarted.

Usage: ``plain_run.py FOLDER POLICY [fsdp2]``, the policy being ``reset``, ``dense`` or ``bare`` without regimewrap.
Prints each update's loss, and the decisions and the weights' fingerprint at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import UPDATES, bare, batch, digest, policy_named, sgd, trace, wrapped
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

from regimewrap import RegimeCycler

SAVE_EVERY = 3  # also between two decisions

folder, policy = Path(sys.argv[1]), policy_named(sys.argv[2])
file = folder / "checkpoint.pt"
many, fsdp2 = "WORLD_SIZE" in os.environ, sys.argv[3:] == ["fsdp2"]
if many:
    dist.init_process_group("gloo")
rank = dist.get_rank() if many else 0

model = bare("functions") if policy is None else wrapped("functions", policy)
if fsdp2:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = sgd(model)
cycler = None if policy is None else RegimeCycler(model)
done = 0
if file.exists():
    checkpoint = torch.load(file, weights_only=True)
    parts = {"model_state_dict": checkpoint["model"], "optim_state_dict": checkpoint["optimizer"]}
    set_state_dict(model, optimizer, **parts, options=StateDictOptions(full_state_dict=True))
    cycler.load_state_dict(checkpoint["cycler"])
    done = checkpoint["done"]
if cycler is not None:
    cycler.check_sync()
net = nn.parallel.DistributedDataParallel(model) if many and not fsdp2 else model

for update in range(done, UPDATES):
    x, y = batch(update, rank)
    loss = mse_loss(net(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if cycler is not None:
        cycler.step(loss)
    if cycler is not None and (update + 1) % SAVE_EVERY == 0:
        weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        state = {"model": weights, "optimizer": moments, "done": update + 1}
        state["cycler"] = cycler.state_dict(all_ranks=True)
        if rank == 0:
            torch.save(state, folder / "saving")
            os.replace(folder / "saving", file)  # noqa: PTH105 - all of it or nothing
    print(update, loss.item().hex())
print(json.dumps({"trace": trace(cycler) if cycler else [], "digest": digest(model)}))
if many:
    dist.destroy_process_group()
