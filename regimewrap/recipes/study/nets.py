"""The networks of a study's tasks, each at any width, and the width that fits a share of the full one's size.

Plain PyTorch that knows nothing of gates. Every activation is a module of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regimewrap.recipes.study.spec import Images, Mnist1d
from regimewrap.recipes.wide_resnet import WideResNet, parse_arch

if TYPE_CHECKING:
    from collections.abc import Callable

    from regimewrap.recipes.study.spec import Characters
    from regimewrap.recipes.study.tasks import Data

_HEAD = 32  # units of an attention head at full width
_FINEST = 64  # widths that are tried


def build(task: Mnist1d | Images | Characters, data: Data, width: float = 1.0) -> nn.Module:
    """Return a new network for a task, ``width`` times as wide; PyTorch's global generator draws its weights."""
    if isinstance(task, Mnist1d):
        return Convolutions(max(1, round(task.channels * width)), data.classes)
    if isinstance(task, Images) and task.arch.startswith("mlp-"):
        layers, units = map(int, task.arch.split("-")[1:])
        return hidden_layers(data.x[0].numel(), layers, max(1, round(units * width)), data.classes)
    if isinstance(task, Images):
        depth, wide = parse_arch(task.arch)
        return WideResNet(depth, wide * width, data.classes, in_channels=data.x.shape[1], norm=task.norm)
    heads = max(1, task.width // _HEAD)
    units = max(1, round(task.width * width / heads)) * heads
    return CharacterModel(data.classes, task.layers, units, heads, task.context, task.activation)


def multiply_adds(model: nn.Module, data: Data) -> int:
    """Return the multiply-adds of one sample's forward pass."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(data.inputs(torch.tensor([0]))[0])
    return counter.get_total_flops() // 2


def parameters(model: nn.Module, data: Data) -> int:  # noqa: ARG001 - one signature for both measures
    """Return the number of parameters."""
    return sum(each.numel() for each in model.parameters())


def fitting_width(make: Callable[[float], nn.Module], share: float, measure: Callable[[nn.Module], int]) -> float:
    """Return the largest width, in 64ths, whose network measures at most ``share`` of the full one; at least 1/64."""
    if share >= 1.0:
        return 1.0
    limit = share * measure(make(1.0))
    low, high = 1, _FINEST  # networks grow with their width
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(make(middle / _FINEST)) <= limit else (low, middle - 1)
    return low / _FINEST


def hidden_layers(inputs: int, layers: int, units: int, classes: int) -> nn.Sequential:
    """Return a network of ``layers`` hidden layers, each of ``units`` units and a ReLU, and a linear classifier."""
    parts: list[nn.Module] = [nn.Flatten()]
    for _ in range(layers):
        parts += [nn.Linear(inputs, units), nn.ReLU()]
        inputs = units
    return nn.Sequential(*parts, nn.Linear(inputs, classes))


@final
class Convolutions(nn.Module):
    """Three convolutions of ``channels`` channels and stride 2 over 40 points, and a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, channels, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(5 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map signals of shape (batch, 1, 40) to logits of shape (batch, classes)."""
        logits: Tensor = self.classifier(self.body(x))
        return logits


@final
class CharacterModel(nn.Module):
    """A causal transformer: RMSNorm before each part, learned positions, MLPs four times as wide as the stream."""

    def __init__(
        self,
        classes: int,
        layers: int,
        width: int,
        heads: int,
        context: int,
        activation: Literal["relu", "gelu", "swiglu"],
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, activation) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters, int64 of shape (batch, time), to logits of shape (batch, time, classes)."""
        logits: Tensor = self.classifier(self.norm(self.blocks(self.embed(x) + self.position[: x.shape[1]])))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = _GatedMlp(width) if activation == "swiglu" else _Mlp(width, activation)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.ReLU() if activation == "relu" else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class _GatedMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.up, self.gate, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return out
