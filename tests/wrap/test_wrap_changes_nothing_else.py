"""What holds on the user's model: before, while it is wrapped, and after."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torchvision
from torch import nn

import regimewrap
from regimewrap import RegimePolicy, SitePolicy, at_keep_ratio, gate_of, plan, unwrap, wrap
from regimewrap.errors import AlreadyWrappedError, NoSitesError, NotWrappedError, PolicyError, WrapError
from regimewrap.rewrite import apply as rewriting
from regimewrap.rewrite import runtime


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.Linear(16, 3))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=4)


def densenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.DenseNet(4, (1, 1), 8, num_classes=4)


def googlenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.googlenet(init_weights=False, num_classes=4, aux_logits=False)


IMAGES = {resnet, densenet, googlenet}


def batch(make) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 64, 64, generator=generator) if make in IMAGES else torch.randn(4, 6, generator=generator)


def snapshot(model: nn.Module) -> dict:
    return {
        "types": [type(module) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [
            [dict(getattr(module, name)) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for module in model.modules()
        ],
        "flags": [dict(module._forward_hooks_with_kwargs) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "keys": list(model.state_dict()),
        "parameters": [id(parameter) for parameter in model.parameters()],
        "names": [name for name, _ in model.named_modules()],
    }


def same_state(model: nn.Module, state: dict) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


every_model = pytest.mark.parametrize("make", [mlp, resnet, densenet, googlenet])


@every_model
def test_unwrap_leaves_nothing_behind(make):
    model = make()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())

    result = unwrap(wrap(model))

    assert result is model
    assert snapshot(model) == before
    assert same_state(model, state)
    wrap(model)
    assert gate_of(model).keep_ratio == 1.0


@every_model
def test_wrap_keeps_identity_keys_modes_and_randomness(make):
    model = make()
    cls, before, state = type(model), snapshot(model), copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    random = torch.get_rng_state()

    assert wrap(model) is model

    after = snapshot(model)
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert str(type(model)) == str(cls)
    for kept in ("modes", "keys", "parameters", "names"):
        assert after[kept] == before[kept]
    assert same_state(model, state)
    assert torch.equal(torch.get_rng_state(), random)


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_full_budget_is_bit_exact_forward_and_backward(make, training):
    bare, model, x = make().train(training), wrap(make().train(training)), batch(make)
    results = []
    for each in (bare, model):
        torch.manual_seed(1)
        y = each(x)
        y.sum().backward()
        results.append([y, *(parameter.grad for parameter in each.parameters()), *each.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_model
def test_eval_mode_is_the_dense_self_whatever_the_ratio(make):
    bare, model, x = make().eval(), wrap(make()).eval(), batch(make)
    gate_of(model).set_keep_ratio(0.05)
    assert torch.equal(model(x), bare(x))


@every_model
def test_a_small_budget_changes_the_output(make):
    model, x = wrap(make()), batch(make)
    dense = model.eval()(x)
    with at_keep_ratio(model, 0.1):
        assert not torch.equal(model(x), dense)
    assert torch.equal(model(x), dense)


@every_model
def test_state_dicts_load_strictly_both_ways(make):
    bare, model = make(), wrap(make())
    model.load_state_dict(bare.state_dict(), strict=True)
    bare.load_state_dict(model.state_dict(), strict=True)


@every_model
def test_a_deep_copy_has_a_gate_of_its_own(make):
    model = wrap(make())
    gate_of(model).set_keep_ratio(0.5)
    twin = copy.deepcopy(model)
    gate_of(twin).set_keep_ratio(0.1)
    assert gate_of(model).keep_ratio == 0.5
    x = batch(make)
    assert not torch.equal(model(x), twin(x))
    assert snapshot(unwrap(twin))["attributes"] == snapshot(make())["attributes"]


def test_a_copied_part_stays_under_the_same_gate():
    model = wrap(mlp())
    part = copy.deepcopy(model[2])
    assert gate_of(part) is gate_of(model)


@every_model
def test_a_whole_model_goes_to_a_file_and_back(make):
    model, x = wrap(make()), batch(make)
    gate_of(model).set_keep_ratio(0.2)
    file = io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    with at_keep_ratio(model.eval(), 0.2), at_keep_ratio(loaded.eval(), 0.2):
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("name", ["1", "2.1"])
def test_user_hooks_see_the_gated_output_and_stay_removable(name):
    model, seen = mlp(), []
    activation = model.get_submodule(name)
    handle = activation.register_forward_hook(lambda module, args, output: seen.append(output))  # noqa: ARG005
    wrap(model)
    later = activation.register_forward_hook(lambda module, args, output: seen.append(output))  # noqa: ARG005
    with at_keep_ratio(model, 0.1):
        model(batch(mlp))
    assert len(seen) == 2
    assert all((output != 0).sum() <= 4 for output in seen)
    handle.remove()
    later.remove()
    unwrap(model)
    assert not activation._forward_hooks


def test_one_activation_called_often_is_one_hook_and_many_gates():
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.act(self.act(x + 1) - 0.1) + 1)

    model = wrap(Thrice())
    with regimewrap.watch(model) as seen:
        model(torch.randn(2, 5))
    assert seen.by_site["act"].calls == 3
    assert len(model.act._forward_hooks) == 1


@pytest.mark.parametrize("stage", [(runtime, "attach_hook"), (runtime, "attach_sites"), (rewriting, "TopKGate")])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failure_at_any_step_leaves_the_model_as_it_was(stage, after, monkeypatch):
    model = torchvision.models.googlenet(init_weights=False, num_classes=4)
    before = snapshot(model)
    owner, name = stage
    if owner is rewriting:
        owner, name = regimewrap.TopKGate, "anchor"
        after = 0
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise MemoryError("injected")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    if name == "attach_hook":
        model.add_module("extra", nn.Sequential(*[nn.ReLU() for _ in range(6)]))
        before = snapshot(model)
    with pytest.raises(MemoryError):
        wrap(model)
    assert snapshot(model) == before


def test_wrapping_twice_is_refused_and_harmless():
    model = wrap(mlp())
    before = snapshot(model)
    with pytest.raises(AlreadyWrappedError, match="unwrap"):
        wrap(model)
    assert snapshot(model) == before


def test_a_model_without_activations_is_refused_and_listed():
    with pytest.raises(NoSitesError, match="none at all"):
        wrap(nn.Linear(2, 2))
    with pytest.raises(NoSitesError, match=r"1 \(sigmoid: sigmoid is not among sites.kinds\)"):
        wrap(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()))


@pytest.mark.parametrize("bad", [None, 3, nn.ReLU, lambda x: x, {"model": nn.ReLU()}])
def test_what_is_not_a_module_is_refused(bad):
    with pytest.raises(WrapError, match=r"torch\.nn\.Module"):
        wrap(bad)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_scripted_modules_are_refused():
    scripted = torch.jit.trace(mlp(), torch.randn(1, 6))
    with pytest.raises(WrapError, match=r"TorchScript|scripted"):
        wrap(scripted)
    with pytest.raises(WrapError, match="scripted"):
        wrap(nn.Sequential(scripted, nn.ReLU()))


def test_a_pattern_that_matches_nothing_names_the_nearest():
    policy = RegimePolicy(sites=SitePolicy(exclude=("layer1.0.rellu",)))
    model = resnet()
    before = snapshot(model)
    with pytest.raises(PolicyError, match=r"layer1\.0\.rellu.*layer1\.0\.relu"):
        wrap(model, policy)
    assert snapshot(model) == before


def test_unwrapping_a_bare_model_is_refused():
    with pytest.raises(NotWrappedError):
        unwrap(mlp())
    with pytest.raises(NotWrappedError):
        gate_of(mlp())


def test_the_plan_prints_a_row_a_site_and_changes_nothing():
    model = densenet()
    before = snapshot(model)
    text = str(plan(model))
    assert "forward.relu" in text
    assert "source" in text
    assert "hook" in text
    assert snapshot(model) == before


def test_include_exclude_kinds_and_multipliers_are_followed():
    sites = SitePolicy(include=("*layer1*",), exclude=("*layer1.1*",), multipliers={"layer1.0.*": 0.5})
    model = wrap(resnet(), RegimePolicy(sites=sites))
    (site,) = gate_of(model).sites
    assert (site.name, site.multiplier) == ("layer1.0.relu", 0.5)


def test_a_compiled_model_is_wrapped_and_compiled_anew():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    x = batch(mlp)
    dense = compiled(x)
    with pytest.warns(UserWarning, match=r"torch\.compiler\.reset"):
        wrap(compiled)
    gate_of(compiled).set_keep_ratio(0.1)
    assert not torch.equal(compiled(x), dense)
    with pytest.warns(UserWarning, match=r"torch\.compiler\.reset"):
        unwrap(compiled)
    assert torch.equal(compiled(x), dense)


def test_one_compiled_graph_serves_every_ratio():
    model = wrap(mlp())
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = batch(mlp)
    for step in range(100):
        gate_of(model).set_keep_ratio(1 - step / 101)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


def test_small_activations_are_left_alone():
    policy = RegimePolicy(sites=SitePolicy(min_units=17))
    model, x = wrap(mlp(), policy), batch(mlp)
    gate_of(model).set_keep_ratio(0.1)
    assert torch.equal(model(x), mlp()(x))
