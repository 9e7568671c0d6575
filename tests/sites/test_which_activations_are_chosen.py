"""What an activation is for, and where its channels are, decided from what surrounds it."""

from __future__ import annotations

import linecache

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy, SitePolicy, gate_of, plan, wrap
from regimewrap.errors import PolicyError
from regimewrap.sites.flow.layout import channel_dim


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
    """The same where nothing can be followed: only shapes tell."""

    def forward(self, x):
        for _ in range(len(x)):
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


class SplitAttention(nn.Module):
    """Weighs paths against each other with a softmax, in a module of its own."""

    class Shares(nn.Module):
        def forward(self, x):
            return torch.softmax(x.view(x.shape[0], 2, -1), dim=1)

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.act0 = nn.Conv2d(4, 8, 1), nn.ReLU()
        self.down, self.act1, self.up = nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1)
        self.shares = self.Shares()

    def forward(self, x):
        x = self.act0(self.wide(x))
        batch, _, height, width = x.shape
        if batch < 1:
            raise ValueError("empty")
        x = x.reshape(batch, 2, 4, height, width)
        pooled = x.sum(1).mean((2, 3), keepdim=True)
        shares = self.shares(self.up(self.act1(self.down(pooled))))
        return (x * shares.view(batch, 2, 4, 1, 1)).sum(1)


class SelectiveKernels(nn.Module):
    """The weights are computed by a child that asserts, the paths by a list of modules."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.act, self.up = nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1)

        def forward(self, x):
            assert x.shape[1] == 2
            x = self.up(self.act(self.down(x.sum(1).mean((2, 3), keepdim=True))))
            return torch.softmax(x.view(x.shape[0], 2, 4, 1, 1), dim=1)

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2)])
        self.attn = self.Attention()

    def forward(self, x):
        x = torch.stack([path(x) for path in self.paths], dim=1)
        return torch.sum(x * self.attn(x), dim=1)


class GlobalContext(nn.Module):
    """Adds what attention pooling over positions found, without a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(4, 1, 1)
        self.mlp = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1))

    def forward(self, x):
        batch, channels = x.shape[:2]
        weights = torch.softmax(self.weigh(x).reshape(batch, 1, -1), dim=-1).unsqueeze(3)
        context = (x.reshape(batch, channels, -1).unsqueeze(1) @ weights).view(batch, channels, 1, 1)
        return x + self.mlp(context)


class FocalContext(nn.Module):
    """The activation itself is pooled, then multiplied with features."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.act = nn.Conv2d(4, 8, 1), nn.GELU()

    def forward(self, x):
        context, gates = torch.split(self.mix(x), 4, 1)
        return x * (context * gates + self.act(context.mean((2, 3), keepdim=True)) * gates)


class Spelled(nn.Module):
    """Squeeze-excite by function calls in one method."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x):
        weight = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return 2 * weight[:, :, None, None] * x


def test_calls_of_one_function_in_one_method_are_told_apart():
    class Mixed(Spelled):
        def forward(self, x):
            x = F.relu(x) + 1
            return (
                F.relu(super().forward(x)) * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[..., None, None]
            )

    assert chosen(Mixed()) == {
        "forward.relu": True,
        "forward.relu_2": True,
        "forward.relu_3": False,
        "forward.sigmoid": False,
        "Spelled.forward.relu": False,
        "Spelled.forward.sigmoid": False,
    }

    class Apart(Spelled):
        def forward(self, x):
            x = F.relu(x)
            return F.relu(x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[..., None, None])

    assert chosen(Apart()) == {
        "forward.relu": True,
        "forward.relu_2": False,
        "forward.relu_3": True,
        "forward.sigmoid": False,
    }


