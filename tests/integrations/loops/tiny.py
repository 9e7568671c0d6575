"""What the loops in this folder train, small enough for thousands of updates, and how their results are compared."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regimewrap
from regimewrap import RegimeCycler, RegimePolicy

# Falls and resets often. The losses are noisy, so that the ranks' own signals would disagree about when.
POLICY = RegimePolicy().replace(
    cycle={
        "strategy": {"kind": "ema-reset", "decay": 0.9, "tolerance": 0.01, "cooldown": 1},
        "every": 5,
        "guarded": False,
    }
)


class Functional(nn.Module):
    """Its activation is a function, so that wrapping rewrites a method and changes the class."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


def bare(kind: str = "modules") -> nn.Module:
    torch.manual_seed(0)
    return Functional() if kind == "functions" else nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def wrapped(kind: str = "modules", policy: RegimePolicy = POLICY) -> nn.Module:
    return regimewrap.wrap(bare(kind), policy)


def batch(number: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Return a batch that depends on nothing but its number and the rank."""
    draw = torch.Generator().manual_seed(1000 * number + rank)
    x = torch.randn(4, 8, generator=draw)
    return x, x[:, :1].abs() + (1 + rank) * torch.randn(4, 1, generator=draw)


def loss_of(model: nn.Module, number: int, rank: int = 0) -> Tensor:
    x, y = batch(number, rank)
    return with_nan(F.mse_loss(model(x), y), number, rank)


def with_nan(loss: Tensor, number: int, rank: int) -> Tensor:
    """Return the loss, which on rank 1 is NaN now and then; its gradient is what it was."""
    return loss + math.nan if rank == 1 and number % 7 == 0 else loss


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def trace(cycler: RegimeCycler) -> list[list[object]]:
    """Return all decisions, their numbers bit for bit."""
    return [[d.step, d.keep_ratio.hex(), d.event, d.cycle, d.signal and d.signal.hex()] for d in cycler.history]


def digest(model: nn.Module) -> str:
    """Return a fingerprint of all parameters, bit for bit; of what this rank has of them under FSDP2."""
    seen = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        seen.update(name.encode() + local.detach().numpy().tobytes())
    return seen.hexdigest()


UPDATES = 100


def policy_named(name: str) -> RegimePolicy | None:
    return {"reset": POLICY, "dense": RegimePolicy.preset("dense"), "bare": None}[name]
