"""What timm's models do beside ``forward``, and its layers with the activation inside."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from specimens import POLICY
from timm.layers import EvoNorm2dB0, EvoNorm2dS0, convert_sync_batchnorm
from timm.layers.inplace_abn import InplaceAbn
from timm.models.densenet import DenseNet
from timm.models.mobilevit import MobileVitV2Block
from timm.models.resnet import BasicBlock, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn

from regimewrap import at_keep_ratio, gate_of, plan, unwrap, verify, wrap
from regimewrap.topk import reference


def vit() -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=4)


def resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, channels=(8, 8, 16, 16), stem_width=8)


def resnetv2() -> nn.Module:
    norm = partial(timm.layers.GroupNormAct, num_groups=4)
    return ResNetV2((1, 1, 1, 1), (16, 16, 32, 32), num_classes=4, stem_chs=8, norm_layer=norm)


def resnetv2_with_batchnorm() -> nn.Module:
    layers = {"norm_layer": timm.layers.BatchNormAct2d, "conv_layer": timm.layers.create_conv2d}
    return ResNetV2((1, 1, 1, 1), (16, 16, 32, 32), num_classes=4, stem_chs=8, **layers)


def densenet() -> nn.Module:
    return DenseNet(growth_rate=4, block_config=(1, 1), num_classes=4)


every_model = pytest.mark.parametrize("make", [vit, resnet, resnetv2, densenet])
with_intermediates = pytest.mark.parametrize("make", [vit, resnet, resnetv2])


def made(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@every_model
def test_features_asked_for_directly_are_gated(make, images):
    model, plain = wrap(made(make), POLICY), made(make)
    assert torch.equal(model.forward_features(images), plain.forward_features(images))
    gate_of(model).set_keep_ratio(0.2)
    features = model.forward_features(images)
    assert not torch.equal(features, plain.forward_features(images))
    assert torch.equal(model.forward_head(features), model(images))


@with_intermediates
def test_intermediate_features_asked_for_directly_are_gated(make, images):
    model, plain = wrap(made(make), POLICY), made(make)
    full, expected = model.forward_intermediates(images), plain.forward_intermediates(images)
    assert torch.equal(full[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(full[1], expected[1], strict=True))
    gate_of(model).set_keep_ratio(0.2)
    _, stages = model.forward_intermediates(images)
    changed = [not torch.equal(a, b) for a, b in zip(stages, expected[1], strict=True)]
    assert changed[-1]
    assert sum(changed) >= len(changed) - 1  # the first may be the stem


@every_model
def test_timms_own_attributes_and_methods_stay(make, images):
    model = wrap(made(make))
    assert model.get_classifier() is not None
    assert model.num_classes == 4
    assert isinstance(model.group_matcher() if hasattr(model, "group_matcher") else {}, dict)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)


def test_a_head_with_an_activation_that_reset_classifier_brings_is_flagged(images):
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.GELU())
            self.reset_classifier(4)

        def reset_classifier(self, classes: int) -> None:
            self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, classes))

        def forward(self, x):
            return self.head(self.body(x))

    model = wrap(WithHead())
    assert not verify(model, images).escaped
    model.reset_classifier(7)
    coverage = verify(model, images)
    assert coverage.escaped == ("head.1",)
    assert coverage.idle == ("head.1",)
    wrap(unwrap(model))
    assert not verify(model, images).escaped


@pytest.mark.parametrize("layer", [EvoNorm2dB0, EvoNorm2dS0], ids=["EvoNorm2dB0", "EvoNorm2dS0"])
@pytest.mark.parametrize("training", [True, False])
def test_the_output_of_evonorm_is_gated(layer, training):
    torch.manual_seed(0)
    kwargs = {"group_size": 4} if layer is EvoNorm2dS0 else {}
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), layer(8, **kwargs)).train(training)
    model = wrap(copy.deepcopy(plain), POLICY)
    x = torch.randn(2, 3, 6, 6)
    assert [row.name for row in plan(plain).gated] == ["1"]
    assert torch.equal(model(x), plain(x))
    gate_of(model).set_keep_ratio(0.2)
    full = plain(x)
    assert torch.equal(model(x), full * reference.kept(full, 0.2))


def test_the_output_of_inplace_abn_is_gated_once(monkeypatch):
    def activated(x, weight, bias, mean, var, training, momentum, eps, activation="", activation_param=0.01):  # noqa: ARG001
        return F.leaky_relu(F.batch_norm(x, mean, var, weight, bias, training, momentum, eps), activation_param)

    # its kernels need a package of their own and a GPU
    monkeypatch.setattr("timm.layers.inplace_abn.inplace_abn", activated)
    monkeypatch.setattr("timm.layers.inplace_abn.inplace_abn_sync", lambda **_: None)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), InplaceAbn(8)).eval()
    model = wrap(copy.deepcopy(plain), POLICY)
    x = torch.randn(2, 3, 6, 6)
    assert [site.name for site in gate_of(model).sites] == ["1"]
    with at_keep_ratio(model, 0.2):
        full = plain(x)
        assert torch.equal(model(x), full * reference.kept(full, 0.2))


def test_inplace_abn_without_an_activation_is_no_site():
    model = nn.Sequential(InplaceAbn(8, apply_act=False), nn.GELU())
    assert [row.name for row in plan(model).gated] == ["1"]


@pytest.mark.parametrize("first", ["wrap", "convert"])
def test_timms_sync_batchnorm_conversion_keeps_the_gates(first, images):
    model, plain = made(resnetv2_with_batchnorm), made(resnetv2_with_batchnorm)
    steps = [lambda m: wrap(m, POLICY), convert_sync_batchnorm]
    for step in steps if first == "wrap" else reversed(steps):
        model = step(model)
    wrap(plain, POLICY)
    for each in (model, plain):
        gate_of(each).set_keep_ratio(0.2)
    torch.testing.assert_close(model(images), plain(images))
    assert not verify(model, images).escaped


def test_batchnorm_and_activation_in_one_layer_count_batches_once(images):
    model = wrap(made(resnetv2_with_batchnorm)).train()
    model(images)
    counted = {int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counted == {1}


@every_model
def test_timms_averaged_model_is_gated_by_itself(make, images):
    model = wrap(made(make), POLICY)
    averaged = ModelEmaV3(model)
    gate_of(model).set_keep_ratio(0.2)
    averaged.update(model)
    assert gate_of(averaged).keep_ratio == 1.0
    assert torch.equal(averaged.module(images), made(make)(images))


def test_activations_of_a_block_that_normalises_are_told_from_those_that_weigh():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), MobileVitV2Block(16, 16, transformer_depth=1)).eval()
    labels = {row.name: row for row in plan(model)}
    attention = [name for name in labels if ".attn." in name]
    assert attention
    wrap(model, POLICY)
    coverage = verify(model, torch.randn(1, 3, 18, 18))
    assert not coverage.escaped
    with at_keep_ratio(model, 0.1):
        assert model(torch.randn(1, 3, 18, 18)).shape == (1, 16, 16, 16)
