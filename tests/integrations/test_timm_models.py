"""timm's registry knows our models, and a loop that knows nothing of regimewrap moves the ratio of regimewrap_auto."""

from __future__ import annotations

import copy
import gc
import io
import sys
from pathlib import Path

import pytest
import timm
import torch
from processes import preload, run
from regimewrap.integrations import requires
from regimewrap.integrations.timm import RegimeScheduler, RegimeTask
from timm.optim import create_optimizer_v2
from torch import nn

import regimewrap
from regimewrap.errors import MissingExtraError, PolicyError, StateError, UnsupportedVersionError, WrapError

preload("timm", "regimewrap.integrations.timm")

SAWTOOTH = regimewrap.RegimePolicy.preset("sawtooth", total_steps=100)


def _auto(policy: object = SAWTOOTH, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("regimewrap_auto", base="test_resnet", policy=policy, num_classes=3, in_chans=1, **kwargs)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, updates: range) -> list[float]:
    """Train in a loop that knows nothing of regimewrap; return the keep ratios of its forward passes."""
    ratios = []
    model.train()
    for update in updates:
        x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(update))
        loss = model(x).square().mean()
        ratios.append(float(regimewrap.gate_of(model).keep_ratio))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ratios


def _expected(updates: int) -> list[float]:
    cycler = regimewrap.RegimeCycler(regimewrap.TopKGate(SAWTOOTH))
    return [1.0, *(cycler.step().keep_ratio for _ in range(updates - 1))]


# The registry


@pytest.mark.parametrize(("name", "millions"), [("regimewrap_wrn28_4", 5.85), ("regimewrap_wrn28_10", 36.5)])
def test_the_wide_residual_networks_are_in_timms_registry(name: str, millions: float):
    assert name in timm.list_models("regimewrap*")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7, drop_rate=0.0, drop_path_rate=None, global_pool="avg")
    assert sum(each.numel() for each in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.num_classes == 7
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert len(regimewrap.plan(model).gated) == 25


def test_options_that_the_network_does_not_have_are_refused():
    with pytest.raises(WrapError, match="takes num_classes, in_chans, norm and activation; got drop_path_rate"):
        timm.create_model("regimewrap_wrn28_4", drop_path_rate=0.1)
    with pytest.raises(WrapError, match="no pretrained weights"):
        timm.create_model("regimewrap_wrn28_4", pretrained=True)


def test_auto_is_the_base_model_wrapped():
    model = _auto()
    bare = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    assert type(model).__name__ == type(bare).__name__
    bare.load_state_dict(model.state_dict())
    assert regimewrap.gate_of(model).policy == SAWTOOTH


def test_auto_takes_a_preset_or_a_file(tmp_path: Path):
    SAWTOOTH.to_file(tmp_path / "p.yaml")
    assert regimewrap.gate_of(_auto(str(tmp_path / "p.yaml"))).policy == SAWTOOTH
    assert regimewrap.gate_of(_auto("sawtooth", total_steps=100)).policy == SAWTOOTH


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, WrapError, "pass base, as in --model-kwargs base=resnet18"),
        ({"base": "resnet81"}, WrapError, "timm has no model 'resnet81' to wrap. Did you mean 'resnet"),
        ({"base": "regimewrap_auto"}, WrapError, "timm has no model 'regimewrap_auto' to wrap"),
        ({"base": "test_resnet", "policy": "sawtoth"}, PolicyError, "Did you mean 'sawtooth'?"),
        ({"base": "test_resnet", "policy": "nowhere.yaml"}, PolicyError, "nowhere.yaml"),
    ],
)
def test_a_base_or_policy_that_is_none_is_named(kwargs: dict[str, str], error: type[Exception], message: str):
    with pytest.raises(error, match=message.replace("?", r"\?")):
        timm.create_model("regimewrap_auto", **kwargs)


def test_importing_twice_registers_once(tmp_path: Path):
    root = Path(__file__).parents[2]  # where a doctest collector would import from
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, warnings; warnings.simplefilter('error')\n"
        f"import regimewrap.integrations.timm; sys.path.insert(0, {str(root)!r})\n"
        "import integrations.timm\n"
    )
    run(script)


# Driven by the optimizer


def test_a_loop_that_knows_nothing_moves_the_ratio():
    model = _auto()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.01)
    assert _train(model, optimizer, range(30)) == _expected(30)
    assert min(_expected(30)) < 0.2


@pytest.mark.parametrize("name", ["sgd", "adamw", "lookahead_sgd"])
def test_the_count_travels_in_the_optimizers_state(name: str):
    first = _auto()
    optimizer = create_optimizer_v2(first, name, lr=0.01, weight_decay=0.1)
    ratios = _train(first, optimizer, range(11))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = _auto()
    resumed.load_state_dict(saved["model"])
    optimizer = create_optimizer_v2(resumed, name, lr=0.01, weight_decay=0.1)
    optimizer.load_state_dict(saved["optimizer"])
    # Nothing leads from a model to its optimizer, so the first update after a resume does not know its count yet.
    assert ratios + _train(resumed, optimizer, range(11, 20)) == [*_expected(11), 1.0, *_expected(20)[12:]]


