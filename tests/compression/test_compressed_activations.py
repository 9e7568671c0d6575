"""Inside ``compressed_activations`` gated activations wait for backward in less memory, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import regimewrap
from regimewrap import GatePolicy, RegimePolicy, compressed_activations, gate_of
from regimewrap.errors import NotWrappedError
from regimewrap.recipes.wide_resnet import WideResNet

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Net(nn.Module):
    """Convolutions and linear layers around one kind of activation."""

    def __init__(self, act: Callable[[], nn.Module] = nn.ReLU, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act1, self.act2, self.act3 = act(), act(), act()
        self.drop = nn.Dropout(dropout)
        self.hidden, self.head = nn.Linear(8 * 64, 96), nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm(self.conv1(x)))
        x = self.act2(self.conv2(x) + 0.0)
        return self.head(self.drop(self.act3(self.hidden(x.flatten(1)))))


class Called(Net):
    """The same with functions."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = F.gelu(self.conv2(x))
        return self.head(F.silu(self.hidden(x.flatten(1))))


def wrapped(make: Callable[[], nn.Module] = Net, keep_ratio: float = 0.1, **rule: Any) -> nn.Module:
    torch.manual_seed(0)
    model = regimewrap.wrap(make(), RegimePolicy(gate=GatePolicy(**rule)))
    gate_of(model).set_keep_ratio(keep_ratio)
    return model


def images(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(model: nn.Module, x: Tensor, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """Return the loss and all gradients of a step."""
    torch.manual_seed(2)
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    loss = (model if call is None else call)(x).float().square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *[p.grad.clone() for p in model.parameters()]]


def inside(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with compressed_activations(model):
            return model(x)

    return call


def assert_same_bits(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        integer = INTEGERS[a.element_size()]
        assert torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def held(output: Tensor) -> int:
    """Return the bytes that the graph behind ``output`` holds, without leaves."""
    storages: dict[int, Tensor] = {}
    leaves: set[int] = set()
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable.untyped_storage()._cdata)
        nodes += [each for each, _ in node.next_functions]
        for name in [name for name in dir(node) if name.startswith("_raw_saved")]:
            saved = getattr(node, name)
            for each in saved if isinstance(saved, list | tuple) else [saved]:
                storages |= {tensor.untyped_storage()._cdata: tensor for tensor in _tensors(each)}
    return sum(each.untyped_storage().nbytes() for key, each in storages.items() if key not in leaves)


def _tensors(saved: Any) -> list[Tensor]:
    try:
        objects, found, seen = [saved.data], [], set()
    except RuntimeError:  # nothing was saved under this name
        return []
    while objects:
        each = objects.pop()
        if isinstance(each, Tensor):
            found.append(each)
        elif id(each) not in seen and (isinstance(each, dict) or type(each).__module__.startswith("regimewrap")):
            seen.add(id(each))
            objects += each.values() if isinstance(each, dict) else gc.get_referents(each)
    return found


def plainly() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


def bytes_of(model: nn.Module, x: Tensor, context: Any) -> int:
    with context:
        output = model(x)
    return held(output)


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5, 0.1, 0.001])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"scope": "batch"},
        {"scope": "position", "channel_dim": 1},
        {"ties": "exact"},
        {"gradient": "straight_through"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [Net, Called, lambda: Net(nn.GELU), lambda: Net(lambda: nn.ReLU(inplace=True)), lambda: Net(dropout=0.3)],
    ids=["relu", "called", "gelu", "in place", "dropout"],
)
def test_gradients_are_the_same_bit_for_bit(make, rule, keep_ratio):
    model = wrapped(make, keep_ratio, **rule)
    assert_same_bits(run(model, images(), inside(model)), run(model, images()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_gradients_are_the_same_in_every_dtype_and_layout(dtype, layout):
    model = wrapped().to(dtype=dtype, memory_format=layout)
    x = images(dtype=dtype).to(memory_format=layout)
    assert_same_bits(run(model, x, inside(model)), run(model, x))


def test_gradients_are_the_same_under_autocast_and_casts_of_gated_activations_are_small_too():
    model = wrapped(lambda: WideResNet(10, 1))  # its norm computes in float32, its convolutions in bfloat16
    x = images(64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(model, x, inside(model)), run(model, x))
        small, plain = (bytes_of(model, x, each) for each in (compressed_activations(model), plainly()))
    assert small < 0.45 * plain


def test_nan_infinity_and_negative_zero_survive():
    model = wrapped(lambda: nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)))
    x = torch.randn(8, 64)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    x[1] = -0.0
    assert_same_bits(run(model, x, inside(model)), run(model, x))


