"""Activations in functions that a method calls: no mechanism reaches them, so they are reported."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regimewrap import RegimePolicy, SitePolicy, plan, wrap
from regimewrap.errors import UnreachableSiteError


def scan(x):
    return F.silu(x) * 2


class CallsFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x):
        return scan(self.act(self.linear(x)))


def test_they_are_reported():
    row = next(row for row in plan(CallsFunction()).rows if row.activation.kind == "silu")
    assert row.selected
    assert not row.gated
    assert "scan" in row.why
    with pytest.raises(UnreachableSiteError, match=r"forward\.scan\.silu"):
        wrap(CallsFunction())


def test_they_can_be_left_alone():
    model = wrap(CallsFunction(), RegimePolicy(sites=SitePolicy(exclude=("*.scan.*",))))
    assert model(torch.randn(1, 4)).shape == (1, 4)
