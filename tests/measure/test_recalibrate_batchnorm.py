from __future__ import annotations

import pytest
import torch
from torch import nn

from regimewrap.errors import DataError, NotWrappedError, PolicyError, WrapError
from regimewrap.gate.gate import at_keep_ratio, gate_of
from regimewrap.measure.sweep import recalibrate_batchnorm
from regimewrap.wrap import wrap

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.5))
        self.norm = nn.BatchNorm1d(12, momentum=0.3)
        self.fixed = nn.BatchNorm1d(12, track_running_stats=False)

    def forward(self, inputs, scale=1.0):
        return self.fixed(self.norm(self.body(inputs * scale)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wrap(Net())


def statistics(model):
    return [buffer.clone() for buffer in model.buffers()]


def test_the_statistics_become_those_of_the_budget(model):
    recalibrate_batchnorm(model, [X], 0.25)

    model.eval()
    with at_keep_ratio(model, 0.25), torch.no_grad():
        hidden = model.body(X)
    assert (hidden != 0).sum(1).max() == 3
    assert torch.allclose(model.norm.running_mean, hidden.mean(0))
    assert torch.allclose(model.norm.running_var, hidden.var(0))


def test_batches_count_the_same_whatever_the_momentum_was(model):
    recalibrate_batchnorm(model, [X[:16], X[16:]], 1.0)

    with torch.no_grad():
        halves = [model.body.eval()(half) for half in (X[:16], X[16:])]
    assert torch.allclose(model.norm.running_mean, (halves[0].mean(0) + halves[1].mean(0)) / 2)


@pytest.mark.parametrize(
    "batch", [X, (X, torch.zeros(32)), [X], {"inputs": X}, {"inputs": X, "scale": 1.0}], ids=lambda b: type(b).__name__
)
def test_batches_may_be_tensors_tuples_lists_or_dicts(model, batch):
    recalibrate_batchnorm(model, [batch], 0.5)

    assert model.norm.num_batches_tracked == 1


def test_modes_momentum_and_ratio_come_back(model):
    model.train()
    model.body.eval()
    gate_of(model).set_keep_ratio(0.7)

    recalibrate_batchnorm(model, [X], 0.1)

    assert model.norm.momentum == 0.3
    assert (model.training, model.body.training, model.norm.training) == (True, False, True)
    assert gate_of(model).keep_ratio == pytest.approx(0.7)


def test_parameters_and_gradients_are_left_alone(model):
    before = [parameter.clone() for parameter in model.parameters()]

    recalibrate_batchnorm(model, [X], 0.1)

    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_old_statistics_come_back_when_a_batch_fails(model):
    before = statistics(model)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        recalibrate_batchnorm(model, [X, torch.zeros(4, 5)], 0.5)

    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))
    assert model.norm.momentum == 0.3
    assert model.training


def test_a_loader_without_batches_is_refused_and_changes_nothing(model):
    before = statistics(model)

    with pytest.raises(DataError, match="the loader gave no batch"):
        recalibrate_batchnorm(model, [], 0.5)

    assert all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))


@pytest.mark.parametrize("batch", ["text", (), ("text", X), 3])
def test_a_batch_of_another_kind_is_refused(model, batch):
    with pytest.raises(DataError, match="a batch must be a tensor"):
        recalibrate_batchnorm(model, [batch], 0.5)


def test_a_model_without_running_statistics_is_refused():
    model = wrap(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU()))

    with pytest.raises(WrapError, match="no BatchNorm layer with running statistics"):
        recalibrate_batchnorm(model, [X], 0.5)


def test_a_model_that_is_not_wrapped_is_refused():
    with pytest.raises(NotWrappedError):
        recalibrate_batchnorm(nn.BatchNorm1d(6), [X], 0.5)


def test_a_bad_ratio_is_refused(model):
    with pytest.raises(PolicyError):
        recalibrate_batchnorm(model, [X], 0.0)
