"""Plain functions with activations in them, and models whose methods call them; a fresh process can import it."""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class ByName(OrderedDict):
    """Gives a new activation for a name, as Hugging Face's ``ACT2FN`` does."""

    def __getitem__(self, name):
        cls, options = content if isinstance(content := super().__getitem__(name), tuple) else (content, {})
        return cls(**options)


ACTIVATIONS = ByName(relu=nn.ReLU, silu=nn.SiLU, tanh=nn.Tanh, leaky=(nn.LeakyReLU, {"negative_slope": 0.3}))


def passed_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name != "unknown"}
        return function(*args, **kwargs)

    return wrapper


def replaced(function):
    """As where a kernel is installed: something else is called."""

    def kernel(x):
        return F.silu(x)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) if torch.compiler.is_exporting() else kernel(*args, **kwargs)

    return wrapper


def looked_at(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        assert args[0].dim() > 1
        return function(*args, **kwargs)

    return wrapper


def plain(x):
    return F.silu(x)


def of_relu(x, scale=2.0):
    return scale * F.relu(x)


def nested(x, *, extra=0):
    y = of_relu(x) + extra
    return plain(y)


@passed_on
@passed_on
def decorated(x, activation="tanh", **kwargs):
    assert not kwargs
    if activation is not None:
        x = ACTIVATIONS[activation](x)
    return x


def made(x):
    return nn.GELU()(x)


def counting_down(x, times):
    return x if times == 0 else counting_down(F.gelu(x) + 1, times - 1)


@replaced
def fused(x):
    return F.silu(x)


@looked_at
def inspected(x):
    return F.silu(x)


def convolved(x, weight, bias, activation=None):
    """As Mamba's: channels are dimension 1."""
    length = x.shape[-1]
    out = F.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=weight.shape[0])
    out = out[:, :, :length]
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out.to(x.dtype)


def scan(x, z=None):
    out = x.cumsum(-1)
    if z is not None:
        out = out * F.silu(z)
    return out


def spelled_out(x):
    return x * torch.sigmoid(1.7 * x)


def in_place(x):
    F.relu(x, inplace=True)
    return x


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.activation = "silu"


class CallsPlain(Base):
    def forward(self, x):
        return plain(self.linear(x))


class CallsRelu(Base):
    def forward(self, x):
        return of_relu(scale=3.0, x=self.linear(x))


class CallsNested(Base):
    def forward(self, x):
        x = F.gelu(self.linear(x))
        return nested(x, extra=1)


class CallsDecorated(Base):
    def forward(self, x, **kwargs):
        return decorated(self.linear(x), unknown=1, activation=self.activation, **kwargs)


class CallsMade(Base):
    def forward(self, x):
        return made(self.linear(x))


class CallsItself(Base):
    def forward(self, x):
        return counting_down(self.linear(x), 3)


class CallsTwice(Base):
    def forward(self, x):
        x = plain(self.linear(x))
        return [plain(each) for each in (x, self.linear(x))][1]


class HoldsFunction(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = nested

    def forward(self, x):
        return self.act(self.linear(x), extra=2)


class CallsStatic(Base):
    @staticmethod
    def act(x):
        return F.elu(x)

    def forward(self, x):
        return self.act(self.linear(x)) + CallsStatic.act(x)


class CallsInPlace(Base):
    def forward(self, x):
        return in_place(self.linear(x))


class CallsSwish(Base):
    def forward(self, x):
        return spelled_out(self.linear(x))


class CallsFused(Base):
    def forward(self, x):
        return fused(self.linear(x))


class CallsInspected(Base):
    def forward(self, x):
        return inspected(self.linear(x))


class Mixer(nn.Module):
    """A little Mamba: causal, with convolution and projections in one module."""

    def __init__(self, width=8) -> None:
        super().__init__()
        self.activation = "silu"
        self.in_proj = nn.Linear(width, 2 * width)
        self.conv1d = nn.Conv1d(width, width, 3, groups=width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        both = self.in_proj(x).transpose(1, 2)
        x, gate = both.chunk(2, dim=1)
        x = convolved(x, self.conv1d.weight, self.conv1d.bias, activation=self.activation)
        return self.out_proj(scan(x, z=gate).transpose(1, 2))


CALLERS = [
    CallsSwish,
    HoldsFunction,
    CallsStatic,
    CallsPlain,
    CallsRelu,
    CallsNested,
    CallsDecorated,
    CallsMade,
    CallsTwice,
    CallsInPlace,
]
