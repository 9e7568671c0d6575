"""``insert_gates``: the FX pass by itself."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models._features_fx import create_feature_extractor as timm_extractor
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torchvision.models.feature_extraction import create_feature_extractor

import regimewrap
from regimewrap import RegimePolicy, at_keep_ratio, gate_of, insert_gates, unwrap, wrap
from regimewrap.rewrite.insert import InsertGates


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.conv(x))
        x = F.relu(x - 0.1).mean((2, 3))
        x = F.dropout(x, 0.5, self.training)
        return F.gelu(self.linear(x))


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def outputs(model, x, training, ratio):
    model.train(training)
    model.zero_grad()
    with at_keep_ratio(model, ratio):
        torch.manual_seed(1)
        y = model(x)
        y.sum().backward()
    return [y, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize(
    "make",
    [
        Net,
        lambda: torchvision.models.resnet18(num_classes=5),
        lambda: torchvision.models.densenet121(num_classes=5),
        lambda: timm.create_model("resnet10t", num_classes=5),
    ],
    ids=["dropout", "resnet18", "densenet121", "timm"],
)
def test_the_pass_equals_wrap_bit_for_bit(make, training, ratio):
    torch.manual_seed(0)
    model = make()
    x = torch.randn(2, 3, 64, 64)
    # buffers that train mode updates are not shared between the two
    graph = insert_gates(copy.deepcopy(model))
    assert isinstance(graph, fx.GraphModule)
    for mine, theirs in zip(outputs(graph, x, training, ratio), outputs(wrap(model), x, training, ratio), strict=True):
        assert torch.equal(mine, theirs)


def test_the_original_is_not_changed_and_parameters_are_shared(x):
    model = Net().eval()
    expected = model(x)
    graph = insert_gates(model)
    gate_of(graph).set_keep_ratio(0.1)
    graph.train()
    assert torch.equal(model.eval()(x), expected)
    assert {id(p) for p in graph.parameters()} == {id(p) for p in model.parameters()}
    assert list(graph.state_dict()) == list(model.state_dict())


def test_train_and_eval_follow_the_mode(x):
    graph = insert_gates(Net())
    graph.train()
    assert not torch.equal(graph(x), graph(x))
    graph.eval()
    assert torch.equal(graph(x), graph(x))


def test_copies_and_files_work(x):
    graph = insert_gates(Net()).eval()
    gate_of(graph).set_keep_ratio(0.2)
    twin = copy.deepcopy(graph)
    assert gate_of(twin) is not gate_of(graph)
    file = io.BytesIO()
    torch.save(graph, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with at_keep_ratio(graph, 0.2):
        expected = graph(x)
    for other in (twin, loaded):
        with at_keep_ratio(other, 0.2):
            assert torch.equal(other(x), expected)
        other.train()
        assert not torch.equal(other(x), other(x))


def test_it_runs_under_a_pass_manager():
    result = PassManager(passes=[InsertGates()])(fx.symbolic_trace(Net().eval()))
    assert result.modified
    assert len(gate_of(result.graph_module).sites) == 3


def test_exported_modules_can_be_gated(x):
    model = Net().eval()
    exported = torch.export.export(model, (x,)).module()
    graph = insert_gates(exported)
    with at_keep_ratio(graph, 1.0):
        assert torch.equal(graph(x), model(x))
    with at_keep_ratio(graph, 0.1), at_keep_ratio(wrap(model), 0.1):
        assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_on_an_exported_module_outputs_and_gradients_are_those_of_wrap(ratio, x):
    torch.manual_seed(0)
    model = Net().eval()
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    graph, wrapped = insert_gates(exported), wrap(model)
    for each in (graph, wrapped):
        with at_keep_ratio(each, ratio):
            each.zero_grad()
            (each(x) ** 2).sum().backward()
    with at_keep_ratio(graph, ratio), at_keep_ratio(wrapped, ratio):
        assert torch.equal(graph(x), wrapped(x))
    mine, theirs = dict(graph.named_parameters()), dict(wrapped.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].grad, theirs[name].grad) for name in mine)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("whose", ["torchvision", "timm"])
def test_feature_extractors_give_the_features_of_a_wrapped_model(whose, ratio):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    if whose == "torchvision":
        model = torchvision.models.resnet18().eval()
        extractor = create_feature_extractor(copy.deepcopy(model), ["layer1", "layer2"])
        stages = [model.layer1, model.layer2]
    else:
        model = timm.create_model("resnet10t").eval()
        extractor = timm_extractor(copy.deepcopy(model), {"layer1": "layer1", "layer2": "layer2"})
        stages = [model.layer1, model.layer2]
    graph = insert_gates(extractor).eval()
    seen = []
    for stage in stages:
        stage.register_forward_hook(lambda *call: seen.append(call[-1]))
    wrap(model)
    with at_keep_ratio(model, ratio), at_keep_ratio(graph, ratio):
        model(x)
        found = graph(x)
    assert [*found] == ["layer1", "layer2"]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.values(), seen, strict=True))
    sum(each.sum() for each in seen).backward()
    sum(each.sum() for each in found.values()).backward()
    grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    mine = {name: each.grad for name, each in graph.named_parameters() if each.grad is not None}
    assert mine.keys() == grads.keys()
    assert all(torch.equal(mine[name], grads[name]) for name in mine)


def test_feature_extractors_can_be_gated():
    model = torchvision.models.resnet18().eval()
    extractor = create_feature_extractor(model, ["layer2"])
    big = torch.randn(1, 3, 64, 64)
    graph = insert_gates(extractor).eval()
    with at_keep_ratio(graph, 1.0):
        assert torch.equal(graph(big)["layer2"], extractor(big)["layer2"])
    with at_keep_ratio(graph, 0.1):
        assert not torch.equal(graph(big)["layer2"], extractor(big)["layer2"])


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_named():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Stubborn(), nn.ReLU())
    with pytest.warns(UserWarning, match=r"1 \("):
        graph = insert_gates(model)
    assert [site.name for site in gate_of(graph).sites] == ["2"]
    with pytest.raises(regimewrap.errors.WrapError, match="cannot be traced as a whole"):
        insert_gates(Stubborn())


def test_a_graph_module_is_wrapped_in_place_and_unwrapped(x):
    model = fx.symbolic_trace(Net().eval())
    code = model.code
    expected = model(x)
    wrap(model, RegimePolicy())
    with at_keep_ratio(model, 0.1):
        gated = model(x)
        assert not torch.equal(gated, expected)
    twin = copy.deepcopy(model)
    with at_keep_ratio(twin, 0.1):
        assert torch.equal(twin(x), gated)
    unwrap(model)
    assert model.code == code
    assert torch.equal(model(x), expected)
    assert not any(name.startswith("_regimewrap") for name in [*model.__dict__, *model._modules])


def test_tracing_leaves_buffers_modes_and_randomness_alone():
    model = torchvision.models.resnet18()
    model.layer1.eval()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    insert_gates(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.layer1.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Leaves(nn.Module):
    """Drops the result of an activation, which matters only if it works in place."""

    def __init__(self, inplace) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        x = x + 1
        F.relu(x, inplace=self.inplace)
        return x


@pytest.mark.parametrize("inplace", [True, False])
def test_a_dropped_activation_matters_only_in_place(x, inplace):
    model = Leaves(inplace)
    graph = insert_gates(model)
    with at_keep_ratio(graph, 1.0):
        assert torch.equal(graph(x), model(x))
    with at_keep_ratio(graph, 0.1):
        assert torch.equal(graph(x), model(x)) is not inplace
