"""Which budget is in force: set by hand or by a cycler, forced by a block, copied, sampled."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from regimewrap import (
    GatePolicy,
    RegimeCycler,
    RegimePolicy,
    TopKGate,
    at_keep_ratio,
    gate_of,
    is_wrapped,
    unwrap,
    wrap,
)
from regimewrap.errors import PolicyError
from regimewrap.gate.gate import GateSample, Site
from regimewrap.topk import sampling
from regimewrap.topk.reference import kept

SITE = Site("act", "gelu")


def network(**gate: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    return wrap(model, RegimePolicy(gate=GatePolicy(**gate)))


def budget(gate: TopKGate) -> tuple[float, float, float]:
    return (float(gate.keep_ratio), *gate.dense_rows.tolist())


def test_a_budget_is_filled_into_tensors_that_stay_the_same():
    gate = TopKGate()
    ratio, rows = gate.keep_ratio, gate.dense_rows
    gate.set_budget(0.3, full_share=0.5, update=7)
    assert gate.keep_ratio is ratio
    assert gate.dense_rows is rows
    assert budget(gate) == (0.3, 0.5, 7)
    assert rows.dtype == torch.float64
    gate.set_keep_ratio(0.2)
    assert budget(gate) == (0.2, 0.5, 7)
    gate.set_budget(0.1)
    assert budget(gate) == (0.1, 0, 0)
    gate.set_budget(1.0, update=2**52 + 1)
    assert budget(gate) == (1.0, 0, 2**52 + 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_ratio": 0.0},
        {"keep_ratio": float("nan")},
        {"full_share": 1.0},
        {"full_share": -0.1},
        {"full_share": float("nan")},
        {"full_share": True},
        {"full_share": "half"},
        {"update": -1},
        {"update": 0.5},
        {"update": True},
    ],
)
def test_a_budget_out_of_range_is_refused_by_name_and_changes_nothing(wrong):
    gate = TopKGate()
    gate.set_budget(0.3, full_share=0.5, update=7)
    (name,) = wrong
    with pytest.raises(PolicyError, match=f"{name} must be"):
        gate.set_budget(**{"keep_ratio": 0.5, **wrong})
    assert budget(gate) == (0.3, 0.5, 7)


@pytest.mark.parametrize("scope", ["sample", "position", "batch"])
def test_in_train_mode_dense_rows_keep_all_and_the_others_what_they_would(scope):
    gate = TopKGate(RegimePolicy(gate=GatePolicy(scope=scope, eval_keep_ratio="current")))
    x = torch.randn(6, 5, 16)
    for update in (0, 1, 2):
        gate.set_budget(0.25, full_share=0.5, update=update)
        y = gate(x, SITE, training=True)
        mask = kept(x, 0.25, scope=scope, channel_dim=-1, full_share=0.5, update=update)
        assert torch.equal(y, x * mask)
        without = x * kept(x, 0.25, scope=scope, channel_dim=-1)
        assert torch.equal(gate(x, SITE, training=False), without)


def test_in_a_block_all_rows_run_at_its_ratio_in_train_mode_too():
    model, x = network(), torch.randn(8, 6)
    gate_of(model).set_budget(0.3, full_share=0.5, update=3)
    with at_keep_ratio(model, 0.25):
        inside = model[1](torch.randn(8, 32))
        assert budget(gate_of(model)) == (0.25, 0, 0)
    assert ((inside != 0).sum(1) == 8).all()
    assert budget(gate_of(model)) == (0.3, 0.5, 3)
    assert model(x).shape == (8, 3)


def test_what_is_set_inside_a_block_holds_from_its_end_on():
    model = network()
    gate = gate_of(model)
    with at_keep_ratio(model, 0.5):
        gate.set_budget(0.3, full_share=0.5, update=4)
        assert budget(gate) == (0.5, 0, 0)
        with at_keep_ratio(model, 0.25):
            gate.set_keep_ratio(0.2)
            assert gate.keep_ratio == 0.25
        assert gate.keep_ratio == 0.5
    assert budget(gate) == (0.2, 0.5, 4)


def test_a_step_of_the_cycler_inside_a_block_holds_from_its_end_on():
    model = network()
    cycler = RegimeCycler(model, RegimePolicy.preset("sawtooth"), total_steps=100)
    with at_keep_ratio(model, 0.25):
        steps = [cycler.step().keep_ratio for _ in range(10)]
        assert gate_of(model).keep_ratio == 0.25
    assert gate_of(model).keep_ratio == steps[-1] < 1


@pytest.mark.parametrize("scope", ["sample", "network"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_made_inside_a_block_is_not_forced(way, scope):
    model = network(scope=scope)
    gate_of(model).set_budget(0.3, full_share=0.5, update=3)
    with at_keep_ratio(model, 0.5):
        if way == "deepcopy":
            twin = copy.deepcopy(model)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(model))  # noqa: S301  our own bytes
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
    for _ in range(2):
        assert budget(gate_of(twin)) == (0.3, 0.5, 3)
        assert gate_of(twin).keep_ratio is not gate_of(model).keep_ratio
        x = torch.randn(8, 6)
        assert torch.equal(twin(x), model(x))
        assert torch.equal(twin.eval()(x), model.eval()(x))
        gate_of(twin).set_keep_ratio(0.05)
        with at_keep_ratio(twin, 0.9):
            pass
        assert budget(gate_of(model)) == (0.3, 0.5, 3)
        gate_of(twin).set_keep_ratio(0.3)
        model.train(), twin.train()


def test_blocks_that_overlap_in_two_threads_end_at_what_was_set():
    model, entered, left = network(), threading.Event(), threading.Event()
    gate = gate_of(model)
    gate.set_budget(0.3, full_share=0.5, update=3)

    def other():
        entered.wait(10)
        with at_keep_ratio(model, 0.5):
            left.set()
            seen.append(float(gate.keep_ratio))
            done.wait(10)

    seen, done = [], threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    with at_keep_ratio(model, 0.5):
        entered.set()
        left.wait(10)
    assert gate.keep_ratio == 0.5  # the other block is still open
    done.set()
    thread.join(10)
    assert seen == [0.5]
    assert budget(gate) == (0.3, 0.5, 3)


def test_blocks_at_two_ratios_in_two_threads_are_told_apart_by_a_warning_that_says_what_to_do():
    model = network()

    def other():
        with pytest.warns(RuntimeWarning, match=r"newest block.*copy\.deepcopy"), at_keep_ratio(model, 0.2):
            seen.append(float(gate_of(model).keep_ratio))

    seen = []
    with at_keep_ratio(model, 0.5):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
        assert gate_of(model).keep_ratio == 0.5
    assert seen == [pytest.approx(0.2)]
    assert gate_of(model).keep_ratio == 1.0


def test_thresholds_wait_while_a_block_is_open():
    model = network()
    gate_of(model).set_thresholds({"1": 1e9})
    x = torch.randn(4, 32)
    with at_keep_ratio(model, 1.0):
        assert torch.equal(model[1](x), nn.functional.gelu(x))
        assert gate_of(model).thresholds == {"1": 1e9}
    assert not model[1](x).any()


def test_an_attribute_called_gates_is_the_users_own():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.gates, self.hidden = 4, nn.Linear(6, 8)

        def forward(self, x):
            return nn.functional.relu(self.hidden(x)) * self.gates

    model = wrap(nn.Sequential(Cell(), nn.Linear(8, 2)))
    assert gate_of(model[0]) is gate_of(model)
    for other in ([1, 2], "abc", (1, 2), {"a": 1}, None):
        model[0].gates = other
        assert gate_of(model).sites


def test_unwrap_releases_the_gate():
    model = network()
    gate = gate_of(model)
    assert not gate.released
    unwrap(model)
    assert gate.released
    wrap(model)
    assert gate_of(model) is not gate
    assert not gate_of(model).released


def test_a_copy_is_not_driven_by_the_originals_cycler():
    class Driver:
        pass

    model, driver = network(), Driver()
    gate = gate_of(model)
    gate.driver = weakref.ref(driver)
    assert gate_of(copy.deepcopy(model)).driver is None
    assert gate_of(pickle.loads(pickle.dumps(model))).driver is None  # noqa: S301  our own bytes
    assert gate.driver() is driver


@pytest.mark.parametrize("scope", ["sample", "batch", "network"])
def test_a_sample_counts_calls_that_could_cut_in_train_mode_outside_of_blocks(scope):
    model, x = network(scope=scope, eval_keep_ratio="current"), torch.randn(8, 6)
    gate = gate_of(model)
    gate.set_budget(0.3, full_share=0.5)
    gate.sample_next()
    model(x)
    model.eval()(x)
    with at_keep_ratio(model.train(), 0.1):
        model(x)
    model(x)
    assert gate.take_sample() == GateSample(4, 1.0)
    model(x)
    assert gate.take_sample() == GateSample(0, 0.0)
    gate.set_keep_ratio(1.0)
    gate.sample_next()
    model(x)
    assert gate.take_sample() == GateSample(0, 0.0)
    assert gate.keep_ratio.data_ptr() not in sampling.ON


def test_a_sample_ends_with_its_gate_and_is_of_no_other_one():
    sampled, other = network(), network()
    gate_of(sampled).sample_next()
    with at_keep_ratio(other, 0.5), at_keep_ratio(sampled, 0.5):
        pass
    addresses = [gate_of(each).keep_ratio.data_ptr() for each in (sampled, other)]
    assert [address in sampling.ON for address in addresses] == [True, False]
    del sampled
    gc.collect()
    assert addresses[0] not in sampling.ON


def test_a_gate_that_cuts_nothing_is_found_not_to_bind():
    model = wrap(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.arange(32) < 4)
    gate_of(model).set_budget(0.5, full_share=0.5)
    gate_of(model).sample_next()
    model(torch.randn(8, 6))
    assert gate_of(model).take_sample() == GateSample(1, 0.0)


def test_the_compiler_is_told_of_a_new_budget(monkeypatch):
    told = []
    monkeypatch.setattr("regimewrap.gate.gate.notice_hooks", lambda: told.append(True))
    model = network()
    for change in (
        lambda: gate_of(model).set_keep_ratio(0.5),
        lambda: gate_of(model).set_budget(0.4),
        lambda: gate_of(model).set_thresholds(None),
        lambda: at_keep_ratio(model, 0.3).__enter__(),
    ):
        told.clear()
        change()
        assert told


def test_a_number_that_is_assigned_is_the_keep_ratio_that_sites_read():
    model = wrap(nn.Sequential(nn.Linear(4, 20), nn.ReLU()), RegimePolicy(gate={"relative_to": "active"}))
    gate = gate_of(model)
    tensor = gate.keep_ratio
    gate.keep_ratio = 0.1
    assert gate.keep_ratio is tensor
    assert float(tensor) == 0.1
    for wrong in (0, 2, "half", None):
        with pytest.raises(PolicyError, match="keep_ratio"):
            gate.keep_ratio = wrong
    assert float(tensor) == 0.1
    twin = copy.deepcopy(model)
    gate_of(twin).keep_ratio = 0.5
    assert (float(gate_of(twin).keep_ratio), float(tensor)) == (0.5, 0.1)


def test_a_model_is_wrapped_until_it_is_unwrapped():
    model = nn.Sequential(nn.Linear(4, 20), nn.ReLU())
    outer = nn.Sequential(wrap(model))
    assert is_wrapped(model)
    assert is_wrapped(outer)
    unwrap(model)
    assert not is_wrapped(outer)
