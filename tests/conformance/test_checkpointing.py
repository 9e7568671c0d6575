"""Gradient checkpointing recomputes what the first forward pass computed, and gives the same gradients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
from regimewrap.errors import BudgetError

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


class ByHand(torch.autograd.Function):
    """A checkpoint as people write them, whose context has another name."""

    @staticmethod
    def forward(context, model, x):
        context.model = model
        context.save_for_backward(x)
        return model(x)

    @staticmethod
    def backward(context, grad):
        return None, repeated(context.model, *context.saved_tensors, grad)


class ByHandWithSetup(torch.autograd.Function):
    """The same in torch's newer form."""

    @staticmethod
    def forward(model, x):
        return model(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        del output
        ctx.model, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        return None, repeated(ctx.model, *ctx.saved_tensors, grad)


def repeated(model, x, grad):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = model(x)
    y.backward(grad)
    return x.grad


def selective(model, x):
    aten = torch.ops.aten
    saved = {aten.addmm.default, aten.convolution.default, aten.gelu.default, aten.clone.default}

    def contexts():
        return create_selective_checkpoint_contexts(
            lambda _, operator, *args, **kwargs: (  # noqa: ARG005
                CheckpointPolicy.MUST_SAVE if operator in saved else CheckpointPolicy.PREFER_RECOMPUTE
            )
        )

    return checkpoint(model, x, use_reentrant=False, context_fn=contexts)


def nested(outer_reentrant, inner_reentrant):
    def inner(model, x):
        return checkpoint(model, 2 * x, use_reentrant=inner_reentrant)

    return lambda model, x: checkpoint(
        lambda x: inner(model, x) + inner(model, x + 1), x, use_reentrant=outer_reentrant
    )


CHECKPOINTS = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "saved tensors": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "selective": selective,
    "by hand": ByHand.apply,
    "by hand with setup_context": ByHandWithSetup.apply,
    "reentrant in reentrant": nested(True, True),
    "saved tensors in reentrant": nested(True, False),
    "reentrant in saved tensors": nested(False, True),
    "saved tensors in saved tensors": nested(False, False),
}
every_checkpoint = pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=CHECKPOINTS)
# Torch says so of its own doing where one checkpoint is inside another.
inputs_without_gradient = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


def without_checkpoint(run, model, x):
    return (
        model(2 * x) + model(2 * (x + 1)) if " in " in next(k for k, v in CHECKPOINTS.items() if v is run) else model(x)
    )


@every_checkpoint
@inputs_without_gradient
@pytest.mark.parametrize("scope", ["sample", "network"])
def test_dense_rows_are_repeated_and_validation_between_forward_and_backward_raises_no_alarm(run, scope, x):
    model = wrapped(WRITINGS[0], policy=RegimePolicy(gate=GatePolicy(eval_keep_ratio="current", scope=scope))).train()
    model.norm.eval()
    x.requires_grad_()
    for update in (0, 1):
        gate_of(model).set_budget(0.3, full_share=0.5, update=update)
        expected = gradients(model, without_checkpoint(run, model, x))
        y = run(model, x)
        for training in (True, False):
            model.train(training).norm.eval()
            with torch.no_grad(), at_keep_ratio(model, 0.1):
                model(x)
        model.train().norm.eval()
        assert_same(gradients(model, y), expected)


@every_checkpoint
@inputs_without_gradient
def test_a_forward_alone_in_a_block_is_refused_with_the_remedy_which_works(run, x):
    model = wrapped(WRITINGS[0]).train()
    model.norm.eval()
    x.requires_grad_()
    outside = run(model, x)
    with at_keep_ratio(model, 0.8):
        inside = run(model, x)
    with pytest.raises(
        BudgetError, match=r"at keep ratio 0\.8.* at keep ratio 0\.3.*backward\(\) inside the at_keep_ratio"
    ):
        gradients(model, outside + 2 * inside)
    with at_keep_ratio(model, 0.8):
        expected = gradients(model, without_checkpoint(run, model, x))
        assert_same(gradients(model, run(model, x)), expected)
    expected = gradients(model, without_checkpoint(run, model, x))
    assert_same(gradients(model, run(model, x)), expected)


@every_checkpoint
@inputs_without_gradient
@pytest.mark.parametrize("ratios", [(1.0, 0.3), (0.3, 1.0)])
def test_it_is_refused_too_where_one_of_the_ratios_is_1(run, ratios, x):
    model = wrapped(WRITINGS[1]).train()
    x.requires_grad_()
    gate_of(model).set_keep_ratio(ratios[1])
    with at_keep_ratio(model, ratios[0]):
        inside = run(model, x)
    with pytest.raises(RuntimeError):  # ours, or torch's that other tensors are saved now
        gradients(model, inside)


@every_checkpoint
@inputs_without_gradient
def test_other_dense_rows_before_backward_are_refused(run, x):
    model = wrapped(WRITINGS[0]).train()
    x.requires_grad_()
    gate_of(model).set_budget(0.3, full_share=0.5, update=0)
    y = run(model, x)
    gate_of(model).set_budget(0.3, full_share=0.5, update=1)
    with pytest.raises(BudgetError, match=r"RegimeCycler\.step or set_keep_ratio after backward"):
        gradients(model, y)


@both_modes
@pytest.mark.parametrize("block_first", [True, False])
def test_blocks_inside_a_checkpoint_are_repeated_at_their_own_ratios(use_reentrant, block_first, x):
    def both(model, x):
        outside = None if block_first else model(x)
        with at_keep_ratio(model, 0.6):
            inside = model(x)
        return inside + 3 * (model(x) if block_first else outside)

    model = wrapped(WRITINGS[0]).train()
    model.norm.eval()
    x.requires_grad_()
    expected = gradients(model, both(model, x))
    assert_same(gradients(model, checkpoint(both, model, x, use_reentrant=use_reentrant)), expected)


@both_modes
def test_a_graph_that_is_kept_is_refused_at_another_ratio_and_recomputed_at_its_own(use_reentrant, x):
    model = wrapped(WRITINGS[0])
    x.requires_grad_()
    y = checkpoint(model, x, use_reentrant=use_reentrant).sum()
    gate_of(model).set_keep_ratio(0.9)
    with pytest.raises(BudgetError):
        y.backward(retain_graph=True)
    gate_of(model).set_keep_ratio(0.3)
    found = []
    for _ in range(2):
        model.zero_grad()
        y.backward(retain_graph=True)
        found.append({name: each.grad.clone() for name, each in model.named_parameters()})
    assert_same(*found)


@both_modes
def test_threads_that_number_their_own_functions_raise_no_alarm(use_reentrant, x):
    model = wrapped(WRITINGS[0]).train()
    model.norm.eval()
    x.requires_grad_()
    expected = gradients(model, model(x))
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            with at_keep_ratio(model, 0.8):
                gradients(model, checkpoint(model, x, use_reentrant=use_reentrant))
            found = pool.submit(lambda: gradients(model, checkpoint(model, x, use_reentrant=use_reentrant))).result()
            assert_same(found, expected)


@both_modes
def test_network_scope_does_not_count_a_recomputation_again(use_reentrant, x):
    policy = RegimePolicy(gate=GatePolicy(scope="network"))
    model = wrapped(WRITINGS[0], policy=policy).train()
    x.requires_grad_()
    y = checkpoint(model, x, use_reentrant=use_reentrant)
    before = [counts.clone() for counts in gate_of(model).network.counts()]
    y.sum().backward()
    assert all(counts.sum() > 0 for counts in before)
    assert all(map(torch.equal, before, gate_of(model).network.counts()))


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
