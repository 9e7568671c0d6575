"""The rows that a budget keeps dense, under everything that runs a model in another way."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from specimens import WRITINGS, Hooked, assert_same, bare, gradients, wrapped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from regimewrap import GatePolicy, RegimePolicy, gate_of, wrap

every_writing = pytest.mark.parametrize("make", WRITINGS)
SCOPES = ["sample", "position", "batch", "network"]
every_scope = pytest.mark.parametrize("scope", SCOPES)
#: Torch's own decompositions, which it scripts when forward mode is first asked for.
scripts = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


def training(make, scope="sample", update=1):
    """A wrapped network in train mode with half of its rows dense; its norm does not mix rows."""
    policy = RegimePolicy(gate=GatePolicy(scope=scope, channel_dim=1))
    model = wrapped(make, policy=policy).train()
    model.norm.eval()
    gate_of(model).set_budget(0.1, full_share=0.5, update=update)
    return model


def run(model, x):
    y = model(x)
    return y.detach(), gradients(model, y)


def same(mine, theirs):
    assert torch.equal(mine[0], theirs[0])
    names = {name.removeprefix("module."): value for name, value in mine[1].items()}
    for name, value in theirs[1].items():
        assert torch.equal(names[name], value), name


@every_writing
@every_scope
@pytest.mark.parametrize("gradient", ["masked", "straight_through"])
@pytest.mark.parametrize("update", [0, 1])
def test_dense_rows_are_those_of_the_bare_model_bit_for_bit(make, scope, gradient, update, x):
    policy = RegimePolicy(gate=GatePolicy(scope=scope, gradient=gradient, channel_dim=1))
    model, plain = wrapped(make, policy=policy).train(), bare(make).train()
    for each in (model, plain):
        each.norm.eval()
    gate_of(model).set_budget(0.1, full_share=0.5, update=update)
    dense, others = (slice(0, 2), slice(2, 4)) if update == 0 else (slice(2, 4), slice(0, 2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = model(ours), plain(theirs)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(y[dense], expected[dense])
    assert torch.equal(ours.grad[dense], theirs.grad[dense])
    assert not torch.equal(y[others], expected[others])


@every_scope
def test_a_share_of_zero_is_the_gate_without_dense_rows(scope, x):
    model = training(Hooked, scope)
    gate_of(model).set_keep_ratio(0.1)
    gate_of(model).set_budget(0.1, full_share=0.0, update=5)
    twin = wrapped(Hooked, 0.1, RegimePolicy(gate=GatePolicy(scope=scope, channel_dim=1))).train()
    twin.norm.eval()
    same(run(model, x), run(twin, x))


@pytest.mark.parametrize(
    "scope", ["sample", "network", *(pytest.param(each, marks=pytest.mark.slow) for each in SCOPES[1:3])]
)
@pytest.mark.parametrize("make", [WRITINGS[0], WRITINGS[1]])
def test_one_compiled_graph_serves_every_update_and_ratio(make, scope, x, fresh_compiler):  # noqa: ARG001
    model = training(make, scope)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    run(compiled, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for ratio, update in ((0.1, 0), (0.3, 1), (1.0, 2), (0.1, 3)):
            gate_of(model).set_budget(ratio, full_share=0.5, update=update)
            found = run(compiled, x)[0], gradients(model, compiled(x))
            torch.testing.assert_close(found[0], model(x).detach())
            assert_same(found[1], gradients(model, model(x)))


def test_compiled_code_is_sampled_too(x, fresh_compiler):  # noqa: ARG001
    model = training(Hooked)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    gate_of(model).sample_next()
    compiled(x)
    assert gate_of(model).take_sample() == (2, 1.0)


@scripts
def test_torch_func_takes_the_same_rows(x):
    model = training(Hooked)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    model(x).square().sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.grad)
    twice = torch.vmap(lambda x: model(x))(torch.stack((x, 2 * x)))
    torch.testing.assert_close(twice, torch.stack((model(x), model(2 * x))))
    rows = torch.func.jacrev(model)(x)
    torch.testing.assert_close(rows, torch.autograd.functional.jacobian(model, x))
    torch.testing.assert_close(torch.func.jacfwd(model)(x), rows)


@scripts
@every_writing
def test_batched_gradients_and_forward_mode_derivatives_agree(make, x):
    model = training(make)
    rows = torch.autograd.functional.jacobian(model, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(model, x, vectorize=True), rows)
    forward = torch.autograd.functional.jacobian(model, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(forward, rows)
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, rows.flatten(2).sum(-1))


def test_accumulated_micro_batches_have_dense_rows_each(x):
    model = training(Hooked)
    parts = [gradients(model, model(part)) for part in x.split(2)]
    y = model(x.split(2)[0]), model(x.split(2)[1])
    model.zero_grad()
    for part in y:
        (part * torch.arange(part.numel()).reshape(part.shape).cos()).sum().backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, parts[0][name] + parts[1][name])


def test_a_batch_of_one_is_dense_in_every_other_update(x):
    model, plain = training(Hooked), bare(Hooked)
    seen = []
    for update in range(4):
        gate_of(model).set_budget(0.1, full_share=0.5, update=update)
        seen.append(torch.equal(model(x[:1]), plain(x[:1])))
    assert seen == [False, True, False, True]


def test_copies_averages_and_files_take_the_same_rows(x):
    model = training(Hooked)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = run(model, x)
    average = AveragedModel(model).train()
    average.module.norm.eval()
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same(run(twin, x), expected)
    assert torch.equal(average(x), expected[0])


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo')}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@every_writing
def test_data_parallel_and_sharded_models_take_the_same_rows(make, x, mesh):
    expected = run(training(make), x)
    same(run(DistributedDataParallel(training(make)), x), expected)
    sharded = training(make)
    fully_shard(sharded, mesh=mesh)
    y = sharded(x)
    assert torch.equal(y.detach(), expected[0])
    found = {name: value.full_tensor() for name, value in gradients(sharded, y).items()}
    assert_same(found, expected[1])


def test_flattened_tokens_take_the_rows_of_their_samples():
    class Tokens(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.flat, self.a, self.act, self.b = flat, nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 2)

        def forward(self, x):
            y = self.a(x)
            y = self.act(y.flatten(0, 1)).view(y.shape) if self.flat else self.act(y)
            return self.b(y)

    torch.manual_seed(0)
    policy = RegimePolicy(gate=GatePolicy(scope="position"))
    straight = wrap(Tokens(flat=False), policy)
    flat = wrap(Tokens(flat=True), policy)
    flat.load_state_dict(straight.state_dict())
    x = torch.randn(6, 5, 4)
    for update in range(3):
        for model in (straight, flat):
            gate_of(model).set_budget(0.2, full_share=0.5, update=update)
        torch.testing.assert_close(flat(x), straight(x))
