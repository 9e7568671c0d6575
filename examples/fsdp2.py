"""regimewrap with FSDP2: parameters sharded over the ranks, one keep ratio on all. Ten seconds.

Needs regimewrap alone. Run it with ``torchrun --standalone --nproc-per-node=2 examples/fsdp2.py``.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import regimewrap

STEPS, BATCH = 400, 32


class Block(nn.Module):
    """Its activation is a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of ``x``."""
        return self.down(nn.functional.relu(self.up(x)))


def main() -> None:
    """Wrap, shard, train."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), Block(32), Block(32), nn.Linear(32, 1))
    regimewrap.wrap(model, "loss-reset")  # before fully_shard
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")  # "nccl" on GPUs, after torch.cuda.set_device, and a mesh of "cuda"
        for block in (model[1], model[2], model):
            fully_shard(block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    rank = dist.get_rank() if dist.is_initialized() else 0
    cycler = regimewrap.RegimeCycler(model, total_steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    for step in range(STEPS):
        x = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step * 1000 + rank))
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        regime = cycler.step(loss)
        if rank == 0 and (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss:.3f}, keep ratio {regime.keep_ratio:.2f}, cycle {regime.cycle}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
