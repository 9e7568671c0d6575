"""What torch and users do to modules: fusion, SyncBN, parametrizations, hooks, replaced children."""

from __future__ import annotations

import copy

import pytest
import torch
from specimens import POLICY, WRITINGS, Hooked, assert_same, bare, by_hand, gradients, wrapped
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from regimewrap import at_keep_ratio, gate_of, unwrap, verify, wrap
from regimewrap.errors import UnreachableSiteError
from regimewrap.gate.gate import find_gate

every_writing = pytest.mark.parametrize("make", WRITINGS)


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()


@pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning", "ignore:.*torch.ao:FutureWarning")
@pytest.mark.parametrize("names", [["0", "1"], ["0", "1", "2"]], ids=["conv_bn", "conv_bn_relu"])
def test_fusing_convolutions_keeps_the_gate_behind_the_activation(names, x):
    from torch.ao.quantization import fuse_modules

    model = wrap(block(), POLICY)
    gate_of(model).set_keep_ratio(0.2)
    expected = model(x)
    fused = fuse_modules(model, names)
    torch.testing.assert_close(fused(x), expected)
    assert gate_of(fused).keep_ratio == 0.2


@pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning", "ignore:.*torch.ao:FutureWarning")
def test_a_block_that_was_fused_before_is_gated(x):
    from torch.ao.quantization import fuse_modules

    model = wrap(fuse_modules(block(), ["0", "1", "2"]), POLICY)
    expected = wrap(block(), POLICY)
    for each in (model, expected):
        gate_of(each).set_keep_ratio(0.2)
    torch.testing.assert_close(model(x), expected(x))


@pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_a_fused_quantized_activation_is_reported():
    from torch.ao.nn.intrinsic.quantized import ConvReLU2d

    torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    model = nn.Sequential(ConvReLU2d(3, 8, 3), nn.GELU())
    with pytest.raises(UnreachableSiteError, match="ConvReLU2d computes it inside torch"):
        wrap(model)


@every_writing
def test_sync_batchnorm_conversion_after_wrap(make, x):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped(make))
    assert type(model.norm) is nn.SyncBatchNorm
    torch.testing.assert_close(model(x), by_hand(bare(make), x))
    unwrap(model)
    torch.testing.assert_close(model(x), bare(make)(x))


@every_writing
def test_sync_batchnorm_conversion_before_wrap(make, x):
    model = wrap(nn.SyncBatchNorm.convert_sync_batchnorm(bare(make)), POLICY)
    gate_of(model).set_keep_ratio(0.3)
    torch.testing.assert_close(model(x), by_hand(bare(make), x))


@every_writing
@pytest.mark.parametrize("first", ["wrap", "parametrize"])
@pytest.mark.parametrize("way", [parametrizations.weight_norm, parametrizations.spectral_norm, "orthogonal"])
def test_parametrizations_before_and_after_wrap(make, first, way, x):
    way = parametrizations.orthogonal if way == "orthogonal" else way
    model, plain = bare(make), bare(make)
    torch.manual_seed(1)
    way(plain.hidden)
    if first == "wrap":
        wrap(model, POLICY)
    torch.manual_seed(1)
    way(model.hidden)
    if first == "parametrize":
        wrap(model, POLICY)
    gate_of(model).set_keep_ratio(0.3)
    mine, theirs = model(x), by_hand(plain, x)
    torch.testing.assert_close(mine, theirs)
    assert_same(gradients(model, mine), gradients(plain, theirs))
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), theirs)
    unwrap(model)
    parametrize.remove_parametrizations(model.hidden, "weight")
    assert type(model.hidden) is nn.Linear


