from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from regimewrap import RegimePolicy, at_keep_ratio, gate_of, unwrap, wrap


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return F.gelu(self.inner(F.relu(self.inner(x)))) + F.relu(x)

    def extra_repr(self) -> str:
        return f"width={self.width}"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), Block(8), nn.Linear(8, 2))


def test_the_head_says_what_is_in_force_and_each_place_that_it_is_gated():
    model = wrap(network())
    gate_of(model).set_keep_ratio(0.3)

    lines = [line.strip() for line in str(model).splitlines()]

    assert lines[1] == "gate: 4 sites, keep ratio 0.3 (1 in eval mode), scope sample"
    assert "(1): ReLU(inplace=True, gated)" in lines
    assert lines[lines.index("(2): Block(") + 1 :][:2] == ["width=8", "gated: 2 relu, gelu"]
    assert str(model).count("gated") == 2


def test_a_relu_whose_forward_is_one_with_its_gate_is_gated_once():
    assert "(1): ReLU(gated)" in str(wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU())))


def test_the_head_follows_the_budget_that_is_forced():
    model = wrap(network())
    with at_keep_ratio(model, 0.1):
        assert "keep ratio 0.1, scope" in str(model)


def test_multipliers_of_single_sites_are_shown():
    policy = RegimePolicy(sites={"multipliers": {"1": 0.5, "2.forward.gelu": 2.0}})
    text = str(wrap(network(), policy))
    assert "gated (multiplier 0.5)" in text
    assert "gelu (multiplier 2)" in text


def test_unwrapped_models_print_what_they_printed():
    before = str(network())
    model = unwrap(wrap(network()))
    assert str(model) == before
    assert not any("extra_repr" in module.__dict__ for module in model.modules())


def test_blocks_that_are_alike_are_still_printed_once():
    model = wrap(nn.Sequential(nn.Linear(4, 8), nn.ModuleList(Block(8) for _ in range(3))))
    assert "(0-2): 3 x Block(" in str(model)


def way_through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, way_through_a_file])
def test_copies_show_their_own_state(copied):
    model = wrap(network())
    twin = copied(model)
    gate_of(twin).set_keep_ratio(0.2)
    twin[2].width = 9
    del model
    assert "keep ratio 0.2" in str(twin)
    assert "width=9" in str(twin)
    assert str(unwrap(twin)) == str(network()).replace("width=8", "width=9")


def test_a_wrapped_model_is_freed_at_once():
    model = wrap(network())
    inside = weakref.ref(model[2])
    del model
    assert inside() is None


def test_an_extra_repr_of_the_object_itself_stays():
    model = network()
    model.extra_repr = lambda: "mine"
    assert "mine" in str(wrap(model))
    assert "mine" in str(unwrap(model))


def test_graphs_show_where_their_gates_are():
    graph = wrap(fx.symbolic_trace(network()))
    assert "GraphGates(gated: 2 relu, gelu)" in repr(graph)
    assert "gate: 4 sites" in repr(graph)