@pytest.mark.parametrize(
    ("branch", "features"),
    [(SplitAttention, ["1.act0"]), (SelectiveKernels, ["1.paths.0.1", "1.paths.1.1"]), (GlobalContext, []),
     (FocalContext, []), (Spelled, [])],
)  # fmt: skip
def test_a_gate_is_told_by_what_it_does_to_features_with_or_without_a_sigmoid(branch, features):
    rows = plan(nn.Sequential(nn.Conv2d(3, 4, 1), branch(), nn.ReLU())).rows
    assert [row.name for row in rows if row.selected] == [*features, "2"]
    inner = [row for row in rows if row.activation.kind in ("relu", "gelu") and not row.selected]
    assert inner
    assert all("a gate in" in row.why for row in inner)


@pytest.mark.parametrize("branch", [SplitAttention, SelectiveKernels, GlobalContext, FocalContext, Spelled])
def test_wrap_and_verify_agree_on_what_is_left_alone(branch):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), branch(), nn.ReLU()), torch.randn(2, 3, 4, 4)
    wrap(model, example_inputs=x)
    assert not regimewrap.verify(model, x).escaped


class Depth(nn.Module):
    """A sigmoid that is scaled by a number is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
        self.limit, self.scale = 10, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.sigmoid(self.head(x)) * self.limit * self.scale


class PooledHead(nn.Module):
    """A residual block on pooled features makes features of them."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.last = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3)), nn.Linear(3, 2)

    def forward(self, x):
        x = x.mean((2, 3))
        return torch.softmax(self.last(x + self.mlp(x)), dim=-1)


class PyramidPooling(nn.Module):
    """Pooled features that stand beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(6, 2, 1), nn.Sigmoid())

    def forward(self, x):
        return self.last(torch.cat([x, F.interpolate(self.pool(x), x.shape[-2:])], 1))


class GatedLinear(nn.Module):
    """SwiGLU: the activation is the hidden layer's, though it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.act, self.down = nn.Linear(3, 8), nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3)

    def forward(self, x):
        return torch.sigmoid(self.down(self.act(self.gate(x)) * self.up(x)))


class Fusion(nn.Module):
    """Pooled features of one input meet those of another, which they were not pooled from."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.act = nn.Linear(3, 8), nn.Linear(5, 8), nn.ReLU()

    def forward(self, image, text):
        return self.act(self.image(image.mean((2, 3)))) * self.text(text)


class Embedded(nn.Module):
    """What a vector of conditions adds to features is features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.embed = nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Linear(5, 4)

    def forward(self, x, time):
        return self.conv(x) + self.embed(self.act(time))[:, :, None, None]


class Attention(nn.Module):
    """Two hidden layers around attention; neither is part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.GELU()

    def forward(self, x, mask=None):
        x = self.act(self.first(x))
        weights = x @ x.transpose(-1, -2)
        if mask is not None:
            weights = weights + mask
        return self.act(self.second(weights.softmax(-1) @ x))


@pytest.mark.parametrize(
    "model",
    [Depth, PooledHead, PyramidPooling, GatedLinear, Fusion, Embedded, Attention],
    ids=lambda each: each.__name__,
)
def test_hidden_features_near_a_gate_or_a_pool_are_gated(model):
    rows = [row for row in plan(model()) if row.activation.kind in ("relu", "gelu", "silu")]
    assert rows
    assert all(row.selected for row in rows), rows


class PositionBias(nn.Module):
    """Attention whose bias comes from a table of coordinates by way of a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(5, 5, 2))
        self.bias = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1, bias=False))
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def compute_bias(self):
        return 16 * torch.sigmoid(self.bias(self.table.unsqueeze(0)).squeeze())

    def forward(self, x):
        weights = (x @ x.transpose(-1, -2) + self.compute_bias()).softmax(-1)
        return self.mlp(weights @ x)


def test_what_does_not_see_the_batch_is_left_alone():
    rows = {row.name: row for row in plan(nn.Sequential(PositionBias()))}
    assert rows["0.mlp.1"].selected
    assert not rows["0.bias.1"].selected
    assert "does not see the batch" in rows["0.bias.1"].why


