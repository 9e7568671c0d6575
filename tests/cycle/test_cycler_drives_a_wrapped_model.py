from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import regimewrap
from regimewrap.cycle.cycler import RegimeCycler
from regimewrap.policy.policy import CyclePolicy, RegimePolicy
from regimewrap.policy.strategies import Sawtooth

POLICY = RegimePolicy(cycle=CyclePolicy(strategy=Sawtooth(decisions=3, floor=0.25), every=1, full_share=0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return regimewrap.wrap(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), POLICY)


def ratio_of(model: nn.Module) -> float:
    return float(regimewrap.gate_of(model).keep_ratio)


def test_the_policy_the_model_was_wrapped_with_drives_its_forward_pass(model: nn.Module):
    cycler, x = RegimeCycler(model), torch.randn(5, 8)
    dense = model(x)

    ratios = [cycler.step().keep_ratio for _ in range(2)]

    assert ratios == [0.5, 0.25] == [ratios[0], ratio_of(model)]
    assert (model[1](model[0](x)) != 0).sum(dim=1).max() <= 4
    cycler.step()
    assert torch.equal(model(x), dense)


def test_a_model_inside_another_is_found(model: nn.Module):
    cycler = RegimeCycler(nn.Sequential(model))

    cycler.step()

    assert ratio_of(model) == 0.5


def test_a_bound_averaged_copy_follows(model: nn.Module):
    cycler, averaged = RegimeCycler(model), torch.optim.swa_utils.AveragedModel(model)
    cycler.step()

    cycler.bind(averaged)
    cycler.step()

    assert ratio_of(averaged) == ratio_of(model) == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])  # noqa: S301
def test_a_model_and_its_cycler_copied_together_stay_together(model: nn.Module, copied):
    cycler = RegimeCycler(model)
    cycler.step()

    twin, twin_cycler = copied((model, cycler))
    twin_cycler.step()

    assert (ratio_of(model), cycler.keep_ratio) == (0.5, 0.5)
    assert (ratio_of(twin), twin_cycler.keep_ratio) == (0.25, 0.25)


def test_a_state_goes_through_a_checkpoint_of_plain_types(model: nn.Module, tmp_path):
    cycler = RegimeCycler(model)
    cycler.step()
    torch.save({"cycler": cycler.state_dict()}, tmp_path / "checkpoint.pt")
    cycler.step()

    cycler.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["cycler"])

    assert ratio_of(model) == cycler.keep_ratio == 0.5
