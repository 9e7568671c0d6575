"""Gradient checkpointing recomputes what the first forward pass computed, and gives the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from specimens import POLICY, WRITINGS, assert_same, bare, by_hand, gradients, wrapped
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from regimewrap import GatePolicy, RegimePolicy, gate_of, watch, wrap

every_writing = pytest.mark.parametrize("make", WRITINGS)
both_modes = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved_tensors"])


def vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=4)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, channels=(8, 8, 16, 16), stem_width=8)


@every_writing
@both_modes
def test_gradients_equal_those_without_checkpointing(make, use_reentrant, x):
    model, plain = wrapped(make), bare(make)
    x.requires_grad_()
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    assert_same(gradients(model, y), gradients(plain, by_hand(plain, x)))


@every_writing
@both_modes
def test_gates_inside_a_longer_checkpoint_recompute_the_same_units_under_dropout(make, use_reentrant, x):
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(F.dropout(x, 0.5, self.training))

    model, plain = Around(wrapped(make)).train(), Around(wrapped(make)).train()
    x.requires_grad_()
    torch.manual_seed(1)
    found = gradients(model, checkpoint(model, x, use_reentrant=use_reentrant))
    torch.manual_seed(1)
    assert_same(found, gradients(plain, plain(x)))


@both_modes
def test_torchs_sequential_checkpointing_gives_the_same_gradients(use_reentrant):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.GELU())]
    model = wrap(nn.Sequential(*layers), POLICY)
    gate_of(model).set_keep_ratio(0.3)
    x = torch.randn(4, 8, requires_grad=True)
    mine = gradients(model, checkpoint_sequential(model, 2, x, use_reentrant=use_reentrant))
    assert_same(mine, gradients(model, model(x)))


@pytest.mark.parametrize("make", [vit, resnet])
@pytest.mark.parametrize("first", ["wrap", "set"])
def test_timms_checkpointing_gives_the_same_gradients(make, first):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain, model = wrap(make(), POLICY), make()
    if first == "set":
        model.set_grad_checkpointing()
    wrap(model, POLICY)
    if first == "wrap":
        model.set_grad_checkpointing()
    for each in (plain, model):
        gate_of(each).set_keep_ratio(0.3)
        each.train()
    recomputed = []
    gate_of(model).observers.append(lambda *_: recomputed.append(torch._C._current_graph_task_id() >= 0))
    y = model(x)
    before = len(recomputed)
    found = gradients(model, y)
    assert any(recomputed[before:]), "nothing was checkpointed"
    assert_same(found, gradients(plain, plain(x)))


@both_modes
@pytest.mark.xfail(strict=True, reason="the recomputation uses the new ratio, and nobody notices")
def test_a_ratio_that_changes_before_the_recomputation_is_deferred_or_refused(use_reentrant, x):
    model = wrapped(WRITINGS[0])
    x.requires_grad_()
    expected = gradients(model, model(x))
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    try:
        gate_of(model).set_keep_ratio(0.05)
        found = gradients(model, y)
    except RuntimeError:
        return
    assert_same(found, expected)


@every_writing
@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
def test_a_ratio_that_changes_between_forward_and_backward_does_not_alter_gradients(make, gradient, x):
    policy = RegimePolicy(gate=GatePolicy(eval_keep_ratio="current", gradient=gradient))
    model = wrapped(make, policy=policy)
    expected = gradients(model, model(x))
    y = model(x)
    gate_of(model).set_keep_ratio(0.05)
    assert_same(gradients(model, y), expected)


@every_writing
@both_modes
def test_statistics_are_not_doubled_by_recomputation(make, use_reentrant, x):
    model = wrapped(make)
    x.requires_grad_()
    with watch(model) as seen:
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert {record.calls for record in seen.by_site.values()} == {1}
