from __future__ import annotations

import pytest
import torch
from torch import nn

from regimewrap import at_keep_ratio, plan, wrap
from regimewrap.errors import PolicyError
from regimewrap.recipes.wide_resnet import RMSNorm2d, WideResNet, parse_arch


def count_relus(model: nn.Module) -> int:
    return sum(isinstance(module, nn.ReLU) for module in model.modules())


def test_wrn_28_4_has_25_activations_and_about_5_8_million_parameters():
    model = WideResNet(28, 4)

    assert count_relus(model) == 25
    assert 5.75e6 < sum(p.numel() for p in model.parameters()) < 5.90e6


@pytest.mark.parametrize(("activation", "mechanism"), [("module", "hook"), ("function", "source")])
def test_every_activation_of_wrn_28_4_is_gated_by_either_mechanism(activation, mechanism):
    planned = plan(WideResNet(28, 4, activation=activation))

    assert [row.mechanism for row in planned.gated] == [mechanism] * 25
    assert len(planned) == 25


def test_gated_modules_and_gated_functions_give_the_same_network():
    modules, functions = (WideResNet(10, 1, in_channels=1, activation=kind) for kind in ("module", "function"))
    functions.load_state_dict(modules.state_dict())
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    dense = modules(images)
    outputs = []
    for model in (wrap(modules), wrap(functions)):
        with at_keep_ratio(model, 0.1):
            outputs.append(model(images))

    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], dense)


@pytest.mark.parametrize(("depth", "expected"), [(10, 7), (16, 13), (22, 19), (40, 37)])
def test_there_are_two_activations_a_block_and_one_before_pooling(depth, expected):
    assert count_relus(WideResNet(depth, 1)) == expected


@pytest.mark.parametrize("norm", ["rms", "batch"])
def test_modules_and_functions_give_the_same_network(norm):
    modules = WideResNet(16, 1, in_channels=1, norm=norm, activation="module")
    functions = WideResNet(16, 1, in_channels=1, norm=norm, activation="function")
    functions.load_state_dict(modules.state_dict(), strict=True)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    assert count_relus(functions) == 0
    assert torch.equal(modules(images), functions(images))


def test_stages_halve_the_image_and_widen_the_channels():
    model = WideResNet(10, 2)
    features = model.stages(model.stem(torch.zeros(1, 3, 32, 32)))

    assert features.shape == (1, 128, 8, 8)


def test_activations_do_not_overwrite_their_input():
    assert not any(module.inplace for module in WideResNet(10, 1).modules() if isinstance(module, nn.ReLU))


def test_rms_norm_gives_each_pixel_a_root_mean_square_of_one():
    x = 5 * torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(1))

    out = RMSNorm2d(8)(x)

    assert torch.allclose(out.square().mean(dim=1), torch.ones(2, 3, 3), atol=1e-4)


def test_an_arch_name_gives_depth_and_width():
    assert parse_arch("wrn-16-2") == (16, 2)
    assert parse_arch(" WRN-28-10 ") == (28, 10)


@pytest.mark.parametrize("text", ["", "resnet18", "wrn-16", "wrn-16-2-1", "wrn--2", "wrn-x-2"])
def test_a_name_of_another_form_is_refused_with_an_example(text):
    with pytest.raises(PolicyError, match="wrn-DEPTH-WIDTH, for example wrn-16-2"):
        parse_arch(text)


@pytest.mark.parametrize(("depth", "nearest"), [(20, "16 and 22"), (15, "10 and 16"), (3, "10"), (29, "28 and 34")])
def test_a_depth_that_is_not_6n_plus_4_is_refused_with_the_nearest(depth, nearest):
    with pytest.raises(PolicyError, match=rf"got {depth}\. Nearest: {nearest}\."):
        WideResNet(depth, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 10, "width": 0}, "width must be in 1..64; got 0"),
        ({"depth": 10, "width": 999}, "width must be in 1..64; got 999"),
        ({"depth": 6004, "width": 1}, "depth must be at most 1000"),
        ({"depth": 10, "width": 1, "norm": "layer"}, "norm must be one of rms, batch; got 'layer'"),
        ({"depth": 10, "width": 1, "activation": "gelu"}, "activation must be one of module, function; got 'gelu'"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(settings, message):
    with pytest.raises(PolicyError, match=message):
        WideResNet(**settings)
