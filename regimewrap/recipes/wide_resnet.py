"""The Wide Residual Network of the method's experiments, at any depth 6n + 4 and any width.

Plain PyTorch that knows nothing of gates, so that wrapping it proves something. Its activations are either ``nn.ReLU``
modules or ``F.relu`` calls in straight-line methods; both variants have the same parameters under the same names.

Sources: Zagoruyko and Komodakis 2016, arXiv:1605.07146; RMSNorm per pixel over channels as in arXiv:2603.03131.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regimewrap.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_DEPTH = 1000
MAX_WIDTH = 64

_STAGE_CHANNELS = (16, 32, 64)
_ARCH = re.compile(r"wrn-(\d{1,6})-(\d{1,6})")


def parse_arch(text: str) -> tuple[int, int]:
    """Return depth and width of an architecture's name, such as ``"wrn-16-2"``.

    Raises:
        PolicyError: the name does not have that form, or depth or width cannot be built.
    """
    match = _ARCH.fullmatch(text.strip().lower())
    if match is None:
        raise PolicyError(f"arch must look like wrn-DEPTH-WIDTH, for example wrn-16-2; got {text!r}.")
    depth, width = int(match[1]), int(match[2])
    _check_size(depth, width)
    return depth, width


@final
class WideResNet(nn.Module):
    """Pre-activation WRN-``depth``-``width``: a 3×3 stem, three stages of residual blocks, pooling, a linear layer.

    Args:
        depth: 6n + 4 for n blocks a stage: 10, 16, 22, 28, ...
        width: multiplier of the stages' 16, 32 and 64 channels; a fraction is rounded to whole channels.
        num_classes: outputs of the linear layer.
        in_channels: channels of the images.
        norm: ``"rms"`` (per pixel over channels, with gain and bias) or ``"batch"``.
        activation: ``"module"`` (``nn.ReLU`` children) or ``"function"`` (``F.relu`` calls).

    Two ReLUs a block and one before pooling: 25 in WRN-28-4, which has about 5.8 million parameters.

    Raises:
        PolicyError: depth is not 6n + 4, or a size or name is outside what is offered.
    """

    def __init__(
        self,
        depth: int,
        width: float,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        norm: Literal["rms", "batch"] = "rms",
        activation: Literal["module", "function"] = "module",
    ) -> None:
        super().__init__()
        _check_size(depth, width)
        if norm not in _NORMS:
            raise PolicyError(f"norm must be one of {', '.join(_NORMS)}; got {norm!r}.")
        if activation not in _BLOCKS:
            raise PolicyError(f"activation must be one of {', '.join(_BLOCKS)}; got {activation!r}.")
        make_norm, block, head = _NORMS[norm], _BLOCKS[activation], _HEADS[activation]
        blocks_per_stage = (depth - 4) // 6
        channels = _STAGE_CHANNELS[0]
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        for stage, base in enumerate(_STAGE_CHANNELS):
            blocks: list[nn.Module] = []
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                wide = max(1, round(base * width))
                blocks.append(block(channels, wide, stride, make_norm))
                channels = wide
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = head(channels, num_classes, make_norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (batch, in_channels, height, width) to logits of shape (batch, num_classes)."""
        logits: Tensor = self.head(self.stages(self.stem(images)))
        return logits


@final
class RMSNorm2d(nn.Module):
    """Divide each pixel's channels by their root mean square, then apply a gain and a bias for each channel."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape (batch, channels, height, width)."""
        scale = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + self.eps)
        return x * scale * self.weight + self.bias


@final
class _Keep(nn.Module):
    """The shortcut of a block that changes no shape: the block's input, before its first activation."""

    def forward(self, raw: Tensor, active: Tensor) -> Tensor:  # noqa: ARG002  # one signature for both shortcuts
        return raw


@final
class _Project(nn.Module):
    """The shortcut of a block that changes shape: a 1×1 convolution of the block's first activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, raw: Tensor, active: Tensor) -> Tensor:  # noqa: ARG002  # one signature for both shortcuts
        projected: Tensor = self.conv(active)
        return projected


class _BlockParts(nn.Module):
    """What both kinds of block are made of; the kinds differ in how they call ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = make_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        unchanged = stride == 1 and in_channels == out_channels
        self.shortcut = _Keep() if unchanged else _Project(in_channels, out_channels, stride)


@final
class _ModuleBlock(_BlockParts):
    def __init__(self, in_channels: int, out_channels: int, stride: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__(in_channels, out_channels, stride, make_norm)
        self.act1 = nn.ReLU()
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.norm1(x))
        hidden = self.act2(self.norm2(self.conv1(active)))
        out: Tensor = self.shortcut(x, active) + self.conv2(hidden)
        return out


@final
class _FunctionBlock(_BlockParts):
    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        hidden = F.relu(self.norm2(self.conv1(active)))
        out: Tensor = self.shortcut(x, active) + self.conv2(hidden)
        return out


class _HeadParts(nn.Module):
    """What both kinds of head are made of; the kinds differ in how they call ReLU."""

    def __init__(self, channels: int, num_classes: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = make_norm(channels)
        self.classifier = nn.Linear(channels, num_classes)


@final
class _ModuleHead(_HeadParts):
    def __init__(self, channels: int, num_classes: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__(channels, num_classes, make_norm)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.act(self.norm(x)).mean(dim=(2, 3)))
        return logits


@final
class _FunctionHead(_HeadParts):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(F.relu(self.norm(x)).mean(dim=(2, 3)))
        return logits


_NORMS: dict[str, Callable[[int], nn.Module]] = {"rms": RMSNorm2d, "batch": nn.BatchNorm2d}
_BLOCKS: dict[str, type[_BlockParts]] = {"module": _ModuleBlock, "function": _FunctionBlock}
_HEADS: dict[str, type[_HeadParts]] = {"module": _ModuleHead, "function": _FunctionHead}


def _check_size(depth: int, width: float) -> None:
    if depth < 10 or (depth - 4) % 6:
        below = 4 + 6 * max(1, (depth - 4) // 6)
        nearest = f"{below} and {below + 6}" if depth > 10 else "10"
        raise PolicyError(f"depth must be 6n + 4 with n at least 1; got {depth}. Nearest: {nearest}.")
    if depth > MAX_DEPTH:
        raise PolicyError(f"depth must be at most {MAX_DEPTH}; got {depth}.")
    if not 0 < width <= MAX_WIDTH:
        raise PolicyError(f"width must be in 1..{MAX_WIDTH}; got {width}.")
