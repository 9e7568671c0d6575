"""``verify`` runs one forward pass and names the activations that no gate saw."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from regimewrap import RegimePolicy, SitePolicy, verify, wrap


def test_a_fresh_wrap_is_fully_covered():
    model = wrap(torchvision.models.resnet18())
    coverage = verify(model, torch.randn(2, 3, 64, 64))
    assert len(coverage.gated) == 9
    assert not coverage.escaped
    assert not coverage.idle


def test_a_replaced_child_is_named():
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()))
    model[1] = nn.GELU()
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.escaped == ("1",)
    assert coverage.gated == ("3",)
    assert coverage.idle == ("1",)
    assert "unwrap and wrap again" in str(coverage)


def test_a_function_put_in_later_is_named():
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model[0].forward = lambda x: F.relu(x)
    assert verify(model, torch.randn(2, 4)).escaped == ("0.relu",)


def test_what_the_policy_leaves_alone_does_not_escape():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sigmoid(), nn.ReLU())
    wrap(model, RegimePolicy(sites=SitePolicy(exclude=("1",))))
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.gated == ("3",)
    assert not coverage.escaped


def test_it_leaves_no_trace_in_buffers_randomness_or_mode():
    model = wrap(torchvision.models.densenet121(drop_rate=0.1))
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    verify(model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training


def test_a_part_and_a_copied_graph_module_can_be_verified():
    x = torch.randn(2, 4)
    model = wrap(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.ReLU()))
    assert verify(model[0], x).gated == ("0.1",)
    graph = copy.deepcopy(wrap(fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))))
    assert not verify(graph, x).escaped