def test_a_count_under_another_policy_is_refused_with_both_sides():
    model = _auto()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _train(model, optimizer, range(3))
    other = _auto(SAWTOOTH.replace(gate={"scope": "batch"}))
    resumed = torch.optim.SGD(other.parameters(), lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(StateError, match=r"gate\.scope is 'sample' in the state and 'batch' here"):
        _train(other, resumed, range(1))


def test_evaluation_and_inference_before_training_are_left_alone():
    model = _auto()
    x = torch.randn(2, 1, 16, 16)
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    model(x)  # no optimizer yet
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert _train(model, optimizer, range(12)) == _expected(12)


def test_compiled_training_follows():
    model = _auto()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert _train(torch.compile(model, backend="eager"), optimizer, range(12)) == _expected(12)


def test_a_policy_that_watches_the_loss_is_refused_before_the_first_update():
    model = _auto("loss-reset")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(PolicyError, match=r"'ema-reset' watches 'loss', .* drive=False"):
        _train(model, optimizer, range(1))
    assert not optimizer.state


@pytest.mark.parametrize("taken_over", ["task", "drive=False"])
def test_who_takes_over_drives_alone(taken_over: str):
    model = _auto("loss-reset", total_steps=100, drive=taken_over == "task")
    if taken_over == "task":
        RegimeTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _train(model, optimizer, range(2))
    assert "regimewrap" not in optimizer.param_groups[0]


def test_a_copy_and_a_pickled_model_have_no_driver():
    model = _auto()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert _train(other, torch.optim.SGD(other.parameters(), lr=0.01), range(3)) == [1.0, 1.0, 1.0]


def test_only_the_optimizer_over_the_models_parameters_counts():
    model, other = _auto(), nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (other, model)]
    second = torch.optim.SGD(model.parameters(), lr=0.0)  # such as one for a part of the model
    other(torch.ones(1, 2)).sum().backward()
    ratios = []
    for update in range(6):
        ratios += _train(model, optimizers[1], range(update, update + 1))
        optimizers[0].step()
        second.step()
    assert ratios == _expected(6)
    assert "regimewrap" not in optimizers[0].param_groups[0]


def test_a_model_that_is_gone_is_forgotten():
    gone = _auto()
    _train(gone, torch.optim.SGD(gone.parameters(), lr=0.01), range(2))
    gate = regimewrap.gate_of(gone)
    del gone
    gc.collect()
    assert gate._root() is None


# The scheduler


def test_the_scheduler_is_a_function_of_the_count():
    model = regimewrap.wrap(timm.create_model("test_resnet"), SAWTOOTH)
    scheduler = RegimeScheduler(model)
    ratios = [scheduler.keep_ratio]
    for update in range(1, 30):
        scheduler.step_update(num_updates=update, metric=0.5)
        ratios.append(float(regimewrap.gate_of(model).keep_ratio))
    scheduler.step(1, 0.5)
    assert ratios == _expected(30)
    scheduler.step_update(7)
    assert scheduler.keep_ratio == ratios[7]


def test_the_scheduler_goes_on_from_its_state_and_from_no_other():
    model = regimewrap.wrap(timm.create_model("test_resnet"), SAWTOOTH)
    scheduler = RegimeScheduler(model)
    scheduler.step_update(13)
    state = scheduler.state_dict()
    scheduler.step_update(0)
    scheduler.load_state_dict(state)
    assert scheduler.keep_ratio == _expected(14)[13]
    for damage in ({"num_updates": -1}, {"num_updates": None}, {"version": 7}, {"sites": ["elsewhere"]}):
        with pytest.raises(StateError):
            scheduler.load_state_dict({**state, **damage})
        assert scheduler.num_updates == 13


def test_a_policy_that_watches_a_signal_has_no_scheduler():
    with pytest.raises(PolicyError, match="'ema-reset' watches 'loss', which a scheduler never sees"):
        RegimeScheduler(regimewrap.wrap(timm.create_model("test_resnet"), "loss-reset"), total_steps=100)


# What it needs


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requires, "find_spec", lambda _: None)
    _import_anew(monkeypatch, MissingExtraError, r"timm is not installed; run `pip install -e '\.\[timm\]'`")


def test_a_timm_that_is_too_old_is_named_with_what_is_supported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requires, "version", lambda _: "1.0.26")
    _import_anew(
        monkeypatch, UnsupportedVersionError, "timm 1.0.26 is installed and regimewrap supports 1.0.27 or newer"
    )


def _import_anew(monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str) -> None:
    monkeypatch.delitem(sys.modules, "regimewrap.integrations.timm")
    with pytest.raises(error, match=message):
        import regimewrap.integrations.timm  # noqa: F401
