"""regimewrap on many processes, each with data of its own, that goes on from its checkpoint. Ten seconds.

Needs nothing more than regimewrap; the data is generated. Start it, kill it, and start it again with
``torchrun --standalone --nproc-per-node=2 examples/ddp.py run.pt``. Without torchrun it is one process, and without a
file's name nothing is saved.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import regimewrap

STEPS, SAVE_EVERY = 1000, 100


def main() -> None:
    """Train on all ranks with one keep ratio."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")  # "nccl" on GPUs, after torch.cuda.set_device
    rank = dist.get_rank() if dist.is_initialized() else 0
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    regimewrap.wrap(model, "loss-reset")  # before DDP or fully_shard
    cycler = regimewrap.RegimeCycler(model, total_steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    if file and file.exists():
        saved = torch.load(file, weights_only=True)
        for part, state in zip((model, optimizer, cycler), saved, strict=True):
            part.load_state_dict(state)
    cycler.check_sync()  # have all ranks loaded the same?
    net = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    for step in range(cycler.updates, STEPS):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step * 1000 + rank))
        loss = (net(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        regime = cycler.step(loss)
        if file and (step + 1) % SAVE_EVERY == 0:
            state = [model.state_dict(), optimizer.state_dict(), cycler.state_dict(all_ranks=True)]  # on all ranks
            if rank == 0:
                torch.save(state, file.with_suffix(".saving"))
                file.with_suffix(".saving").replace(file)  # so that the file is whole whenever we are killed
        if rank == 0 and (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, keep ratio {regime.keep_ratio:.2f}, cycle {regime.cycle}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
