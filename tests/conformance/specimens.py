"""One small network in three writings, one for each mechanism, and what it computes when it is gated by hand.

A module of its own, so that a fresh process can read files with these networks in them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy
from regimewrap.topk import reference

#: Eval mode too follows the ratio, so that networks can be compared without a training step's side effects.
POLICY = RegimePolicy(gate=GatePolicy(eval_keep_ratio="current"))


class Layers(nn.Module):
    """The parameters, under the same names in each writing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 20)
        self.head = nn.Linear(20, 5)


class Hooked(Layers):
    """Its activations are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.act2 = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.head(self.act2(self.hidden(x.mean((2, 3)))))


class Traced(Layers):
    """Its activations are functions in straight-line code."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


class Rewritten(Layers):
    """Its activations are functions in code that depends on its input."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.norm(self.conv(x))
        if scale is not None:
            x = x * scale
        x = F.relu(x)
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))


WRITINGS = [Hooked, Traced, Rewritten]


def bare(make: type[nn.Module]) -> nn.Module:
    """Return a network with the weights that it has in every writing, not wrapped, in eval mode."""
    torch.manual_seed(0)
    return make().eval()


def wrapped(make: type[nn.Module], keep_ratio: float = 0.3, policy: RegimePolicy = POLICY) -> nn.Module:
    """Return the same network, wrapped, at a small budget."""
    model = regimewrap.wrap(bare(make), policy)
    regimewrap.gate_of(model).set_keep_ratio(keep_ratio)
    return model


def by_hand(model: nn.Module, x: Tensor, keep_ratio: float = 0.3) -> Tensor:
    """Return what a network with the layers of ``model`` gives, gated by the reference."""
    x = F.relu(model.norm(model.conv(x)))
    x = x * reference.kept(x, keep_ratio)
    x = F.gelu(model.hidden(x.mean((2, 3))))
    return model.head(x * reference.kept(x, keep_ratio))


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor | None]:
    """Return the gradients of a scalar of ``output``, and leave none behind."""
    model.zero_grad(set_to_none=True)
    (output * torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape).cos()).sum().backward()
    found = {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    """Assert that two sets of gradients are equal up to rounding."""
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}")
