"""DDP, FSDP and DataParallel around wrapped models, and wrap on models inside them; on one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from specimens import POLICY, WRITINGS, Hooked, Rewritten, Traced, assert_same, bare, by_hand, gradients, wrapped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from regimewrap import at_keep_ratio, gate_of, unwrap, wrap

every_writing = pytest.mark.parametrize("make", WRITINGS)


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo')}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def mesh(_one_rank):
    return init_device_mesh("cpu", (1,))


def expected(make, x):
    plain = bare(make)
    y = by_hand(plain, x)
    return y.detach(), gradients(plain, y)


def without_prefix(found):
    return {name.removeprefix("module."): value for name, value in found.items()}


@every_writing
def test_ddp_around_a_wrapped_model(make, x):
    output, grads = expected(make, x)
    model = DistributedDataParallel(wrapped(make))
    y = model(x)
    torch.testing.assert_close(y, output)
    assert_same(without_prefix(gradients(model, y)), grads)


@every_writing
def test_wrap_through_ddp_and_back(make, x):
    output, grads = expected(make, x)
    model = DistributedDataParallel(bare(make))
    dense = model(x)
    assert wrap(model, POLICY) is model
    gate_of(model).set_keep_ratio(0.3)
    y = model(x)
    torch.testing.assert_close(y, output)
    assert_same(without_prefix(gradients(model, y)), grads)
    unwrap(model)
    assert torch.equal(model(x), dense)
    assert type(model.module) is make


@every_writing
def test_under_ddp_parameters_behind_closed_gates_get_zeros_not_none(make, x):
    model = DistributedDataParallel(wrapped(make))
    for _ in range(2):  # a second pass would raise if the first had left a bucket unfilled
        with at_keep_ratio(model, 1e-6):
            found = gradients(model, model(x))
        assert all(each is not None for each in found.values())
    closed = found["module.hidden.weight"].abs().sum(1) == 0
    assert closed.any()
    assert not closed.all()


@every_writing
def test_ddp_and_compile_together(make, x, fresh_compiler):  # noqa: ARG001  a fixture
    output, grads = expected(make, x)
    model = torch.compile(DistributedDataParallel(wrapped(make)), backend="aot_eager")
    y = model(x)
    torch.testing.assert_close(y, output)
    found = {name.removeprefix("_orig_mod.module."): value for name, value in gradients(model, y).items()}
    assert_same(found, grads)


def full(found):
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in found.items()}


def shard(model, mesh):
    fully_shard(model.hidden, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@every_writing
def test_fsdp2_after_wrap(make, x, mesh):
    output, grads = expected(make, x)
    model = shard(wrapped(make), mesh)
    y = model(x)
    torch.testing.assert_close(y, output)
    assert_same(full(gradients(model, y)), grads)


@every_writing
def test_fsdp2_before_wrap(make, x, mesh):
    output, grads = expected(make, x)
    model = wrap(shard(bare(make), mesh), POLICY)
    gate_of(model).set_keep_ratio(0.3)
    y = model(x)
    torch.testing.assert_close(y, output)
    assert_same(full(gradients(model, y)), grads)
    unwrap(model)
    torch.testing.assert_close(model(x), bare(make)(x))


@pytest.mark.parametrize("make", [Hooked, Traced, Rewritten])
def test_unwrap_under_fsdp2_takes_the_gates_off(make, x, mesh):
    model = shard(wrapped(make), mesh)
    unwrap(model)
    torch.testing.assert_close(model(x), bare(make)(x))
    assert isinstance(model, make)


@every_writing
def test_under_fsdp2_a_model_is_unwrapped_and_wrapped_again(make, x, mesh):
    output, grads = expected(make, x)
    model = shard(wrapped(make), mesh)
    for _ in range(2):
        unwrap(model)
        ours = [cls for cls in type(model).__mro__ if any("regimewrap" in name for name in vars(cls))]
        assert set(ours) <= {nn.Module}  # which has a default as long as any other model is wrapped
        wrap(model, POLICY)
    gate_of(model).set_keep_ratio(0.3)
    y = model(x)
    torch.testing.assert_close(y, output)
    assert_same(full(gradients(model, y)), grads)


@every_writing
@pytest.mark.filterwarnings("ignore:.*NO_SHARD", "ignore:.*FullyShardedDataParallel")
def test_fsdp1_around_a_wrapped_model(make, x):
    output, _ = expected(make, x)
    model = FullyShardedDataParallel(wrapped(make), device_id=torch.device("cpu"), use_orig_params=True)
    y = model(x)
    torch.testing.assert_close(y, output)
    y.sum().backward()
    assert gate_of(model).keep_ratio == 0.3


@every_writing
@pytest.mark.filterwarnings("ignore:.*NO_SHARD", "ignore:.*FullyShardedDataParallel")
def test_wrap_inside_fsdp1(make, x):
    output, _ = expected(make, x)
    model = FullyShardedDataParallel(bare(make), device_id=torch.device("cpu"), use_orig_params=True)
    wrap(model, POLICY)
    gate_of(model).set_keep_ratio(0.3)
    torch.testing.assert_close(model(x), output)
    unwrap(model)
    torch.testing.assert_close(model(x), bare(make)(x))


def replica(module: nn.Module, scale: float) -> nn.Module:
    """Copy a model as ``torch.nn.parallel.replicate`` does, with other parameters instead of other devices."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(twin, name, replica(child, scale))
    for name, parameter in module._parameters.items():
        twin._parameters.pop(name, None)
        setattr(twin, name, parameter * scale if isinstance(parameter, nn.Parameter) else parameter)
    for name, buffer in module._buffers.items():
        twin._buffers[name] = buffer
    return twin


@every_writing
def test_data_parallel_replicas_use_their_own_parameters_and_the_shared_gate(make, x):
    model, scaled = wrapped(make), bare(make)
    with torch.no_grad():
        for each in scaled.parameters():
            each.mul_(2)
    twin = replica(model, 2.0)
    torch.testing.assert_close(twin(x), by_hand(scaled, x))
    torch.testing.assert_close(model(x), by_hand(bare(make), x))
    gate_of(model).set_keep_ratio(0.1)
    torch.testing.assert_close(twin(x), by_hand(scaled, x, 0.1))
    assert gate_of(twin) is gate_of(model)


@every_writing
def test_data_parallel_runs_a_wrapped_model_and_wrap_looks_through_it(make, x):
    output, _ = expected(make, x)
    torch.testing.assert_close(nn.DataParallel(wrapped(make))(x), output)
    model = wrap(nn.DataParallel(bare(make)), POLICY)
    gate_of(model).set_keep_ratio(0.3)
    torch.testing.assert_close(model(x), output)
    assert type(unwrap(model).module) is make


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_writing
def test_data_parallel_on_two_devices(make, x):
    model = nn.DataParallel(copy.deepcopy(wrapped(make)).cuda())
    torch.testing.assert_close(model(x.cuda()).cpu(), by_hand(bare(make), x), rtol=1e-3, atol=1e-3)
