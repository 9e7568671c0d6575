"""``torch.compile``, ``torch.export``, ``torch.func`` and TorchScript on wrapped models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from specimens import POLICY, WRITINGS, Hooked, Rewritten, Traced, assert_same, bare, by_hand, gradients, wrapped
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from regimewrap import gate_of, unwrap, wrap
from regimewrap.errors import UnreachableSiteError

every_writing = pytest.mark.parametrize("make", WRITINGS)
every_backend = pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])


@every_writing
@every_backend
@pytest.mark.usefixtures("fresh_compiler")
def test_wrapped_before_compile_it_is_one_graph_that_follows_the_ratio(make, backend, x):
    model = wrapped(make)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for ratio in (0.3, 0.7, 1.0, 0.1):
        gate_of(compiled).set_keep_ratio(ratio)
        mine = compiled(x)
        torch.testing.assert_close(mine, by_hand(bare(make), x, ratio))
        plain = bare(make)
        assert_same(gradients(model, mine), gradients(plain, by_hand(plain, x, ratio)))


@every_writing
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "in place"])
@pytest.mark.usefixtures("fresh_compiler")
def test_wrapped_after_compile_it_is_compiled_anew_and_again_when_unwrapped(make, in_place, x):
    model = bare(make)
    if in_place:
        model.compile(backend="eager", fullgraph=True)
    else:
        model = torch.compile(model, backend="eager", fullgraph=True)
    dense = model(x)
    with pytest.warns(UserWarning, match=r"torch\.compiler\.reset"):
        wrap(model, POLICY)
    gate_of(model).set_keep_ratio(0.3)
    torch.testing.assert_close(model(x), by_hand(bare(make), x))
    with pytest.warns(UserWarning, match=r"torch\.compiler\.reset"):
        unwrap(model)
    assert torch.equal(model(x), dense)


@every_writing
@pytest.mark.usefixtures("fresh_compiler")
def test_a_changing_ratio_compiles_one_frame(make, x):
    counter = torch._dynamo.testing.CompileCounter()
    model = wrapped(make)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(12):
        gate_of(model).set_keep_ratio(1 - step / 20)
        compiled(x)
    assert counter.frame_count == 1


@every_writing
@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_bare_model_that_is_compiled_first_does_not_lend_its_code(make, wrapped_first, x):
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as it is in a process that has not wrapped yet
        model = wrapped(make) if wrapped_first else None
        torch._dynamo.config.skip_nnmodule_hook_guards = True
        plain = bare(make)
        dense = torch.compile(plain, backend="eager")
        assert torch.equal(dense(x), plain(x))
        model = model or wrapped(make)
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        gate_of(model).set_keep_ratio(0.3)
        torch.testing.assert_close(compiled(x), by_hand(bare(make), x))
        assert torch.equal(dense(x), plain(x))


def test_a_model_that_was_wrapped_before_there_was_a_compiler_does_not_get_a_bare_one_s_code():
    """In a fresh process: here the compiler has been imported long ago."""
    script = """
import sys, torch, regimewrap
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
x, bare, wrapped = torch.randn(5, 8), make(), regimewrap.wrap(make())
regimewrap.gate_of(wrapped).set_keep_ratio(0.1)
assert "torch._dynamo" not in sys.modules
dense = torch.compile(bare, backend="eager")(x)
gated = torch.compile(wrapped, backend="eager")(x)
assert torch.equal(dense, bare(x))
assert torch.equal(gated, wrapped(x)) and not torch.equal(gated, dense)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


@every_writing
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_an_exported_program_gates_as_the_model_does(make, strict, x):
    exported = torch.export.export(wrapped(make), (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), by_hand(bare(make), x))


@pytest.mark.usefixtures("fresh_compiler")
def test_an_exported_program_takes_batches_of_any_size(x):
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(wrapped(Hooked), (x,), dynamic_shapes={"x": {0: batch}}).module()
    other = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(exported(other), by_hand(bare(Hooked), other))


@every_writing
def test_functional_call_uses_the_weights_that_it_is_given(make, x):
    model, other = wrapped(make), bare(make)
    with torch.no_grad():
        for each in other.parameters():
            each.mul_(1.5)
    given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    torch.testing.assert_close(functional_call(model, given, (x,)), by_hand(other, x))
    torch.testing.assert_close(model(x), by_hand(bare(make), x))


@every_writing
def test_functional_gradients_are_those_of_backward(make, x):
    model = wrapped(make)
    weights = dict(model.named_parameters())
    reading = torch.arange(20.0).reshape(4, 5).cos()
    found = grad(lambda given: (functional_call(model, given, (x,)) * reading).sum())(weights)
    assert_same(found, gradients(model, model(x)))


@every_writing
def test_an_ensemble_runs_under_vmap(make, x):
    models = [wrapped(make), wrapped(make)]
    with torch.no_grad():
        models[1].conv.weight.mul_(2)
    weights, buffers = stack_module_state(models)
    found = vmap(lambda w, b: functional_call(models[0], (w, b), (x,)))(weights, buffers)
    for mine, model in zip(found, models, strict=True):
        torch.testing.assert_close(mine, model(x))


@every_writing
@pytest.mark.parametrize("grad_enabled", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_a_legacy_trace_gates_as_the_model_does(make, grad_enabled, x):
    with torch.set_grad_enabled(grad_enabled):
        traced = torch.jit.trace(wrapped(make), x)
    torch.testing.assert_close(traced(x), by_hand(bare(make), x))


@pytest.mark.parametrize(
    "make",
    [
        Hooked,
        Traced,
        Rewritten,
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_scripting_a_wrapped_model_is_a_clear_error(make):
    with pytest.raises(Exception, match=r"regimewrap|unwrap"):
        torch.jit.script(wrapped(make))


@every_writing
@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_after_unwrap_a_model_can_be_scripted(make, x):
    scripted = torch.jit.script(unwrap(wrapped(make)))
    torch.testing.assert_close(scripted(x), bare(make)(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_a_scripted_child_is_reported():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.ReLU()), nn.GELU())
    with pytest.raises(UnreachableSiteError, match=r"1 \(it is scripted; wrap before torch\.jit\.script"):
        wrap(model)
