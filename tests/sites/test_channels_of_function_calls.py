"""Position scope finds the channels of a function call from the code that makes what it is called with."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from regimewrap import GatePolicy, RegimePolicy, plan

POSITION = RegimePolicy(gate=GatePolicy(scope="position"))


class Both(nn.Module):
    """Convolution and projection in one module, so that its layers alone do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(8, 8, 3), nn.Linear(8, 16)


class AfterConvolution(Both):
    def forward(self, x):
        return self.linear(F.gelu(self.conv(x)).transpose(1, 2))


class AfterLinear(Both):
    def forward(self, x):
        x = self.linear(x)
        x = x.float()
        return F.silu(x[:, :5]).to(x.dtype)


class AfterFunction(Both):
    def forward(self, x):
        out = F.conv1d(
            x,
            self.conv.weight,
        )[:, :, :4]
        out = out.contiguous()
        return out.relu()


class AfterChunks(Both):
    def forward(self, x):
        value, gate = self.linear(x).transpose(1, 2).chunk(2, dim=1)
        return F.silu(gate) * value


class AfterOneChunk(Both):
    def forward(self, x):
        parts = self.linear(x).split(8, -1)
        value, gate = parts
        return F.silu(gate) * value


class AfterTranspose(Both):
    def forward(self, x):
        return F.silu(self.linear(x).transpose(1, 2))


class OfItself(Both):
    def forward(self, x):
        for _ in range(2):
            x = F.silu(x)
        return self.linear(x)


@pytest.mark.parametrize(
    ("make", "dim"),
    [
        (AfterConvolution, 1),
        (AfterLinear, -1),
        (AfterFunction, 1),
        (AfterChunks, 1),
        (AfterOneChunk, -1),
        (AfterTranspose, 1),
    ],
)
def test_the_dimension_is_that_of_the_layer_before(make, dim):
    assert plan(make(), POSITION).gated[0].site.channel_dim == dim


def test_where_layers_disagree_and_nothing_tells_the_plan_asks():
    (row,) = plan(OfItself(), POSITION).unreachable
    assert "set gate.channel_dim" in row.why


def test_a_dimension_that_the_policy_sets_wins():
    policy = RegimePolicy(gate=GatePolicy(scope="position", channel_dim=2))
    assert plan(AfterConvolution(), policy).gated[0].site.channel_dim == 2


def test_other_scopes_ask_for_no_dimension():
    assert plan(AfterConvolution()).gated[0].site.channel_dim is None