def test_a_wide_resnet_at_a_tenth_of_its_units_keeps_less_than_half_of_the_dense_bytes():
    torch.manual_seed(0)
    dense = WideResNet(28, 4)
    model = regimewrap.wrap(copy.deepcopy(dense))
    gate_of(model).set_keep_ratio(0.1)
    x = torch.randn(1, 3, 32, 32)
    assert bytes_of(model, x, compressed_activations(model)) <= 0.5 * bytes_of(dense, x, plainly())
    assert_same_bits(run(model, x, inside(model)), run(model, x))


@pytest.mark.parametrize("activation", ["module", "function"])
def test_relus_are_small_however_they_are_written(activation):
    make = lambda: WideResNet(10, 2, norm="batch", activation=activation)  # noqa: E731
    model, x = wrapped(make), torch.randn(2, 3, 16, 16)
    assert bytes_of(model, x, compressed_activations(model)) < 0.65 * bytes_of(model, x, plainly())


def test_of_a_relu_that_works_in_place_only_the_signs_are_kept():
    model = wrapped(lambda: nn.Sequential(nn.Linear(8, 800), nn.ReLU(inplace=True), nn.Linear(800, 2)))
    x = torch.randn(4, 8)
    units = 4 * 800
    # The signs, the gate's mask, and bits and values of what the last layer saves.
    assert bytes_of(model, x, compressed_activations(model)) <= 3 * units // 8 + 0.11 * 4 * units + 4 * 32 + 64


def test_layers_that_save_one_activation_or_views_of_it_share_its_memory():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.layers = nn.ModuleList(nn.Linear(400, 2) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(x)
            views = [x, x.view(2, 4, 400), x.t().contiguous().t(), x.view(8, 1, 400), x[:]]
            return sum(layer(view).sum() for layer, view in zip(self.layers, views, strict=True))

    model = wrapped(Shared)
    x = torch.randn(8, 400, requires_grad=True)
    assert bytes_of(model, x, compressed_activations(model)) < 1.3 * 4 * 8 * 400  # one of them is a copy of its own
    assert_same_bits(run(model, x, inside(model)), run(model, x))


@pytest.mark.parametrize("make", [Net, Called])
def test_at_full_budget_everything_stays_as_it_is(make):
    model = wrapped(make, keep_ratio=1.0)
    assert bytes_of(model, images(), compressed_activations(model)) == bytes_of(model, images(), plainly())


def test_an_activation_that_would_not_get_smaller_stays_as_it_is():
    model = wrapped(lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 2)), keep_ratio=0.99)
    x = torch.randn(4, 8)
    with compressed_activations(model):
        output = model(x)
    assert_same_bits([output.grad_fn._raw_saved_mat1.data.kept.tensor()], [output.grad_fn._saved_mat1])
    assert held(output) <= bytes_of(model, x, plainly()) + 64


def test_memory_is_freed_with_the_graph_also_inside_the_block():
    model = wrapped()
    with compressed_activations(model):
        output = model(images())
        packed = [weakref.ref(each) for each in _packed_of(output)]
        output.sum().backward()
        del output
        assert len(packed) == 3
        assert [each() for each in packed] == [None] * 3


