"""Position scope keeps the largest channels at each position, in whatever layout a module computes."""

from __future__ import annotations

import linecache
from typing import Any

import pytest
import torch
from torch import nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy, plan, wrap

POSITION = RegimePolicy(gate=GatePolicy(scope="position"))
IMAGES, SEQUENCES, TOKENS, LAST, VIDEOS = (2, 3, 4, 5), (2, 3, 6), (2, 6, 3), (2, 4, 5, 3), (2, 3, 2, 4, 5)


class ChannelsFirstNorm(nn.LayerNorm):
    """As Hugging Face's for images."""

    data_format = "channels_first"

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FlatNorm(nn.Module):
    """A linear layer with batch normalisation over all tokens, as LeViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Spatial(nn.Module):
    """A depthwise convolution between tokens, as PVT's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        x = x.transpose(1, 2).view(x.shape[0], 8, 2, 3)
        return self.conv(x).flatten(2).transpose(1, 2)


TABLE = [
    ("self.act(self.a(x))", IMAGES, 1, [nn.Conv2d(3, 8, 1)]),
    ("self.act(self.a(x))", SEQUENCES, 1, [nn.Conv1d(3, 8, 1)]),
    ("self.act(self.a(x))", VIDEOS, 1, [nn.Conv3d(3, 8, 1)]),
    ("self.act(self.a(x))", IMAGES, 1, [nn.ConvTranspose2d(3, 8, 2)]),
    ("self.act(self.a(x))", TOKENS, 2, [nn.Linear(3, 8)]),
    ("self.act(self.a(x))", LAST, 3, [nn.Linear(3, 8)]),
    ("self.act(self.b(self.a(x)))", IMAGES, 1, [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)]),
    ("self.act(self.b(self.a(x)))", IMAGES, 1, [nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)]),
    ("self.act(self.b(self.a(x)))", IMAGES, 1, [nn.Conv2d(3, 8, 1), ChannelsFirstNorm(8)]),
    ("self.act(self.a(x).permute(0, 2, 3, 1))", IMAGES, 3, [nn.Conv2d(3, 8, 1)]),
    ("self.act(self.b(self.a(x).permute(0, 2, 3, 1)))", IMAGES, 3, [nn.Conv2d(3, 8, 1), nn.LayerNorm(8)]),
    ("self.act(self.a(x).permute(0, 3, 1, 2))", LAST, 1, [nn.Linear(3, 8)]),
    ("self.act(self.a(x).transpose(1, 2))", SEQUENCES, 2, [nn.Conv1d(3, 8, 1)]),
    ("self.act(self.a(x).transpose(-1, -2))", TOKENS, 1, [nn.Linear(3, 8)]),
    ("self.act(self.a(x).flatten(2).transpose(1, 2))", IMAGES, 2, [nn.Conv2d(3, 8, 1)]),
    ("self.act(self.b(self.a(x).transpose(1, 2)).transpose(1, 2))", SEQUENCES, 1,
     [nn.Conv1d(3, 8, 1), nn.LayerNorm(8)]),
    ("self.act(self.b(self.a(x).transpose(-2, -1)).transpose(-2, -1))", SEQUENCES, 1,
     [nn.Conv1d(3, 8, 1), nn.LayerNorm(8)]),
    ("self.act(self.a(x)) * self.b(x.transpose(1, 2)).transpose(1, 2)", TOKENS, 2,
     [nn.Linear(3, 8), nn.Conv1d(3, 8, 1)]),
    ("self.act(self.a(x).chunk(2, dim=1)[0])", IMAGES, 1, [nn.Conv2d(3, 16, 1)]),
    ("self.act(self.a(x)[..., :8])", TOKENS, 2, [nn.Linear(3, 16)]),
    ("self.act(self.b(self.a(x)))", TOKENS, 2, [FlatNorm(), nn.Dropout(0.0)]),
    ("self.act(self.b(self.a(x)))", TOKENS, 2, [nn.Linear(3, 8), Spatial()]),
]  # fmt: skip


def layout(code: str, layers: list[nn.Module]) -> nn.Module:
    """Return a module with this expression in its forward, as if it stood in a file."""
    namespace: dict[str, Any] = {"nn": nn}
    source = f"""
class Layout(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.act = nn.GELU()
        for name, layer in zip("abc", layers):
            self.add_module(name, layer)
    def forward(self, x):
        return {code}
"""
    name = f"<{code} {layers}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)  # noqa: S102  the expression is the parameter
    return namespace["Layout"](layers)


@pytest.mark.parametrize(("code", "shape", "dim", "layers"), TABLE, ids=lambda each: str(each)[:60])
def test_at_each_position_the_largest_channels_are_kept(code, shape, dim, layers):
    inner = layout(code, layers)
    wrap(nn.Sequential(inner), POSITION)
    kept = []
    inner.act.register_forward_hook(lambda module, args, output: kept.append(output != 0))  # noqa: ARG005
    with regimewrap.at_keep_ratio(inner, 0.25), torch.no_grad():
        inner.eval()(torch.randn(shape))
    (mask,) = kept
    assert mask.shape[dim] == 8
    assert (mask.sum(dim) == 2).all()


def test_an_asked_for_dimension_wins():
    policy = RegimePolicy(gate=GatePolicy(scope="position", channel_dim=2))
    (row,) = plan(layout(TABLE[0][0], TABLE[0][3]), policy)
    assert row.site.channel_dim == 2
