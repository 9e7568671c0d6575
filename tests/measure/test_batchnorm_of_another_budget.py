"""Statistics of another mix of budgets than the one evaluated are named once, with the remedy; else nothing is said."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from regimewrap import RegimeCycler, recalibrate_batchnorm, sweep, unwrap, wrap
from regimewrap.measure.sweep import Sweep

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def trained(policy: str = "mixed", norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), norm(12), nn.Linear(12, 1)), policy)
    cycler = RegimeCycler(model)
    for _ in range(3):
        model(X)
        cycler.step()
    return model


def loss(model: nn.Module) -> float:
    return model(X).square().mean().item()


def test_sweep_names_the_budgets_and_the_remedy_once():
    with pytest.warns(RuntimeWarning, match=r"a mix of budgets .*recalibrate_batchnorm\(model, loader, ") as told:
        sweep(trained(), loss, (1.0, 0.5))
    assert len(told) == 1
    assert told[0].filename == __file__


def test_unwrap_names_it_too():
    with pytest.warns(RuntimeWarning, match=r"recalibrate_batchnorm\(model, loader, 1\)"):
        unwrap(trained())


def test_nothing_is_said_where_it_was_recalibrated():
    model = trained()

    def recalibrated(model: nn.Module) -> float:
        recalibrate_batchnorm(model, [X], ratio)
        return loss(model)

    for ratio in (0.5, 1.0):
        sweep(model, recalibrated, (ratio,))
    unwrap(model)


def test_training_on_makes_a_recalibration_old():
    model = trained()
    recalibrate_batchnorm(model, [X], 1.0)
    sweep(model, loss, (1.0,))
    model.train()(X)
    with pytest.warns(RuntimeWarning, match="recalibrate_batchnorm"):
        sweep(model, loss, (1.0,))


def test_nothing_is_said_without_batchnorm_or_after_dense_training():
    sweep(trained(norm=nn.LayerNorm), loss, (1.0, 0.5))
    unwrap(trained(norm=nn.LayerNorm))
    dense = trained("dense")
    sweep(dense, loss, (1.0,))
    with pytest.warns(RuntimeWarning, match="taken at keep ratio 1, and is evaluated at 0.5"):
        sweep(dense, loss, (0.5,))
    unwrap(dense)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])  # noqa: S301
def test_a_sweep_can_be_copied_and_pickled(copied):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swept = sweep(trained(), loss, (1.0, 0.5))

    twin = copied(swept)

    assert isinstance(twin, Sweep)
    assert dict(twin.values) == dict(swept.values)
    assert str(twin) == str(swept)
    with pytest.raises(TypeError):
        twin.values[0.5] = 1.0
