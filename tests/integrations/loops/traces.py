# ruff: noqa: T201 - scripts print
"""Many updates under one way of sharing a model between ranks; prints the decisions and who differs, as lines of JSON.

Each rank has its own data, and rank 1's loss is NaN now and then. Several ways can be named; they run one after the
other in the same processes.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta

import torch.distributed as dist
from tiny import digest, loss_of, sgd, trace, wrapped
from torch import nn

from regimewrap import RegimeCycler

UPDATES = int(sys.argv[1])


def ddp(kind: str) -> tuple[nn.Module, RegimeCycler]:
    model = nn.parallel.DistributedDataParallel(wrapped(kind))
    return model, RegimeCycler(model)


def fsdp2(kind: str) -> tuple[nn.Module, RegimeCycler]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = wrapped(kind)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, RegimeCycler(model)


def torch_loop(way: str, kind: str) -> tuple[RegimeCycler, str]:
    model, cycler = {"ddp": ddp, "fsdp2": fsdp2}[way](kind)
    optimizer, me = sgd(model), dist.get_rank()
    for update in range(UPDATES):
        loss = loss_of(model, update, me)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cycler.step(loss)
    return cycler, digest(model)


def accelerate_loop() -> tuple[RegimeCycler, str]:
    from accelerate import Accelerator
    from regimewrap.integrations.accelerate import AccelerateCycler

    accelerator = Accelerator(cpu=True)
    model = wrapped()
    model, optimizer = accelerator.prepare(model, sgd(model))
    cycler = AccelerateCycler(accelerator, model)
    for update in range(UPDATES):
        loss = loss_of(model, update, accelerator.process_index)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        cycler.step(loss)
    return cycler.cycler, digest(model)


def lightning_loop() -> tuple[RegimeCycler, str]:
    from lightning_tiny import fit

    callback, model = fit(UPDATES)
    return callback.cycler, digest(model)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name in sys.argv[2:]:
        way, _, kind = name.partition("-")
        loops = {"accelerate": accelerate_loop, "lightning": lightning_loop}
        cycler, weights = loops[way]() if way in loops else torch_loop(way, kind or "modules")
        mine = {"trace": trace(cycler), "skipped": cycler.skipped, "digest": weights, "ratio": float(cycler.keep_ratio)}
        everyone: list[dict[str, object]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if dist.get_rank() == 0:
            print(json.dumps({"way": name, "ranks": everyone}), flush=True)
    dist.destroy_process_group()
