"""A model whose BatchNorm statistics belong to another budget is served with a warning that names the remedy."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import regimewrap

X = torch.randn(16, 64)


def made() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 8))
    return regimewrap.wrap(model).eval()


def served(model: nn.Module, keep_ratio: float = 0.1) -> list[str]:
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        regimewrap.serve(model, keep_ratio, example_inputs=X).close()
    return [str(each.message) for each in said]


def test_statistics_of_another_budget_are_named_with_the_remedy():
    assert any("recalibrate_batchnorm(model, loader, 0.1)" in each for each in served(made()))


def test_after_recalibration_nothing_is_said():
    model = made()
    regimewrap.recalibrate_batchnorm(model, [X], 0.1)
    assert not any("recalibrate_batchnorm" in each for each in served(model))


def test_a_mix_of_budgets_in_training_is_named_at_the_full_budget_too():
    model = made().train()
    cycler = regimewrap.RegimeCycler(model)
    for _ in range(4):
        model(X).square().mean().backward()
        cycler.step()
    assert any("taken over a mix of budgets in training" in each for each in served(model.eval(), 1.0))
