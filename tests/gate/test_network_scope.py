"""One threshold for all sites: from the step before, over the whole network, however the model is run."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regimewrap import (
    CyclePolicy,
    GatePolicy,
    RegimeCycler,
    RegimePolicy,
    TopKGate,
    at_keep_ratio,
    gate_of,
    sweep,
    unwrap,
    verify,
    watch,
    wrap,
)
from regimewrap.errors import BudgetError
from regimewrap.policy.strategies import Constant, Sawtooth
from regimewrap.recipes.wide_resnet import WideResNet
from regimewrap.topk.reference import kept, reaches
from regimewrap.topk.threshold import threshold_at

NETWORK = RegimePolicy(gate=GatePolicy(scope="network"))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, mask=None):
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))

    def forward(self, x, mask=None):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 4))


def stepped(budget: float = 0.2, policy: RegimePolicy = NETWORK) -> tuple[nn.Module, RegimeCycler]:
    """A model that has a threshold, from one step."""
    torch.manual_seed(0)
    model = wrap(mlp(), policy)
    cycler = RegimeCycler(model, CyclePolicy(full_share=0, strategy=Constant(keep_ratio=budget)))
    model(torch.randn(32, 16))
    cycler.step()
    return model, cycler


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    sklearn = pytest.importorskip("sklearn.datasets")
    data = sklearn.load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32), torch.tensor(data.target)


SHARES = [
    (kind, budget, moving)
    for kind in ("wide resnet", "transformer")
    for budget in (0.5, 0.2, 0.05)
    for moving in (0, 1)
]
QUICK = [("wide resnet", 0.2, 1), ("transformer", 0.05, 0)]


@pytest.mark.parametrize(
    ("kind", "budget", "moving"),
    [pytest.param(*each, marks=[] if each in QUICK else pytest.mark.slow) for each in SHARES],
)
def test_the_networks_share_is_the_budget_within_two_percent_after_ten_steps(kind, budget, moving):
    torch.manual_seed(0)
    images, targets = digits()
    model = WideResNet(10, 1, in_channels=1) if kind == "wide resnet" else Transformer()
    wrap(model, NETWORK)
    strategy = Sawtooth(floor=budget, decisions=25) if moving else Constant(keep_ratio=budget)
    cycler = RegimeCycler(model, CyclePolicy(full_share=0, strategy=strategy, every=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found, asked = 0.0, 0.0
    for step in range(110):
        batch = torch.randint(len(images), (32,))
        ratio = cycler.keep_ratio
        with watch(model) as seen:
            logits = model(images[batch][:, None]) if kind == "wide resnet" else model(images[batch]).mean(1)
            loss = F.cross_entropy(logits, targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycler.step(loss)
        if step >= 10:
            sites = seen.by_site.values()
            units = sum(site.units for site in sites)
            active = sum(site.density_before * site.units for site in sites)
            found += sum(site.density * site.units for site in sites) / units
            asked += min(ratio, active / units)  # there are no more non-zero units than that
    assert found / asked == pytest.approx(1, rel=0.02)


def test_the_budget_goes_where_activations_are_large():
    torch.manual_seed(0)
    model = wrap(nn.ModuleDict({"small": nn.ReLU(), "large": nn.ReLU()}), NETWORK)
    cycler = RegimeCycler(model, CyclePolicy(full_share=0, strategy=Constant(keep_ratio=0.2)))
    for _ in range(2):
        small, large = model["small"](torch.randn(64, 64)), model["large"](10 * torch.randn(64, 64))
        cycler.step()
    assert (small != 0).float().mean() < 0.02
    assert (large != 0).float().mean() == pytest.approx(0.4, abs=0.02)


def test_all_sites_share_the_quantile_of_the_step_before():
    model, _ = stepped(0.2)
    gate, x = gate_of(model), torch.randn(32, 16)
    threshold = float(threshold_at(gate.network.histogram, 0.2))
    assert gate.network.histogram.sum() == 32 * (64 + 128)

    seen = []
    gate.observers.append(lambda site, before, after: seen.append((before, after)))  # noqa: ARG005
    model(x)

    assert len(seen) == 2
    for before, after in seen:
        assert torch.equal(after, torch.where(reaches(before, threshold), before, 0))


def test_micro_batches_count_together_and_keep_one_threshold():
    model, cycler = stepped()
    gate = gate_of(model)
    before = gate.network.histogram
    threshold = gate.network._on(torch.device("cpu")).threshold.clone()
    for size in (3, 5):
        model(torch.randn(size, 16)).sum().backward()
        assert torch.equal(gate.network._on(torch.device("cpu")).threshold, threshold)
    assert gate.network.histogram is before
    cycler.step()
    assert gate.network.histogram.sum() == 8 * (64 + 128)


def test_another_ratio_holds_at_once():
    model, _ = stepped()
    x = torch.randn(64, 16)
    for ratio in (0.4, 0.02, 0.1):
        gate_of(model).set_keep_ratio(ratio)
        with watch(model) as seen:
            model(x)
        assert seen.density == pytest.approx(ratio, rel=0.15)


def test_full_budget_is_the_bare_model_bit_for_bit():
    model, _ = stepped(1.0)
    bare = unwrap(copy.deepcopy(model))
    x = torch.randn(8, 16)
    found, expected = model(x), bare(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    expected.sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), bare.parameters(), strict=True))


def test_nan_passes_and_is_not_counted():
    gate = TopKGate(NETWORK)
    model = nn.Sequential(nn.GELU())
    wrap(model, NETWORK)
    gate, cycler = gate_of(model), RegimeCycler(model, CyclePolicy(full_share=0, strategy=Constant(keep_ratio=0.5)))
    x = torch.tensor([[1.0, 2.0, torch.nan, 4.0]])
    model(x)
    cycler.step()
    assert gate.network.histogram.sum() == 3
    assert model(x).isnan().tolist() == [[False, False, True, False]]


def test_before_the_first_step_samples_are_cut_by_themselves():
    model = wrap(nn.Sequential(nn.GELU()), NETWORK)
    gate_of(model).set_keep_ratio(0.3)
    x = torch.randn(4, 50)
    y = F.gelu(x)
    assert torch.equal(model(x), torch.where(kept(y, 0.3), y, 0))
    with at_keep_ratio(model.eval(), 0.1):
        assert torch.equal(model(x), torch.where(kept(y, 0.1), y, 0))


def test_a_step_without_a_forward_pass_keeps_the_threshold():
    model, cycler = stepped()
    before = gate_of(model).network.histogram
    cycler.step()
    assert torch.equal(gate_of(model).network.histogram, before)
    fresh = wrap(mlp(), NETWORK)
    RegimeCycler(fresh, CyclePolicy(full_share=0, strategy=Constant(keep_ratio=0.2))).step()
    assert gate_of(fresh).network.histogram is None


def test_only_training_is_counted():
    model, _ = stepped()
    counts = gate_of(model).network.counts()[0]
    with at_keep_ratio(model, 0.3):
        model(torch.randn(3, 16))
    verify(model, torch.randn(3, 16))
    model.eval()(torch.randn(3, 16))
    sweep(model.train(), lambda model: model(torch.randn(3, 16)).sum(), [0.5])
    assert not counts.any()
    model(torch.randn(3, 16))
    assert counts.sum() == 3 * (64 + 128)
    wrapped = wrap(mlp(), NETWORK, example_inputs=torch.randn(3, 16))
    assert not any(each.any() for each in gate_of(wrapped).network.counts())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_cuts_the_same_and_is_not_counted(use_reentrant):
    model, _ = stepped()
    counts, x = gate_of(model).network.counts()[0], torch.randn(4, 16, requires_grad=True)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    counts.zero_()

    checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()

    assert torch.equal(x.grad, expected)
    assert counts.sum() == 4 * (64 + 128)


@pytest.mark.parametrize(("eval_keep_ratio", "share"), [(1.0, 1.0), (0.05, 0.05), ("current", 0.2)])
def test_eval_mode_has_its_own_threshold(eval_keep_ratio, share):
    model, _ = stepped(0.2, RegimePolicy(gate=GatePolicy(scope="network", eval_keep_ratio=eval_keep_ratio)))
    gate, seen = gate_of(model), []
    gate.observers.append(lambda site, before, after: seen.append((before, after)))  # noqa: ARG005
    model.eval()(torch.randn(64, 16))
    threshold = float(threshold_at(gate.network.histogram, share)) if share < 1 else 0.0
    for before, after in seen:
        assert torch.equal(after, torch.where(reaches(before, threshold), before, 0))
    with at_keep_ratio(model, 0.1):
        seen.clear()
        model(torch.randn(64, 16))
    threshold = float(threshold_at(gate.network.histogram, 0.1))
    assert all(torch.equal(after, torch.where(reaches(before, threshold), before, 0)) for before, after in seen)


def test_an_active_share_is_one_of_the_non_zero_units():
    model, cycler = stepped(0.2, RegimePolicy(gate=GatePolicy(scope="network", relative_to="active")))
    for _ in range(3):
        with watch(model) as seen:
            model(torch.randn(512, 16))
        cycler.step()
    sites = seen.by_site.values()
    active = sum(site.density_before * site.units for site in sites)
    assert sum(site.density * site.units for site in sites) / active == pytest.approx(0.2, rel=0.1)


def test_a_straight_through_gradient_passes_to_all():
    model, _ = stepped(0.2, RegimePolicy(gate=GatePolicy(scope="network", gradient="straight_through")))
    bare = unwrap(copy.deepcopy(model))
    gate_of(model).set_keep_ratio(1e-6)
    x = torch.randn(8, 16)
    bare(x)[:, 0].sum().backward()
    model(x)[:, 0].sum().backward()
    assert torch.equal(model[0].weight.grad.ne(0), bare[0].weight.grad.ne(0))


def test_copies_have_a_threshold_and_counts_of_their_own():
    model, cycler = stepped()
    model(torch.randn(5, 16))  # counted here, and not in the copies
    x = torch.randn(16, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own bytes
        with torch.no_grad():
            assert torch.equal(twin(x), model(x))
        gate = gate_of(twin)
        gate.set_keep_ratio(0.01)
        with torch.no_grad():
            assert not torch.equal(twin(x), model(x))
        assert sum(int(each.sum()) for each in gate.network.counts()) == 2 * 16 * 192
    with torch.inference_mode():
        copy.deepcopy(model)(x)
    cycler.step()


def test_an_averaged_copy_is_cut_at_the_same_threshold():
    model, cycler = stepped()
    average = copy.deepcopy(model)
    fresh = wrap(unwrap(copy.deepcopy(model)), NETWORK)
    cycler.bind(average)
    cycler.bind(fresh)
    for _ in range(3):
        model(torch.randn(32, 16))
        cycler.step()
        x = torch.randn(8, 16)
        for twin in (average, fresh):
            with torch.no_grad():
                expected = copy.deepcopy(model)(x)
                assert torch.equal(copy.deepcopy(twin)(x), expected)


def test_the_state_dict_keys_and_modules_are_those_of_the_bare_model():
    model, _ = stepped()
    assert model.state_dict().keys() == mlp().state_dict().keys()
    unwrap(model)
    assert not any("regimewrap" in name for module in model.modules() for name in module.__dict__)


def test_what_is_no_floating_tensor_is_left_alone_with_one_warning_that_names_the_site():
    model, _ = stepped()
    gate, x = gate_of(model), torch.ones(2, 2, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match=r"^1 is left alone: it returned a tensor of torch\.int64"):
        assert gate(x, gate.sites[0], training=True) is x
    assert not any(counts.any() for counts in gate.network.counts())


def test_prefixes_do_not_depend_on_later_tokens_and_no_warning_comes():
    torch.manual_seed(0)
    model = Transformer()
    model.is_causal = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(model, NETWORK)
    cycler = RegimeCycler(model, CyclePolicy(full_share=0, strategy=Constant(keep_ratio=0.1)))
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    x = torch.randn(4, 8, 8)
    model(x, mask)
    cycler.step()
    other = x.clone()
    other[:, 5:] = torch.randn(4, 3, 8)
    assert torch.equal(model(x, mask)[:, :5], model(other, mask)[:, :5])


@pytest.mark.parametrize("make", [mlp, pytest.param(Transformer, marks=pytest.mark.slow)])
def test_one_graph_serves_a_hundred_ratios_and_counts_like_eager(make):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = wrap(make(), NETWORK)
    eager = copy.deepcopy(model)
    policy = CyclePolicy(full_share=0, strategy=Sawtooth(floor=0.05, decisions=30), every=1)
    cyclers = [RegimeCycler(model, policy), RegimeCycler(eager, policy)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(100):
        x = torch.randn(4, 16) if make is mlp else torch.randn(2, 3, 8)
        found, expected = compiled(x), eager(x)
        assert torch.equal(found, expected)
        found.sum().backward()
        expected.sum().backward()
        for cycler in cyclers:
            cycler.step()
    assert torch.equal(gate_of(model).network.histogram, gate_of(eager).network.histogram)
    assert counters["stats"]["unique_graphs"] == 1
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputation_after_the_ratio_has_changed_is_refused(use_reentrant):
    model, cycler = stepped()
    x = torch.randn(4, 16, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    cycler.step()
    gate_of(model).set_keep_ratio(0.5)
    with pytest.raises(BudgetError, match=r"RegimeCycler\.step or set_keep_ratio after backward"):
        y.sum().backward()
