"""Gradient checkpointing recomputes what the first forward pass computed, and gives the same gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from specimens import POLICY, WRITINGS, assert_same, bare, by_hand, gradients, wrapped
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from regimewrap import GatePolicy, RegimePolicy, at_keep_ratio, gate_of, watch, wrap

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


def at_two_ratios(run, x):
    """Return the gradients of one loss over two forward passes, at 0.3 and in a block at 0.8; other ratios follow."""
    model = wrapped(WRITINGS[0]).train()
    first = run(model, x)
    with at_keep_ratio(model, 0.8):
        second = run(model, x)
    with torch.no_grad(), at_keep_ratio(model.eval(), 0.1):
        model(x)
    model.train()
    gate_of(model).set_keep_ratio(0.05)
    return gradients(model, first + 2 * second)


@both_modes
def test_each_recomputation_keeps_to_the_ratio_of_its_own_forward_pass(use_reentrant, x):
    x.requires_grad_()
    found = at_two_ratios(lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant), x)
    assert_same(found, at_two_ratios(lambda model, x: model(x), x))


@both_modes
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # torch, of its own doing
@pytest.mark.parametrize("inner_reentrant", [True, False], ids=["inner_reentrant", "inner_saved_tensors"])
def test_the_ratio_reaches_recomputations_inside_recomputations(use_reentrant, inner_reentrant, x):
    def inner(model, x):
        return checkpoint(model, 2 * x, use_reentrant=inner_reentrant)

    def outer(model, x):
        return checkpoint(lambda x: inner(model, x) + inner(model, x + 1), x, use_reentrant=use_reentrant)

    x.requires_grad_()
    found = at_two_ratios(outer, x)
    assert_same(found, at_two_ratios(lambda model, x: model(2 * x) + model(2 * (x + 1)), x))


@both_modes
@pytest.mark.parametrize("block_first", [True, False])
def test_blocks_inside_a_checkpoint_are_repeated_at_their_own_ratios(use_reentrant, block_first, x):
    def both(model, x):
        outside = None if block_first else model(x)
        with at_keep_ratio(model, 0.6):
            inside = model(x)
        return inside + 3 * (model(x) if block_first else outside)

    x.requires_grad_()
    found = at_two_ratios(lambda model, x: checkpoint(both, model, x, use_reentrant=use_reentrant), x)
    assert_same(found, at_two_ratios(both, x))


@both_modes
def test_a_graph_that_is_kept_recomputes_at_its_ratio_each_time(use_reentrant, x):
    model = wrapped(WRITINGS[0])
    x.requires_grad_()
    y = checkpoint(model, x, use_reentrant=use_reentrant).sum()
    found = []
    for ratio in (0.9, 0.05):
        gate_of(model).set_keep_ratio(ratio)
        model.zero_grad()
        y.backward(retain_graph=True)
        found.append({name: each.grad.clone() for name, each in model.named_parameters()})
    assert_same(*found)


def test_selective_checkpointing_keeps_to_the_ratio_of_the_forward_pass(x):
    aten = torch.ops.aten
    saved = {aten.addmm.default, aten.convolution.default, aten.gelu.default, aten.clone.default}

    def contexts():
        return create_selective_checkpoint_contexts(
            lambda _, operator, *args, **kwargs: (  # noqa: ARG005
                CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE
            )
        )

    x.requires_grad_()
    found = at_two_ratios(
        lambda model, x: checkpoint(model, x, use_reentrant=False, context_fn=contexts),
        x,
    )
    assert_same(found, at_two_ratios(lambda model, x: model(x), x))


@both_modes
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_watching_only_one_of_the_two_passes_changes_no_gradient(use_reentrant, watched, x):
    model = wrapped(WRITINGS[0])
    x.requires_grad_()
    expected = gradients(model, model(x))
    with watch(model) if watched == "forward" else nullcontext():
        y = checkpoint(model, x, use_reentrant=use_reentrant)
    with watch(model) if watched == "backward" else nullcontext():
        found = gradients(model, y)
    assert_same(found, expected)


@both_modes
def test_in_a_compiled_model_a_recomputation_is_part_of_the_one_graph(use_reentrant, x, fresh_compiler):  # noqa: ARG001
    model = wrapped(WRITINGS[0])
    x.requires_grad_()
    expected = gradients(model, model(x))
    run = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=use_reentrant), backend="aot_eager", fullgraph=True
    )
    assert_same(gradients(model, run(x)), expected)
    y = run(x)
    gate_of(model).set_keep_ratio(0.05)
    try:
        found = gradients(model, y)
    except RuntimeError:  # torch notices that the ratio, which the graph needs again, has changed
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