def _packed_of(output: Tensor) -> list[object]:
    from regimewrap.topk.packed import Packed

    nodes, found, seen = [output.grad_fn], {}, set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
        for name in [name for name in dir(node) if name.startswith("_raw_saved")]:
            try:
                memory = getattr(getattr(node, name).data.kept, "memory", None)
            except (AttributeError, RuntimeError):
                continue
            if isinstance(memory, Packed):
                found[id(memory)] = memory
    return list(found.values())


def test_activations_of_a_frozen_trunk_are_small_too():
    model = wrapped()
    for parameter in (*model.conv1.parameters(), *model.norm.parameters()):
        parameter.requires_grad_(False)
    assert bytes_of(model, images(), compressed_activations(model)) < 0.6 * bytes_of(model, images(), plainly())


def test_backward_may_run_twice_inside_or_outside_the_block():
    model, x = wrapped(), images()
    with compressed_activations(model):
        loss = model(x).square().mean()
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    loss.backward()
    assert_same_bits([p.grad for p in model.parameters()], once)


@pytest.mark.parametrize("make", [Net, Called, lambda: Net(lambda: nn.ReLU(inplace=True)), lambda: WideResNet(10, 1)])
def test_second_derivatives_are_the_same(make):
    model = wrapped(make).double()
    x = images(dtype=torch.float64)

    def penalty(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        (grad,) = torch.autograd.grad(call(image).square().sum(), image, create_graph=True)
        grad.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    image = x.clone().requires_grad_()
    assert_same_bits(penalty(inside(model)), penalty(model))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved_tensors"])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_checkpoints_inside_the_block_give_the_same_gradients(use_reentrant, backward_inside):
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda x: self.act1(self.norm(self.conv1(x))), x, use_reentrant=use_reentrant)
            x = self.act2(self.conv2(x))
            return self.head(checkpoint(self._tail, x, use_reentrant=use_reentrant))

        def _tail(self, x: Tensor) -> Tensor:
            return self.act3(self.hidden(x.flatten(1)))

    model = wrapped(Checkpointed)
    expected = run(model, images())
    with compressed_activations(model) if backward_inside else nullcontext():
        found = run(model, images(), None if backward_inside else inside(model))
    assert_same_bits(found, expected)


def test_a_checkpoint_around_the_block_gives_the_same_gradients():
    model = wrapped()
    found = run(model, images(), lambda x: checkpoint(inside(model), x, use_reentrant=False))
    assert_same_bits(found, run(model, images()))


@pytest.mark.parametrize("gate_at", [0.1, 1.0])
def test_a_saved_tensor_that_was_changed_in_place_is_noticed(gate_at):
    model = wrapped(lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2)), keep_ratio=gate_at)
    with compressed_activations(model):
        output = model(torch.randn(4, 8))
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_activation_changed_in_place_after_it_was_saved_is_noticed_or_harmless():
    class Changed(nn.Module):
        def __init__(self, smaller: bool) -> None:
            super().__init__()
            self.act, self.smaller = nn.GELU(), smaller
            self.layer, self.other = nn.Linear(64, 4), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(x)
            first = self.layer(y)
            y.add_(1.0)
            return first + self.other(y)

    x = torch.randn(16, 64)
    model = wrapped(lambda: Changed(smaller=True))
    with compressed_activations(model):
        output = model(x)
    output.sum().backward()
    # What the first layer saved was safe, and the second saved the changed one.
    kept = gate_of(model)(F.gelu(x), gate_of(model).sites[0], training=True)
    assert_same_bits([model.layer.weight.grad], [torch.ones(4, 16) @ kept])
    assert_same_bits([model.other.weight.grad], [torch.ones(4, 16) @ (kept + 1)])
    model = wrapped(lambda: Changed(smaller=False), keep_ratio=0.99)
    with compressed_activations(model):
        output = model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_products_that_are_saved_are_multiplied_again_and_keep_their_bits():
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.bias = nn.Parameter(torch.randn(64)), nn.Parameter(torch.randn(64))
            self.act, self.head = nn.ReLU(), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            return self.head(self.act(x * scale * self.gain + self.bias))

    model, x = wrapped(Norm), torch.randn(64, 64, requires_grad=True)
    full = 64 * 64 * 4
    assert bytes_of(model, x, plainly()) > 1.9 * full
    assert bytes_of(model, x, compressed_activations(model)) < 0.3 * full
    assert_same_bits(run(model, x, inside(model)), run(model, x))