def test_a_part_of_a_sample_is_noted_with_example_inputs():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))

        def forward(self, x):
            return self.mlp(x.reshape(-1, 4, 3)).reshape(x.shape)

    (row,) = plan(Windows(), example_inputs=torch.randn(2, 16, 3)).rows
    assert row.selected
    assert "(8, 4, 8) for a batch of 2" in row.why
    (row,) = plan(Windows(), example_inputs=torch.randn(2, 4, 3)).rows
    assert row.why == "a hidden gelu"


def test_finding_out_runs_nothing_and_draws_no_random_numbers():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.seen = nn.ReLU(), []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.last = x
            self.count.add_(1)
            return self.act(x) * torch.sigmoid(torch.rand(3))

    model, state = Noisy(), torch.get_rng_state()
    plan(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 0
    assert not hasattr(model, "last")


def test_activations_with_learnt_slopes_are_found_and_layers_of_such_a_name_are_not():
    class XIELU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.shifts = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1, 4, 1))

        def forward(self, x):
            return torch.where(x > 0, self.slope * x, torch.expm1(x)) + self.shifts

    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return x @ self.weight

    assert chosen(nn.Sequential(nn.Linear(3, 4), XIELU(), nn.PReLU(4), Swish())) == {"1": True, "2": True}


@pytest.mark.parametrize(
    ("expression", "spelled"),
    [
        ("x * torch.sigmoid(x)", True),
        ("torch.sigmoid(x) * x", True),
        ("x * torch.sigmoid(x * self.alpha)", True),
        ("x * F.sigmoid(1.702 * x)", True),
        ("x * x.sigmoid()", True),
        ("x.mul(x.sigmoid())", True),
        ("torch.mul(x, torch.sigmoid(x))", True),
        ("x[..., :2] * x[..., :2].sigmoid()", True),
        ("x * torch.sigmoid(self.linear(x))", False),
        ("x * torch.sigmoid(x + 1)", False),
        ("x * torch.tanh(x)", False),
        ("2 * torch.sigmoid(x)", False),
        ("y * torch.sigmoid(x)", False),
        ("self.linear(x) * torch.sigmoid(self.linear(x))", False),
    ],
)
def test_a_swish_that_is_spelled_out_is_found_and_gated(expression, spelled):
    namespace = {"torch": torch, "F": F, "nn": nn}
    source = f"""
class Spelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.alpha = nn.Linear(8, 8), 1.5
    def forward(self, x):
        y = x = self.linear(x)
        return {expression}
"""
    name = f"<spelled {expression}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)  # noqa: S102  the expression is the parameter
    model = namespace["Spelled"]()
    rows = {row.name: row.selected for row in plan(model) if row.activation.kind == "silu"}
    assert rows == ({"forward.swish": True} if spelled else {})
    if spelled:
        x = torch.randn(2, 8)
        before = model(x)
        wrap(model)
        assert torch.equal(model(x), before)
        with regimewrap.at_keep_ratio(model, 0.5):
            sparse = model(x)
        assert ((sparse == before) | (sparse == 0)).all()
        assert (sparse != 0).sum() == before.numel() // 2


def test_modules_that_differ_in_the_length_of_a_list_are_followed_apart():
    class Stack(nn.Module):
        def __init__(self, length: int) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.branches = nn.ModuleList([Weigher(4) for _ in range(length)])

        def forward(self, x):
            for branch in self.inner.branches:
                x = branch(x)
            return x

    rows = plan(nn.Sequential(Stack(1), Stack(3), Stack(2))).rows
    assert sum("all it feeds is a gate" in row.why for row in rows) == 6


def test_what_is_computed_from_noise_is_not_constant():
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            noise = torch.randn(x.shape, dtype=x.dtype)
            return x + F.relu(self.linear(noise))

    assert chosen(Generator()) == {"forward.relu": True}