class Scales(nn.Module):
    """It owns a parameter and calls its activation as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return torch.relu(x * self.scale)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("first", ["wrap", "parametrize"])
@pytest.mark.parametrize("order", ["remove_first", "unwrap_first"])
def test_a_parametrization_and_a_wrap_come_off_in_any_order(first, order):
    model, x = Scales(), torch.randn(2, 8)
    steps = [
        lambda: wrap(model, POLICY),
        lambda: parametrize.register_parametrization(model, "scale", Double()),
    ]
    for step in steps if first == "wrap" else reversed(steps):
        step()
    with at_keep_ratio(model, 0.2):
        assert (model(x) != 0).sum() <= 2
    steps = [lambda: unwrap(model), lambda: parametrize.remove_parametrizations(model, "scale", False)]
    for step in steps if order == "unwrap_first" else reversed(steps):
        step()
        if find_gate(model) is not None:
            with at_keep_ratio(model, 0.2):
                assert (model(x) != 0).sum() <= 2
    assert type(model) is Scales
    assert torch.equal(model(x), torch.relu(x))


def test_the_class_that_a_parametrization_made_comes_back_and_may_have_grown_meanwhile():
    model, x = Scales(), torch.randn(2, 8)
    parametrize.register_parametrization(model, "scale", Double())
    made = type(model)
    unwrap(wrap(model, POLICY))
    assert type(model) is made
    wrap(model, POLICY)
    model.shift = nn.Parameter(torch.ones(8))
    parametrize.register_parametrization(model, "shift", Double())
    unwrap(model)
    assert torch.equal(model.shift, torch.full((8,), 2.0))
    assert torch.equal(model(x), torch.relu(2 * x))
    for name in ("scale", "shift"):
        parametrize.remove_parametrizations(model, name, False)
    assert type(model) is Scales


@every_writing
def test_user_hooks_of_every_kind_run_and_come_off_whatever_the_order(make, x):
    seen, model = [], bare(make)
    before = [
        model.register_forward_pre_hook(lambda module, args: seen.append("pre")),  # noqa: ARG005
        model.register_full_backward_hook(lambda module, *_: seen.append("backward")),  # noqa: ARG005
    ]
    wrap(model, POLICY)
    gate_of(model).set_keep_ratio(0.3)
    after = [
        model.register_forward_hook(lambda module, args, kwargs, output: seen.append("post"), with_kwargs=True),  # noqa: ARG005
        model.register_forward_hook(lambda module, args, output: seen.append("first"), prepend=True),  # noqa: ARG005
    ]
    plain = bare(make)
    y = model(x.requires_grad_())
    torch.testing.assert_close(y, by_hand(plain, x))
    y.sum().backward()
    assert seen == ["pre", "first", "post", "backward"]
    for handle in (*before, *after):
        handle.remove()
    model(x)
    assert len(seen) == 4
    unwrap(model)
    assert torch.equal(model(x), plain(x))


def test_a_prepended_user_hook_sees_the_bare_activation_and_may_replace_the_gates_input():
    model = wrap(nn.Sequential(nn.Identity(), nn.GELU()), POLICY)
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output), prepend=True)  # noqa: ARG005
    model[1].register_forward_hook(lambda module, args, output: output + 1)  # noqa: ARG005
    with at_keep_ratio(model, 0.1):
        y = model(torch.rand(1, 10) + 0.1)
    assert (seen[0] != 0).all()
    assert (y != 1).sum() == 1


def test_a_user_hook_on_a_relu_may_change_what_is_gated():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * -1,))  # noqa: ARG005
    wrap(model, POLICY)
    x = torch.arange(-5.0, 5.0)[None]
    with at_keep_ratio(model, 0.1):
        assert model(x).tolist() == [[5.0] + [0.0] * 9]


def test_a_gated_module_called_by_its_forward_alone_is_flagged(x):
    class Around(Hooked):
        def forward(self, x):
            x = self.act(self.norm(self.conv(x)))
            return self.head(self.act2.forward(self.hidden(x.mean((2, 3)))))

    coverage = verify(wrap(Around().eval(), POLICY), x)
    assert coverage.gated == ("act",)
    assert coverage.idle == ("act2",)


def test_a_layer_put_in_place_of_another_is_flagged(x):
    model = wrapped(Hooked)
    model.act = nn.SiLU()
    model.hidden = nn.Sequential(nn.Linear(8, 20), nn.ReLU())
    coverage = verify(model, x)
    assert coverage.escaped == ("act", "hidden.1")
    assert "hidden.1" in str(coverage)
