"""What torch.fx makes of a wrapped model, and what wrap makes of what torch.fx and torch.export made."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from regimewrap import at_keep_ratio, gate_of, plan, unwrap, verify, wrap
from regimewrap.errors import WrapError
from regimewrap.topk.op import topk_gate

RATIO = torch.tensor(0.1, dtype=torch.float64)


class Act(nn.Module):
    def forward(self, x):
        return F.silu(x)


class Block(nn.Module):
    """Sites of every kind: a function, a ReLU as a function, torch's modules and one of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.relu, self.act = nn.ReLU(), Act()

    def forward(self, x):
        return self.relu(self.b(self.act(F.relu(F.gelu(self.a(x)))).relu()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.drop(self.blocks(x)))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return wrap(Net().eval())


def same(a: nn.Module, b: nn.Module, x: torch.Tensor) -> bool:
    dense = torch.equal(a(x), b(x))
    with at_keep_ratio(a, 0.1):
        return dense and torch.equal(a(x), b(x)) and not torch.equal(a(x), a.head(a.drop(x)))


def test_a_trace_of_a_wrapped_model_calls_its_gates_as_leaves(x):
    model = net()
    traced = fx.symbolic_trace(model)
    gates = [node for node in traced.graph.nodes if "_regimewrap" in str(node.target)]
    assert len(gates) == 8  # torch's own ReLU is a leaf with its gate
    assert gate_of(traced) is gate_of(model)
    assert same(model, traced, x)
    twin = copy.deepcopy(traced)
    with at_keep_ratio(model, 0.1):
        assert torch.equal(twin(x), model(x)) == (gate_of(twin) is gate_of(model))
    assert list(traced.state_dict()) == list(model.state_dict())


def test_a_trace_follows_the_mode(x):
    model = net()
    traced = fx.symbolic_trace(model)
    gate_of(model).set_keep_ratio(0.1)
    dense = traced(x)
    assert torch.equal(dense, model(x))
    traced.train()
    traced.drop.eval()
    assert not torch.equal(traced(x), dense)


def test_unwrap_takes_the_lent_leaves_off():
    model = net()
    fx.symbolic_trace(model)
    unwrap(model)
    assert not any("_regimewrap" in name for module in model.modules() for name in vars(module))
    fx.symbolic_trace(model)


def test_a_trace_can_be_unwrapped(x):
    model = net()
    traced = fx.symbolic_trace(model)
    unwrap(model)
    dense = model(x)
    unwrap(traced)
    assert torch.equal(traced(x), dense)
    assert "_regimewrap" not in traced.code


def test_feature_extractors_take_a_wrapped_model(x):
    model = net()
    train, evaluate = get_graph_node_names(model)
    assert set(evaluate) <= set(train)
    extractor = create_feature_extractor(model, {"blocks.0.b": "inner", "head": "out"}).eval()
    with at_keep_ratio(model, 0.1):
        assert torch.equal(extractor(x)["out"], model(x))


def test_a_dual_graph_is_gated_in_both_modes_and_comes_back(x):
    torch.manual_seed(0)
    model = Net()
    extractor = create_feature_extractor(model, ["head"])
    code = {mode: extractor.train(mode).code for mode in (True, False)}
    wrap(extractor.train())
    for mode in (True, False):
        extractor.train(mode)
        torch.manual_seed(1)
        dense = extractor(x)["head"]
        torch.manual_seed(1)
        with at_keep_ratio(extractor, 0.1):
            assert not torch.equal(extractor(x)["head"], dense)
        assert verify(extractor, x).escaped == ()
        assert len(verify(extractor, x).gated) == 10
    unwrap(extractor)
    assert {mode: extractor.train(mode).code for mode in (True, False)} == code


def test_a_dual_graph_is_gated_where_only_one_of_its_modes_runs(x):
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            x = self.a(x)
            return self.b(F.gelu(x) if self.training else F.silu(x))

    extractor = wrap(create_feature_extractor(Modes(), ["b"], suppress_diff_warning=True))
    assert verify(extractor.train(), x).gated == ("gelu",)
    assert verify(extractor.eval(), x).gated == ("silu",)


@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_an_exported_module_is_wrapped_in_place(ratio, x):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.b(F.gelu(self.a(x)))

    bare = Small()
    module = torch.export.export(bare, (x,)).module()
    dense, code = module(x), module.code
    wrap(module)
    expected = bare.b(topk_gate(F.gelu(bare.a(x)), torch.tensor(ratio, dtype=torch.float64)))
    with at_keep_ratio(module, ratio):
        assert torch.equal(module(x), expected)
    unwrap(module)
    assert torch.equal(module(x), dense)
    assert module.code == code


def test_a_plan_is_the_same_while_a_model_of_the_class_is_wrapped():
    class Excites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.down, self.up = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

        def forward(self, x):
            x = F.relu(self.conv(x))
            weights = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
            return x * weights

    live = wrap(Excites())
    assert [row.gated for row in plan(Excites()).rows] == [True, False, False]
    verify(live, torch.randn(2, 3, 4, 4))  # which plans a wrapped model once more
    unwrap(live)
    assert [row.gated for row in plan(Excites()).rows] == [True, False, False]


class OnlyFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("make", [Block, lambda: nn.Sequential(OnlyFunctions(), OnlyFunctions())])
def test_a_trace_of_a_wrapped_model_is_not_scripted(make):
    trace = fx.symbolic_trace(wrap(make()))
    with pytest.raises(WrapError, match="cannot be scripted"):
        torch.jit.script(trace)
