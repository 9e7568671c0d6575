"""Losses, outputs, scores, weights, orders of dimensions: what is no hidden feature is left alone or warned about."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regimewrap import GatePolicy, RegimePolicy, plan, verify, wrap

POSITION = RegimePolicy(gate=GatePolicy(scope="position"))
NETWORK = RegimePolicy(gate=GatePolicy(scope="network"))


def selected(model, policy=None):
    return {row.name: row.selected for row in plan(model, policy)}


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3))

    def training_step(self, batch):
        return F.relu(1 - self.d(batch[0])).mean() + F.relu(1 + self.d(batch[1])).mean()


class Hinge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)

    def forward(self, x, y):
        return torch.mean(F.relu(1 - y * self.b(self.act(self.a(x)))))


class Triplet(nn.Module):
    def forward(self, a, b, c):
        return F.relu((a - b).norm(dim=1) - (a - c).norm(dim=1) + 1).sum()


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.loss = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 5), Triplet()

    def forward(self, a, b, c):
        a, b, c = (self.b(self.act(self.a(each))) for each in (a, b, c))
        return self.loss(a, b, c)


@pytest.mark.parametrize(
    ("make", "hidden"), [(Critic, "d.1"), (Hinge, "act"), (WithLoss, "act")], ids=lambda each: str(each)
)
def test_what_is_only_summed_up_is_a_loss(make, hidden):
    rows = selected(make())
    assert [name for name, wanted in rows.items() if wanted] == [hidden]
    assert len(rows) > 1


def test_a_narrow_output_is_left_alone_and_a_wide_one_is_named():
    density = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.ReLU())
    rows = list(plan(density))
    assert [row.selected for row in rows] == [True, False]
    assert "an output of the network" in rows[1].why
    (row,) = plan(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    assert row.gated
    assert "an output of the network" in row.why


class Scores(nn.Module):
    """Additive attention between nodes, as graph networks have it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mix, self.score = how, nn.Linear(4, 8), nn.Linear(16, 1)
        self.act, self.hidden, self.out = nn.LeakyReLU(0.2), nn.GELU(), nn.Linear(8, 2)

    def forward(self, x, adjacency):
        x = self.hidden(self.mix(x))
        n = x.shape[0]
        pairs = torch.cat([x.repeat_interleave(n, 0), x.repeat(n, 1)], 1)
        e = self.act(self.score(pairs).view(n, n))
        if self.how == "where":
            e = torch.where(adjacency > 0, e, torch.full_like(e, -1e9))
        elif self.how == "masked_fill":
            e = e.masked_fill(adjacency == 0, -1e9)
        return self.out(e.softmax(-1) @ x)


@pytest.mark.parametrize("how", ["where", "masked_fill", "plain"])
def test_attention_scores_are_left_alone_behind_a_mask_too(how):
    assert selected(Scores(how)) == {"act": False, "hidden": True, **dict.fromkeys(["forward.softmax"], False)}


def softmax(scores, index):
    scores = (scores - scores.max()).exp()
    return scores / scores.new_zeros(int(index.max()) + 1).index_add(0, index, scores)[index]


class OverEdges(Scores):
    def forward(self, x, edges):
        x = self.hidden(self.mix(x))
        pairs = x[edges].transpose(0, 1).flatten(1)
        weights = softmax(self.act(self.score(pairs))[:, 0], edges[1])
        return self.out(torch.zeros_like(x).index_add(0, edges[1], weights[:, None] * x[edges[0]]))


def test_attention_scores_are_left_alone_in_front_of_a_softmax_of_the_users_own():
    assert selected(OverEdges("plain")) == {"act": False, "hidden": True, "forward.softmax": False}


class Rearrange(nn.Module):
    """As einops' layer."""

    def forward(self, x):
        return x.reshape(x.shape[0], x.shape[1], 1, 1)


