"""The handle that all sites of a model share."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from regimewrap import GatePolicy, RegimePolicy, SitePolicy, TopKGate, at_keep_ratio, gate_of, wrap
from regimewrap.errors import PolicyError, SelectionError, WrapError
from regimewrap.gate.gate import Site

SITE = Site("act", "relu")


def gated(
    policy: RegimePolicy, ratio: float, x: torch.Tensor, *, training: bool = True, site: Site = SITE
) -> torch.Tensor:
    gate = TopKGate(policy)
    gate.set_keep_ratio(ratio)
    return gate(x, site, training)


def test_the_ratio_is_a_tensor_on_the_host():
    gate = TopKGate()
    assert gate.keep_ratio.shape == ()
    assert gate.keep_ratio.dtype == torch.float64
    assert gate.keep_ratio.device.type == "cpu"


@pytest.mark.parametrize("bad", [0, -0.1, 1.5, float("nan"), float("inf"), "a lot", None, True])
def test_a_ratio_outside_its_range_is_refused_and_changes_nothing(bad):
    gate = TopKGate()
    gate.set_keep_ratio(0.5)
    with pytest.raises(PolicyError, match="keep_ratio"):
        gate.set_keep_ratio(bad)
    assert gate.keep_ratio == 0.5


@pytest.mark.parametrize(("scope", "kept"), [("sample", [2, 2]), ("position", [4, 4]), ("batch", [4, 0])])
def test_scopes_say_what_competes(scope, kept):
    x = torch.tensor([[[9.0, 8.0], [7.0, 6.0]], [[1.0, 2.0], [3.0, 4.0]]])
    y = gated(RegimePolicy(gate=GatePolicy(scope=scope)), 0.5, x)
    if scope == "position":
        assert (y != 0).sum(-1).unique().tolist() == [1]
    else:
        assert (y != 0).flatten(1).sum(1).tolist() == kept


def test_position_scope_selects_over_the_channels_of_images():
    x = torch.rand(2, 8, 3, 3) + 0.1
    y = gated(RegimePolicy(gate=GatePolicy(scope="position")), 0.25, x, site=Site("act", "relu", channel_dim=1))
    assert (y != 0).sum(1).unique().tolist() == [2]


def test_position_scope_asks_when_nothing_tells_the_channels():
    with pytest.raises(SelectionError, match=r"act: nothing tells.*channel_dim"):
        gated(RegimePolicy(gate=GatePolicy(scope="position")), 0.25, torch.rand(2, 8, 3, 3))


@pytest.mark.parametrize(("eval_keep_ratio", "kept"), [(1.0, 10), (0.5, 5), ("current", 2)])
def test_eval_mode_has_its_own_ratio(eval_keep_ratio, kept):
    x = torch.rand(1, 10) + 0.1
    y = gated(RegimePolicy(gate=GatePolicy(eval_keep_ratio=eval_keep_ratio)), 0.2, x, training=False)
    assert (y != 0).sum() == kept


def test_multipliers_scale_the_ratio_but_not_the_full_budget():
    x = torch.rand(1, 100) + 0.1
    half = Site("act", "relu", multiplier=0.5)
    assert (gated(RegimePolicy(), 0.4, x, site=half) != 0).sum() == 20
    assert torch.equal(gated(RegimePolicy(), 1.0, x, site=half), x)


def test_at_keep_ratio_restores_after_an_exception():
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    gate_of(model).set_keep_ratio(0.7)
    with at_keep_ratio(model, 0.1), pytest.raises(KeyError), at_keep_ratio(model, 0.2) as gate:
        {}[float(gate.keep_ratio)]
    assert gate_of(model).keep_ratio == 0.7


def test_at_keep_ratio_holds_in_eval_mode():
    model = wrap(nn.Sequential(nn.Linear(4, 100), nn.ReLU())).eval()
    with at_keep_ratio(model, 0.1):
        assert (model(torch.randn(1, 4)) != 0).sum() == 10


NOT_RANKED = {
    "a tensor of torch.int64": torch.ones(2, 2, dtype=torch.int64),
    "a tensor of torch.complex64": torch.ones(2, 2, dtype=torch.complex64),
    "a tuple": (torch.ones(2), torch.ones(2)),
    "a sparse_coo tensor": torch.eye(3).to_sparse(),
    "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("found", NOT_RANKED)
def test_what_has_no_units_to_rank_is_left_alone_with_one_warning_that_names_the_site(found, ratio):
    x, gate = NOT_RANKED[found], TopKGate()
    gate.set_keep_ratio(ratio)
    with pytest.warns(RuntimeWarning, match=f"act is left alone: it returned {found}, and a gate ranks"):
        assert gate(x, SITE, training=True) is x
    assert gate(x, SITE, training=True) is x  # a second warning would be an error
    assert gate.relu(lambda x: (x,), x, SITE, training=True) == (x,)
    assert gate(torch.ones(2, 4), SITE, training=True).shape == (2, 4)


def test_a_tensor_without_a_second_dimension_is_told_of_once():
    gate = TopKGate()
    gate.set_keep_ratio(0.1)
    with pytest.warns(RuntimeWarning, match=r"act returned a tensor of shape \(16,\): read as 16 samples of one unit"):
        assert (gate(torch.ones(16), SITE, training=True) == 1).all()
    gate(torch.ones(16), Site("other", "relu"), training=True)  # a second warning would be an error


def test_samples_that_vmap_passes_one_by_one_are_told_of_once():
    model = wrap(nn.Sequential(nn.Linear(8, 16), nn.GELU()))
    gate_of(model).set_keep_ratio(0.1)
    x = torch.randn(5, 8)
    with pytest.warns(RuntimeWarning, match=r"model\(x.unsqueeze\(0\)\), also inside torch.vmap"):
        torch.vmap(model)(x)
    mapped = torch.vmap(lambda x: model(x.unsqueeze(0)).squeeze(0))(x)
    torch.testing.assert_close(mapped, model(x))


def test_empty_batches_pass():
    assert gated(RegimePolicy(), 0.5, torch.empty(0, 4)).shape == (0, 4)
    assert gated(RegimePolicy(sites=SitePolicy(min_units=3)), 0.5, torch.empty(0, 4)).shape == (0, 4)


def test_copies_and_pickles_keep_the_ratio_and_drop_observers():
    gate = TopKGate()
    gate.set_keep_ratio(0.3)
    gate.observers.append(print)
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):  # noqa: S301  our own bytes
        assert twin.keep_ratio == 0.3
        assert twin.keep_ratio is not gate.keep_ratio
        assert not twin.observers


def test_two_wrapped_models_in_one_are_told_apart():
    pair = nn.ModuleList([wrap(nn.Sequential(nn.ReLU())), wrap(nn.Sequential(nn.ReLU()))])
    with pytest.raises(WrapError, match="2 separately wrapped"):
        gate_of(pair)
    assert gate_of(pair[0]) is not gate_of(pair[1])


@pytest.fixture
def recorded(monkeypatch):
    """A gate that took part, as far as it can tell, in recording a CUDA graph at keep ratio 0.5."""
    model = wrap(nn.Sequential(nn.Linear(4, 64), nn.GELU()))
    gate_of(model).set_keep_ratio(0.5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model[1](torch.empty(2, 64, device="cuda"))
    return gate_of(model)


def test_a_ratio_that_a_recorded_cuda_graph_will_not_see_is_told_of_once(recorded):
    recorded.set_keep_ratio(0.5)  # nothing changes
    with pytest.warns(
        RuntimeWarning, match=r"recorded at keep ratio 0\.5 and replays that, not keep ratio 0\.2; record it again"
    ):
        recorded.set_keep_ratio(0.2)
    recorded.set_keep_ratio(0.1)  # a second warning would be an error
    assert recorded.keep_ratio == 0.1


def test_where_that_warning_is_an_error_the_ratio_stays(recorded):
    with pytest.raises(RuntimeWarning, match="record it again"):
        recorded.set_keep_ratio(0.2)
    assert recorded.keep_ratio == 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_cuda_graph_keeps_its_ratio():
    model, x = wrap(nn.Sequential(nn.Linear(64, 64), nn.ReLU())).cuda(), torch.randn(8, 64, device="cuda")
    gate = gate_of(model)
    gate.set_keep_ratio(0.1)
    model(x)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    with pytest.warns(RuntimeWarning, match="record it again"):
        gate.set_keep_ratio(0.05)
    graph.replay()
    assert (y != 0).sum() == 8 * 6
