"""``verify`` runs one forward pass and names the activations that no gate saw."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from regimewrap import RegimePolicy, SitePolicy, gate_of, unwrap, verify, watch, wrap
from regimewrap.errors import UnreachableSiteError


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


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.linear(x))


class Fused(nn.Module):
    """As a kernel that does a whole MLP, out of sight of everybody."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.linear = mlp[0]

    def forward(self, x):
        return self.linear(x) * torch.special.ndtr(self.linear(x))  # a GELU that has no name


def network() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), nn.ReLU())


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_activations_in_a_part_that_was_scripted_later_are_named():
    model = wrap(network())
    model[0] = torch.jit.script(nn.Sequential(Scripted(), nn.ReLU()))
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.escaped == ("0.0.relu", "0.1")
    assert "scripted" in coverage.reasons["0.0.relu"]
    assert "put a plain module in its place" in str(coverage)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_functions_in_a_scripted_part_are_in_the_plan():
    with pytest.raises(UnreachableSiteError, match=r"0\.relu \(it is scripted"):
        wrap(nn.Sequential(torch.jit.script(Scripted()), nn.ReLU()))


@pytest.mark.filterwarnings("ignore:.*torch.ao", "ignore:torch.quantize_per_tensor", "ignore:.*quantized")
def test_a_module_that_fuses_its_activation_is_named():
    from torch.ao.nn.intrinsic.quantized.dynamic import LinearReLU

    model = wrap(network())
    model[1] = LinearReLU(4, 4)
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.escaped == ("1",)
    assert "LinearReLU computes it inside torch; put a plain module in its place" in str(coverage)


@pytest.mark.filterwarnings("ignore:.*torch.ao", "ignore:.*quantiz", "ignore:Please use quant_min")
def test_a_layer_that_is_trained_for_quantization_together_with_its_relu_is_gated():
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)),
        torch.randn(4, 8),
    )
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    torch.ao.quantization.fuse_modules_qat(model.train(), [["0", "1"]], inplace=True)
    torch.ao.quantization.prepare_qat(model, inplace=True)(x)
    model.apply(torch.ao.quantization.disable_observer)
    dense = model(x)
    assert torch.equal(wrap(model, example_inputs=x)(x), dense)
    gate_of(model).set_keep_ratio(0.25)
    assert verify(model, x).gated == ("0", "3")
    assert ((model[0](x) != 0).sum(1) <= 4).all()
    assert torch.equal(unwrap(model)(x), dense)


def test_a_replaced_activation_is_told_from_one_that_was_added():
    model = wrap(network())
    model[2] = nn.GELU()
    model.append(nn.SiLU())
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.escaped == ("2", "3")
    assert coverage.reasons["2"].startswith("a GELU was put in the place of what was gated")
    assert "after the model was wrapped" in coverage.reasons["3"]
    assert not verify(wrap(unwrap(model)), torch.randn(2, 4)).escaped


def test_a_replaced_forward_that_goes_around_a_site_is_an_escape():
    model = wrap(network())
    mlp = model[0]
    mlp.forward = lambda x: mlp[0](x) * torch.special.ndtr(mlp[0](x))  # a GELU that has no name
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.escaped == ("0.1",)
    assert coverage.idle == ("0.1",)
    assert "the forward of 0 (Sequential) has been replaced" in str(coverage)
    del mlp.forward
    assert not verify(model, torch.randn(2, 4)).idle


def test_a_module_in_the_place_of_one_with_sites_is_named():
    model = wrap(network())
    model[0] = Fused(model[0])
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.idle == ("0.1",)
    assert "0 is a Fused now" in str(coverage)


def test_a_function_that_new_code_calls_is_named_with_what_calls_it():
    model = wrap(network())
    model[0] = Scripted()
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.escaped == ("0.forward.relu",)
    assert "Scripted calls it in code that was not there" in str(coverage)


def test_a_module_that_forward_makes_anew_each_time_is_named():
    class Makes(nn.Module):
        def forward(self, x):
            return getattr(nn, "GE" + "LU")()(x)

    model = wrap(network())
    model[1] = Makes()
    coverage = verify(model, torch.randn(2, 4))
    assert coverage.escaped == ("1.forward.gelu",)
    assert "Makes calls it in code that was not there" in str(coverage)


def test_a_branch_that_is_not_taken_did_not_run_and_did_not_escape():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act, self.more = nn.Linear(4, 4), nn.ReLU(), network()

        def forward(self, x):
            x = self.act(self.linear(x))
            return self.more(x) if x.dim() > 2 else x

    coverage = verify(wrap(Branches()), torch.randn(2, 4))
    assert coverage.gated == ("act",)
    assert coverage.idle == ("more.0.1", "more.2")
    assert not coverage.escaped
    assert "its part of the model did not run" in str(coverage)


def test_a_part_is_verified_by_itself():
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), nn.ReLU()))
    model[1][0] = nn.GELU()
    coverage = verify(model[1], torch.randn(2, 4))
    assert coverage.gated == ("1.2",)
    assert coverage.escaped == coverage.idle == ("1.0",)


def test_what_watches_the_gate_does_not_see_the_pass():
    model = wrap(network())
    with watch(model) as seen:
        verify(model, torch.randn(2, 4))
        assert not seen.by_site
        model(torch.randn(2, 4))
    assert seen.by_site


def test_a_buffer_that_forward_puts_another_in_place_of_is_put_back():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1
            return self.act(x)

    model = wrap(Counts())
    before = model.seen
    verify(model, torch.randn(2, 4))
    assert model.seen is before
    assert model.seen == 0
