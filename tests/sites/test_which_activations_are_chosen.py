"""What an activation is for, and where its channels are, decided from what surrounds it."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy, SitePolicy, gate_of, plan, wrap
from regimewrap.errors import PolicyError
from regimewrap.sites.layout import channel_dim


class Weigher(nn.Module):
    """A squeeze-excite branch under a name that says nothing."""

    def __init__(self, channels: int, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, 2, 1)
        self.act = inner or nn.ReLU()
        self.up = nn.Conv2d(2, channels, 1)
        self.last = nn.Sigmoid()

    def forward(self, x):
        return x * self.last(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))


class WeighsInSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.branch(x)


class WeighsByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)

    def forward(self, x):
        weight = torch.sigmoid(self.up(self.act(self.down(x.mean((2, 3))))))
        return x * weight.view(-1, 4, 1, 1)


class Unfollowable(Weigher):
    """The same where tracing stops: only shapes tell."""

    def forward(self, x):
        self.seen = x.shape
        return super().forward(x)


def chosen(model: nn.Module, **kwargs) -> dict[str, bool]:
    return {row.name: row.selected for row in plan(model, **kwargs)}


@pytest.mark.parametrize(
    "branch", [Weigher(4), WeighsInSequential(), WeighsByFunction()], ids=lambda each: type(each).__name__
)
def test_a_branch_that_computes_a_gate_is_left_alone_whatever_its_name(branch):
    rows = {row.name: row for row in plan(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), branch))}
    assert rows["1"].selected
    (inner,) = [row for name, row in rows.items() if name != "1" and row.activation.kind == "relu"]
    assert not inner.selected
    assert "gate" in inner.why


def test_a_hidden_activation_before_an_output_sigmoid_is_gated():
    assert chosen(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid())) == {"1": True, "3": False}


def test_shapes_tell_where_code_cannot_be_followed():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Unfollowable(4))
    assert chosen(model, example_inputs=torch.randn(1, 3, 8, 8))["2.act"] is False


def test_planning_does_not_change_attributes():
    model = nn.Sequential(Unfollowable(3))
    plan(model)
    assert not hasattr(model[0], "seen")


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "regnet_y_400mf"])
def test_squeeze_excite_in_torchvision_is_left_alone(name):
    model = torchvision.models.get_model(name)
    rows = plan(model).rows
    blocks = {path for path, module in model.named_modules() if type(module).__name__ == "SqueezeExcitation"}
    inner = [row for row in rows if row.name.rpartition(".")[0] in blocks]
    assert len(inner) >= 2 * len(blocks) > 0
    assert not any(row.selected for row in inner)
    assert any(row.selected for row in rows)


@pytest.mark.parametrize("name", ["seresnet18", "legacy_seresnet18", "ghostnet_100", "efficientnet_lite0"])
def test_squeeze_excite_in_timm_is_left_alone(name):
    rows = plan(timm.create_model(name)).rows
    assert all(not row.selected for row in rows if ".se." in row.name or ".se_module." in row.name)
    assert sum(row.selected for row in rows) >= 5


def test_an_explicit_pattern_overrides_what_it_is_for():
    policy = RegimePolicy(sites=SitePolicy(include=("2.act",)))
    assert chosen(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Weigher(4)), policy=policy)["2.act"] is True


@pytest.mark.parametrize(
    ("model", "path", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), "2", 1),
        (nn.Sequential(nn.Linear(3, 4), nn.GELU()), "1", -1),
        (nn.Sequential(nn.Sequential(nn.LayerNorm(4), nn.GELU()), nn.Conv2d(4, 4, 1)), "0.1", -1),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)), "0", 1),
        (nn.Sequential(nn.Sequential(nn.ReLU()), nn.Linear(4, 4)), "0.0", -1),
        (nn.Sequential(nn.ReLU()), "0", None),
    ],
)
def test_the_nearest_layer_tells_the_channels(model, path, expected):
    assert channel_dim(model, path) == expected


@pytest.mark.parametrize(("name", "size"), [("swin_t", 32), ("convnext_tiny", 32), ("resnet18", 32), ("vit_b_16", 224)])
def test_position_scope_finds_the_channels_of_known_families(name, size):
    model = torchvision.models.get_model(name)
    wrap(model, RegimePolicy(gate=GatePolicy(scope="position")))
    x = torch.randn(1, 3, size, size)
    with regimewrap.at_keep_ratio(model.eval(), 0.25), regimewrap.watch(model) as seen, torch.no_grad():
        model(x)
    sites = {site.name: site for site in gate_of(model).sites}
    assert seen.density <= 0.26
    assert {site.channel_dim for site in sites.values()} == ({1} if name == "resnet18" else {-1})


def test_unknown_kinds_and_contradictions_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for sites, message in [
        (SitePolicy(kinds=("rellu",)), r"rellu.*relu"),
        (SitePolicy(include=("1",), exclude=("1",)), "both|too"),
        (SitePolicy(multipliers={"1": 0.5, "*": 0.2}), "multipliers"),
    ]:
        with pytest.raises(PolicyError, match=message):
            plan(model, RegimePolicy(sites=sites))


class Branches(nn.Module):
    """The convolution is registered last, but the activation is called with the linear layer's result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.act = nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.GELU()

    def forward(self, x):
        return self.act(self.linear(x)) * self.conv(x.transpose(1, 2)).transpose(1, 2)


class NamedBranches(Branches):
    def forward(self, x):
        y = self.linear(x)
        y = self.act(y)
        z = self.conv(x.transpose(1, 2))
        return y * z.transpose(1, 2)


@pytest.mark.parametrize("make", [Branches, NamedBranches])
def test_the_layer_that_an_activation_is_called_with_tells_the_channels(make):
    assert channel_dim(make(), "act") == -1