class Wrapped(nn.Module):
    """A convolution in a module of its own, with padding, as speech toolkits have it."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv, self.padding = nn.Conv2d(i, o, 1), "same"

    def forward(self, x):
        if self.padding == "same":
            x = F.pad(x, (0, 0))
        elif self.padding != "valid":
            raise ValueError(self.padding)
        return self.conv(x)


class Squeezes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.act, self.up = Wrapped(4, 2), nn.ReLU(), Wrapped(2, 4)

    def forward(self, x, lengths=None):
        b, c, *_ = x.shape
        if lengths is not None:
            mask = lengths[:, None, None, None]
            s = (x * mask).sum(dim=2, keepdim=True) / mask.sum(dim=2, keepdim=True)
        else:
            s = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(self.act(self.down(s))).view(b, c, 1, 1))


class SqueezesInOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2), nn.SiLU(), nn.Linear(2, 4),
                                   nn.Sigmoid(), Rearrange())  # fmt: skip

    def forward(self, x):
        return x * self.weigh(x)


@pytest.mark.parametrize("make", [Squeezes, SqueezesInOrder])
def test_squeeze_excite_is_told_however_it_is_written(make):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), make(), nn.Conv2d(4, 8, 1))
    assert [name for name, wanted in selected(model).items() if wanted] == ["1"]


def test_a_mean_over_the_entries_of_a_list_pools_nothing():
    class Averages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.a(x)
            mean = torch.stack([x, 2 * x]).mean(0)
            return x + self.b(self.act(mean))

    assert selected(Averages()) == {"act": True}


def test_what_computes_a_parameter_is_left_alone():
    class Positive(nn.Module):
        def forward(self, weight):
            return F.relu(weight)

    layer = nn.Linear(8, 16)
    nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
    model = nn.Sequential(layer, nn.GELU())
    assert selected(model) == {"0.parametrizations.weight.0.forward.relu": False, "1": True}


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.cond = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 1), nn.Linear(5, 8)

    def forward(self, x, e):
        return x + self.c2(F.gelu(self.c1(F.pad(x, (2, 0))) + self.cond(e)[:, :, None]))


class Gained(nn.Module):
    """A norm of the user's own over channels first."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        g = self.g if self.g.dim() > 1 else self.g[:, None, None]
        return F.normalize(x, dim=1) * g


RMSNorm = type("RMSNorm", (Gained,), {})
LayerNorm = type("LayerNorm", (Gained,), {})


@pytest.mark.parametrize(
    "model",
    [Conditioned(), nn.Sequential(nn.Conv2d(3, 8, 3), RMSNorm(1, 8, 1, 1), nn.SiLU(), nn.Conv2d(8, 3, 1)),
     nn.Sequential(nn.Conv2d(3, 8, 3), LayerNorm(8), nn.SiLU(), nn.Conv2d(8, 3, 1))],
    ids=["conditioned", "gain of four dimensions", "gain that is indexed"],
)  # fmt: skip
def test_position_scope_never_takes_time_or_space_for_channels(model):
    assert [row.site.channel_dim for row in plan(model, POSITION).gated] == [1]


def encoder(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class Recurrent(nn.Module):
    def __init__(self, batch_first, last=False):
        super().__init__()
        self.rnn, self.act, self.out, self.last = (
            nn.GRU(4, 8, batch_first=batch_first),
            nn.GELU(),
            nn.Linear(8, 2),
            last,
        )

    def forward(self, x):
        x, _ = self.rnn(x)
        return self.out(self.act(x[-1] if self.last else x))


@pytest.mark.parametrize("make", [encoder, Recurrent])
def test_time_before_samples_is_warned_about_with_the_remedy(make):
    with pytest.warns(UserWarning, match=r"is time, not samples.*batch_first=True.*position"):
        wrap(make(False))
    wrap(make(True))
    wrap(make(False), POSITION)


def test_the_last_step_of_a_recurrent_layer_has_samples_first():
    wrap(Recurrent(False, last=True))


class MaskedLinear(nn.Linear):
    def __init__(self, i, o):
        super().__init__(i, o)
        self.register_buffer("mask", torch.ones(o, i).tril())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


def test_masked_autoregressive_layers_are_warned_about_with_the_remedy():
    def made():
        return nn.Sequential(MaskedLinear(4, 16), nn.ReLU(), MaskedLinear(16, 4))

    for policy in (None, POSITION):
        with pytest.warns(UserWarning, match=r"masked linear layers.*network"):
            wrap(made(), policy)
    wrap(made(), NETWORK)


def test_a_call_that_raised_did_not_escape():
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 16), nn.LeakyReLU()])

        def forward(self, x):
            for layer in self.layers:
                try:
                    x = layer(x, lengths=None)
                except TypeError:
                    x = layer(x)
            return x

    coverage = verify(wrap(Tries()), torch.randn(2, 8))
    assert (coverage.gated, coverage.escaped) == (("layers.1",), ())


def test_models_in_other_threads_do_not_count():
    other = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            thread = threading.Thread(target=other, args=(x,))
            thread.start()
            thread.join()
            return self.act(x)

    coverage = verify(wrap(Meets()), torch.randn(2, 4))
    assert (coverage.gated, coverage.escaped) == (("act",), ())