def test_blocks_nest_for_one_model_and_for_several():
    a, b = wrapped(), wrapped(lambda: nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 2)))

    def both(x: Tensor) -> Tensor:
        return b(a(x))

    expected = run(a, images(), both)
    plain = bytes_of_call(both, plainly())

    def nested(x: Tensor) -> Tensor:
        with compressed_activations(a), compressed_activations(b), compressed_activations(a):
            return both(x)

    assert_same_bits(run(a, images(), nested), expected)
    assert bytes_of_call(nested, nullcontext()) < 0.5 * plain
    assert gate_of(a).listeners == gate_of(b).listeners == []


def bytes_of_call(call: Callable[[Tensor], Tensor], context: Any) -> int:
    with context:
        return held(call(images()))


def test_an_exception_leaves_nothing_behind():
    model = wrapped()
    with pytest.raises(KeyError), compressed_activations(model):
        raise KeyError
    assert gate_of(model).listeners == []
    assert bytes_of(model, images(), plainly()) == bytes_of(model, images(), plainly())
    with compressed_activations(model):
        small = held(model(images()))
    assert small < 0.6 * bytes_of(model, images(), plainly())


def test_other_threads_are_not_concerned():
    model = wrapped()
    expected, found = run(model, images()), []
    twin = copy.deepcopy(model)
    with compressed_activations(model):
        thread = threading.Thread(target=lambda: found.append(run(model, images())))
        thread.start()
        thread.join()
        also = run(twin, images())
    assert_same_bits(found[0], expected)
    assert_same_bits(also, expected)


def test_copies_and_files_of_a_model_take_nothing_along(tmp_path):
    model = wrapped()
    with compressed_activations(model):
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
    assert gate_of(twin).listeners == gate_of(torch.load(tmp_path / "model.pt", weights_only=False)).listeners == []


def test_hooks_for_saved_tensors_inside_the_block_come_first():
    model = wrapped()

    def on_cpu(x: Tensor) -> Tensor:
        with compressed_activations(model), torch.autograd.graph.save_on_cpu():
            return model(x)

    assert_same_bits(run(model, images(), on_cpu), run(model, images()))


def test_a_compiled_model_keeps_its_gradients_inside_the_block():
    model = wrapped()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = run(model, images(), compiled)

    def call(x: Tensor) -> Tensor:
        with compressed_activations(compiled):
            return compiled(x)

    assert_same_bits(run(model, images(), call), expected)
    torch.compiler.reset()


def test_a_block_inside_compiled_code_leaves_what_that_keeps_alone():
    model = wrapped()
    compiled = torch.compile(inside(model), backend="aot_eager", fullgraph=True)
    assert_same_bits(run(model, images(), compiled), run(model, images()))
    torch.compiler.reset()


def test_a_model_under_ddp_is_found_and_gives_the_same_gradients(tmp_path):
    model = wrapped()
    expected = run(model, images())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert_same_bits(run(model, images(), inside(parallel)), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_without_gradients_nothing_is_done():
    model = wrapped()
    with torch.no_grad(), compressed_activations(model):
        assert model(images()).grad_fn is None
    with torch.inference_mode(), compressed_activations(model):
        assert model(images()).grad_fn is None


def test_a_model_that_is_not_wrapped_is_refused():
    with pytest.raises(NotWrappedError, match=r"call regimewrap\.wrap"), compressed_activations(Net()):
        pass
    with pytest.raises(NotWrappedError, match="expected a wrapped"), compressed_activations(print):
        pass
