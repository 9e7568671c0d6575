from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from regimewrap.errors import NoSitesError, SignalError
from regimewrap.gate.gate import gate_of
from regimewrap.policy.policy import RegimePolicy
from regimewrap.recipes.data import load_data
from regimewrap.recipes.training import TrainSettings, accuracy, build_model, train_run

SETTINGS = TrainSettings(arch="wrn-10-1", epochs=3, batch_size=10, lr=0.05, keep_ratios=(1.0, 0.1))
UPDATES = 12


@pytest.fixture(scope="module")
def data():
    return load_data("digits", limit=40, test_limit=50)


@pytest.fixture
def policy():
    sawtooth = {"kind": "sawtooth", "decisions": 3, "floor": 0.1}
    return RegimePolicy().replace(cycle={"strategy": sawtooth, "every": 2})


def test_a_run_records_every_decision_with_the_ratio_its_update_used(data, policy):
    run = train_run("saw", policy, data, SETTINGS, seed=0).run

    assert [point.step for point in run.trace] == [2, 4, 6, 8, 10, 12]
    assert [point.event for point in run.trace] == ["compress", "compress", "reset"] * 2
    assert [round(point.keep_ratio, 2) for point in run.trace] == [1.0, 0.32, 0.1] * 2
    assert [point.bound > 0 for point in run.trace] == [False, True, True] * 2
    assert run.bound_share == pytest.approx(4 / 6)
    assert run.cycles == 2
    assert all(0 < point.density < 1 for point in run.trace)


def test_a_run_is_evaluated_at_each_budget(data, policy):
    trained = train_run("saw", policy, data, SETTINGS, seed=0)

    assert list(trained.run.accuracy) == ["1.0", "0.1"]
    trained.model.eval()
    assert trained.run.accuracy["1.0"] == accuracy(trained.model, data.test)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(data):
    policy = RegimePolicy.preset("accuracy-relax", total_steps=UPDATES)
    first, same, other = (train_run("x", policy, data, SETTINGS, seed=seed).run for seed in (1, 1, 2))

    assert first.model_copy(update={"train_seconds": 0.0}) == same.model_copy(update={"train_seconds": 0.0})
    assert first.trace != other.trace


def test_a_dense_run_is_bit_for_bit_a_run_without_a_gate(data):
    trained = train_run("dense", RegimePolicy.preset("dense"), data, SETTINGS, seed=3)

    torch.manual_seed(3)
    model = build_model(SETTINGS.arch, data)
    optimizer = torch.optim.SGD(model.parameters(), lr=SETTINGS.lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    order = torch.Generator().manual_seed(3)
    for _ in range(SETTINGS.epochs):
        for x, y in data.train.batches(SETTINGS.batch_size, order):
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.model.parameters(), strict=True))


def test_a_last_batch_that_is_smaller_counts_as_an_update(data, policy):
    settings = replace(SETTINGS, batch_size=15)

    run = train_run("saw", policy, data, settings, seed=0).run

    assert settings.total_steps(40) == 9
    assert [point.step for point in run.trace] == [2, 4, 6, 8]


def test_a_loss_that_is_not_finite_ends_the_run_with_a_remedy(data, policy):
    with pytest.raises(SignalError, match=r"the training loss became (nan|inf).*lower the learning rate"):
        train_run("saw", policy, data, replace(SETTINGS, lr=1e30), seed=0)


def test_a_policy_that_selects_nothing_is_refused(data):
    with pytest.raises(NoSitesError):
        train_run("x", RegimePolicy().replace(sites={"kinds": ["gelu"]}), data, SETTINGS, seed=0)


def test_a_policy_that_never_decides_leaves_an_empty_trace(data):
    run = train_run("x", RegimePolicy.preset("dense").replace(cycle={"every": 1000}), data, SETTINGS, seed=0).run

    assert run.trace == []
    assert run.bound_share == 0.0


def test_the_trained_model_is_still_wrapped(data, policy):
    assert gate_of(train_run("saw", policy, data, SETTINGS, seed=0).model).policy == policy


def test_settings_are_recorded_as_plain_data():
    assert SETTINGS.as_record()["keep_ratios"] == [1.0, 0.1]
    assert SETTINGS.as_record()["norm"] == "RMSNorm"
