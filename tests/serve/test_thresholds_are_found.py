"""What ``calibrate`` finds, and how it leaves the model."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from regimewrap import (
    GatePolicy,
    RegimeCycler,
    RegimePolicy,
    SitePolicy,
    at_keep_ratio,
    calibrate,
    gate_of,
    watch,
    wrap,
)
from regimewrap.errors import DataError, NotWrappedError, PolicyError
from regimewrap.gate.gate import Site
from regimewrap.serve.histogram import Histogram, Recorder

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(96, 3, 8, 8, generator=GENERATOR)


class Net(nn.Module):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.act = act()
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.act2 = act()
        self.drop = nn.Dropout(0.5)
        self.hidden = nn.Linear(32 * 64, 64)
        self.act3 = act()
        self.head = nn.Linear(64, 4)

    def forward(self, x, scale=1.0):
        x = self.act(self.norm(self.conv(x * scale)))
        x = self.drop(self.act2(self.conv2(x)))
        return self.head(self.act3(self.hidden(x.flatten(1))))


def wrapped(act=nn.ReLU, sites=None, **gate):
    torch.manual_seed(0)
    return wrap(Net(act), RegimePolicy(gate=GatePolicy(**gate), sites=sites or SitePolicy()))


def densities(model, images=IMAGES):
    model.eval()
    with torch.no_grad(), watch(model) as seen:
        model(images)
    return [record.density for record in seen.by_site.values()]


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize(
    ("gate", "sites"),
    [
        ({"scope": "sample"}, None),
        ({"scope": "position"}, None),
        ({"scope": "batch"}, None),
        ({"score": "value"}, None),
        ({"relative_to": "active"}, None),
        ({"ties": "exact"}, None),
        ({"eval_keep_ratio": 0.3}, None),
        ({}, SitePolicy(multipliers={"act2": 0.5})),
        ({}, SitePolicy(min_units=100)),
    ],
)
def test_each_site_reaches_the_density_of_the_selection(act, gate, sites):
    model = wrapped(act, sites, **gate)
    calibration = calibrate(model, IMAGES.split(32), keep_ratios=(0.4, 0.1))

    for ratio in (0.4, 0.1):
        with at_keep_ratio(model, ratio):
            selected = densities(model)
        with calibration.apply(model, ratio):
            assert densities(model) == pytest.approx(selected, rel=0.05)


def test_a_site_is_fitted_to_what_thresholds_before_it_let_through():
    # Positions differ in scale here, so that one threshold keeps other units than a choice in each position does.
    torch.manual_seed(0)
    images = IMAGES * torch.rand(1, 1, 8, 8).mul(4).exp()
    model = wrapped(scope="position")
    calibration = calibrate(model, [images], keep_ratios=(0.1,))

    with at_keep_ratio(model, 0.1):
        selected = densities(model, images)
    with calibration.apply(model, 0.1):
        assert densities(model, images) == pytest.approx(selected, rel=0.05)


def test_in_network_scope_every_site_gets_about_the_shared_threshold():
    model = wrapped(nn.GELU, scope="network")
    with torch.no_grad():
        model.hidden.weight.mul_(20)
    cycler = RegimeCycler(model)
    for _ in range(3):
        model(IMAGES).square().mean().backward()
        cycler.step(1.0)
    shared = gate_of(model).network
    before = shared.histogram

    calibration = calibrate(model, [IMAGES], keep_ratios=(0.2,))

    assert shared.histogram is before
    assert all(int(count.sum()) == 0 for count in shared.counts())
    with at_keep_ratio(model, 0.2):
        selected = densities(model)
    assert selected[0] != pytest.approx(selected[2], rel=0.1)
    with calibration.apply(model, 0.2):
        assert densities(model) == pytest.approx(selected, rel=0.05)
    found = list(calibration.thresholds(0.2).values())
    assert found == pytest.approx([found[0]] * 3, rel=0.03)


@pytest.mark.parametrize("size", [1, 7, 96])
def test_it_matters_little_how_the_data_are_cut_into_batches(size):
    model = wrapped()
    whole = calibrate(model, [IMAGES], keep_ratios=(0.2,)).thresholds(0.2)

    assert calibrate(model, IMAGES.split(size), keep_ratios=(0.2,)).thresholds(0.2) == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_calibrate_too(dtype):
    model = wrapped().to(dtype)
    calibration = calibrate(model, [IMAGES.to(dtype)], keep_ratios=(0.2,))

    with calibration.apply(model, 0.2):
        assert densities(model, IMAGES.to(dtype)) == pytest.approx([0.2, 0.2, 0.2], rel=0.08)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_are_moved_and_the_same_thresholds_found():
    model = wrapped()
    on_host = calibrate(model, [IMAGES], keep_ratios=(0.2,)).thresholds(0.2)
    model.cuda()
    calibration = calibrate(model, [IMAGES], keep_ratios=(0.2,))

    assert calibration.thresholds(0.2) == pytest.approx(on_host, rel=0.02)
    with calibration.apply(model, 0.2):
        # 12 of the last site's 64 units are the budget.
        assert densities(model, IMAGES.cuda()) == pytest.approx([0.2, 0.2, 12 / 64], rel=0.05)


def test_a_compiled_wrapper_calibrates_as_the_model_does():
    model = wrapped()
    expected = calibrate(model, [IMAGES], (0.2,)).sites
    compiled = torch.compile(model, backend="eager")

    calibration = calibrate(compiled, [IMAGES], (0.2,))

    assert calibration.sites == expected
    with calibration.apply(compiled, 0.2):
        assert gate_of(model).thresholds


@settings(deadline=None)
@given(
    values=st.lists(st.integers(-0x7F7F, 0x7F7F), min_size=1, max_size=60, unique_by=abs),
    data=st.data(),
    magnitude=st.booleans(),
)
def test_of_distinct_bfloat16_scores_exactly_as_many_stay_as_were_kept(values, data, magnitude):
    patterns = torch.tensor([abs(value) for value in values], dtype=torch.int16).view(torch.bfloat16)
    x = torch.where(torch.tensor(values) < 0, -patterns, patterns)
    score = x.abs() if magnitude else x
    k = data.draw(st.integers(1, len(values)))
    after = torch.zeros_like(x).index_copy(0, score.topk(k).indices, x[score.topk(k).indices])
    recorder = Recorder("magnitude" if magnitude else "value")

    threshold = recorder(Site("act", "gelu"), x, after)

    stay = torch.where(score.float() > threshold, x, 0)
    assert torch.equal(stay, after)


def test_where_the_selection_keeps_nothing_nothing_stays():
    recorder = Recorder("magnitude")
    x = torch.tensor([0.5, -3.0, 1.0])

    assert not (x.abs() > recorder(Site("act", "gelu"), x, torch.zeros(3))).any()


@settings(deadline=None)
@given(
    parts=st.lists(
        st.tuples(
            st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=1, max_size=30),
            st.integers(1, 30),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_no_other_edge_keeps_a_count_nearer_to_the_selections(parts):
    histogram, kept = Histogram(), 0
    for scores, k in parts:
        k = min(k, sum(score != 0 for score in scores))
        histogram.add(torch.tensor(scores), k)
        kept += k
    pool = torch.tensor([score for scores, _ in parts for score in scores if score != 0]).sort().values
    edges = torch.arange(-0x8000, 0x8000).to(torch.int16).view(torch.bfloat16).float()
    counts = len(pool) - torch.searchsorted(pool, edges[edges.isfinite()], right=True)
    found = int((pool > histogram.threshold).sum())

    # At least one unit stays, as with the selection.
    assert found > 0 or not len(pool)
    assert abs(found - kept) <= min((abs(count - kept) for count in counts.unique().tolist() if count), default=0)


def test_memory_does_not_grow_with_the_number_of_batches():
    histogram = Histogram()
    for _ in range(20):
        histogram.add(torch.randn(100_000), 10_000)

    assert len(histogram._bins) < 10_000


def test_a_site_that_is_never_cut_gets_no_threshold():
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(8, 64), nn.ReLU()), RegimePolicy())
    calibration = calibrate(model, [torch.randn(40, 8)], keep_ratios=(0.95, 0.1))

    assert calibration.thresholds(0.95) == {}
    assert calibration.thresholds(0.1).keys() == {"1"}


def test_at_keep_ratio_one_nothing_is_cut():
    model = wrapped().eval()
    bare = model(IMAGES)
    calibration = calibrate(model, [IMAGES], keep_ratios=(0.2,))

    assert calibration.thresholds(1.0) == {}
    with calibration.apply(model, 1.0):
        assert torch.equal(model(IMAGES), bare)


def test_between_two_budgets_thresholds_are_interpolated():
    calibration = calibrate(wrapped(nn.GELU), [IMAGES], keep_ratios=(0.4, 0.1))
    low, middle, high = (calibration.thresholds(ratio)["act"] for ratio in (0.4, 0.2, 0.1))

    assert middle == pytest.approx((low + high) / 2)
    model = wrapped(nn.GELU)
    calibration = calibrate(model, [IMAGES])
    for ratio in (0.012, 0.04, 0.12, 0.35, 0.6, 0.9):
        with calibration.apply(model, ratio):
            assert densities(model)[0] == pytest.approx(ratio, rel=0.06)


@pytest.mark.parametrize("ratio", [0.09, 0.5])
def test_a_budget_outside_the_calibrated_ones_is_refused(ratio):
    calibration = calibrate(wrapped(), [IMAGES], keep_ratios=(0.4, 0.1))

    with pytest.raises(PolicyError, match=rf"from 0\.1 to 0\.4; got {ratio:g}\. Ask .* keep_ratios=\({ratio:g}, "):
        calibration.thresholds(ratio)


@pytest.mark.parametrize(
    "batch",
    [IMAGES, (IMAGES, torch.zeros(96)), [IMAGES], {"x": IMAGES}, {"x": IMAGES, "scale": 1.0}],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_may_be_tensors_tuples_lists_or_dicts(batch):
    model = wrapped()

    assert calibrate(model, iter([batch]), (0.2,)).sites == calibrate(model, [IMAGES], (0.2,)).sites


def test_the_model_is_left_as_it_was():
    model = wrapped()
    model.train()
    model.drop.eval()
    gate_of(model).set_keep_ratio(0.7)
    gate_of(model).set_thresholds({"act": 0.5})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    calibrate(model, IMAGES.split(32), keep_ratios=(0.2, 0.1))

    assert (model.training, model.drop.training, model.norm.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    gate = gate_of(model)
    assert (float(gate.keep_ratio), gate.thresholds, gate._recorder, gate.observers) == (0.7, {"act": 0.5}, None, [])
    assert not gate.budget.forced


def test_the_model_is_left_as_it_was_after_an_error_too():
    model = wrapped()

    def batches():
        yield IMAGES
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        calibrate(model, batches())
    gate = gate_of(model)
    assert model.training
    assert (float(gate.keep_ratio), gate.thresholds, gate._recorder, gate.budget.forced) == (1.0, None, None, False)


def test_an_empty_loader_is_refused():
    with pytest.raises(DataError, match="gave no batch"):
        calibrate(wrapped(), [])


def test_a_batch_of_another_kind_is_refused():
    with pytest.raises(DataError, match="got str"):
        calibrate(wrapped(), ["images"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_gives_no_finite_activations_is_named(bad):
    broken = IMAGES.clone()
    broken[3, 0, 0, 0] = bad
    with pytest.raises(DataError, match=r"act: an activation was NaN or infinite in batch 1"):
        calibrate(wrapped(), [IMAGES, broken])


def test_a_batch_without_samples_adds_nothing():
    model = wrapped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about empty tensors
        found = calibrate(model, [IMAGES[:0], IMAGES], (0.2,))
    assert found.sites == calibrate(model, [IMAGES], (0.2,)).sites


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        return self.first(x) if x.shape[0] else self.second(x)


def test_a_site_that_never_runs_is_warned_about_and_left_alone():
    model = wrap(Branches())
    with pytest.warns(UserWarning, match=r"1 of 2 sites never ran .*: second\.1\."):
        calibration = calibrate(model, [torch.randn(4, 8)], (0.2,))

    assert calibration.thresholds(0.2).keys() == {"first.1"}
    assert str(calibration).splitlines()[-1].split() == ["second.1", "never", "ran"]


def test_it_is_refused_if_no_site_ran():
    model = wrap(Branches())
    model.forward = lambda x: x
    with pytest.raises(DataError, match="no gated site ran in 1 batches"):
        calibrate(model, [torch.randn(4, 8)])


def test_a_model_on_the_meta_device_is_refused():
    with pytest.raises(DataError, match="meta device"):
        calibrate(wrapped().to("meta"), [IMAGES])


def test_a_bare_model_is_refused():
    with pytest.raises(NotWrappedError):
        calibrate(Net(), [IMAGES])


@pytest.mark.parametrize(("ratios", "message"), [((), "at least one"), ((0.2, 20), r"keep_ratios must be .* got 20")])
def test_budgets_are_checked_before_anything_runs(ratios, message):
    with pytest.raises(PolicyError, match=message):
        calibrate(wrapped(), None, ratios)
