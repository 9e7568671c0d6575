"""A cycler that idles, sinks, or drives nothing says so; a loop that is in order never hears of it."""

from __future__ import annotations

import copy
import gc
import logging
import warnings

import pytest
import torch
from torch import nn

from regimewrap import CyclePolicy, RegimeCycler, RegimePolicy, TopKGate, at_keep_ratio, gate_of, unwrap, wrap
from regimewrap.errors import PolicyError, WrapError
from regimewrap.policy.strategies import EmaReset, PlateauReset


def bare() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))


def train(
    model: nn.Module, cycler: RegimeCycler, updates: int, trained: nn.Module | None = None, batch: int = 4
) -> None:
    trained = trained if trained is not None else model
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    for _ in range(updates):
        x = torch.randn(batch, 8)
        loss = (trained(x) - x[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycler.step(loss)


# A cycler that drives nothing


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_training_inside_blocks_of_a_forced_ratio_is_no_reason_to_refuse(ratio):
    model = wrap(bare()).train()
    cycler, optimizer = RegimeCycler(model), torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(40):
        with at_keep_ratio(model, ratio):
            model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        cycler.step()
    assert cycler.updates == 40


def test_a_cycler_whose_model_was_unwrapped_refuses_to_step():
    model = wrap(bare())
    cycler = RegimeCycler(model)
    cycler.step()
    unwrap(model)

    with pytest.raises(WrapError, match="its model was unwrapped"):
        cycler.step()
    wrap(model)
    with pytest.raises(WrapError, match="its model was unwrapped"):
        cycler.step()
    assert cycler.updates == 1


def test_the_older_of_two_cyclers_of_one_model_refuses_to_step():
    model = wrap(bare())
    older, newer = RegimeCycler(model), RegimeCycler(model)

    with pytest.raises(WrapError, match=r"does not drive its model: RegimeCycler\('spread'.*does"):
        older.step()
    newer.step()
    del newer
    older.step()  # the other is gone


def test_a_cycler_that_is_made_again_in_a_notebook_works():
    model = wrap(bare())
    for _ in range(2):
        cycler = RegimeCycler(model)
        train(model, cycler, 3)
        assert cycler.updates == 3


def test_a_copied_pair_drives_on_both_sides():
    model = wrap(bare())
    cycler = RegimeCycler(model)
    twin, twins = copy.deepcopy((model, cycler))
    for each, its in ((model, cycler), (twin, twins)):
        train(each, its, 20)
        assert its.updates == 20


def test_a_copy_of_the_cycler_alone_does_not_take_over():
    model = wrap(bare())
    cycler = RegimeCycler(model)
    backup = copy.deepcopy(cycler)

    cycler.step()
    with pytest.raises(WrapError, match="does not drive its model"):
        backup.step()
    del cycler
    gc.collect()
    backup.step()


def test_an_averaged_copy_that_was_unwrapped_is_let_go():
    model = wrap(bare())
    cycler, averaged = RegimeCycler(model), torch.optim.swa_utils.AveragedModel(model)
    cycler.bind(averaged)
    unwrap(averaged)

    train(model, cycler, 3)
    assert cycler.updates == 3


def test_a_gate_that_another_tool_dropped_is_noticed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qat_qconfig_mapping
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        model = wrap(bare())
        cycler = RegimeCycler(model)
        dropped = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping(), (torch.randn(4, 8),))

        with pytest.raises(WrapError, match=r"drives nothing: in 8 updates .* no forward pass"):
            train(model, cycler, 40, trained=dropped)


@pytest.mark.filterwarnings("ignore:.*torch.ao", "ignore:.*quantiz", "ignore:Please use quant_min")
def test_some_gates_that_another_tool_dropped_are_noticed():
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    model = wrap(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 2)))
    cycler = RegimeCycler(model)
    model = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping(), (torch.randn(4, 8),))
    gc.collect()

    with pytest.warns(RuntimeWarning, match="what trains passes 1 of its 2 gates"):
        train(model, cycler, 40)


def test_a_copy_that_trains_in_the_place_of_its_model_is_noticed():
    model = wrap(bare())
    cycler = RegimeCycler(model)
    twin = copy.deepcopy(model)

    with pytest.raises(WrapError, match=r"of a copy, changed, .* drives that: RegimeCycler\(copy\)"):
        train(model, cycler, 40, trained=twin)
    train(model, cycler, 40)
    train(twin, RegimeCycler(twin), 40)


def test_a_model_that_trains_in_eval_mode_is_noticed():
    model = wrap(bare()).eval()

    with pytest.raises(WrapError, match="or the model trains in eval mode"):
        train(model, RegimeCycler(model), 40)


def test_a_gate_that_is_lost_in_the_middle_is_noticed():
    model = wrap(bare())
    cycler = RegimeCycler(model)
    train(model, cycler, 100)

    with pytest.raises(WrapError, match="drives nothing"):
        train(model, cycler, 200, trained=model.eval())


def test_a_loop_that_only_counts_hears_nothing():
    model = wrap(bare())
    for name, steps in (("mixed", None), ("sawtooth", 300), ("loss-reset", 300)):
        cycler = RegimeCycler(model, name, total_steps=steps)
        for _ in range(300):
            cycler.step(1.0)
        assert cycler.updates == 300


def test_a_loop_that_steps_without_a_forward_now_and_then_hears_nothing():
    model = wrap(bare())
    cycler = RegimeCycler(model)
    for _ in range(30):
        train(model, cycler, 2)
        for _ in range(3):
            cycler.step()
    assert cycler.updates == 150


@pytest.mark.parametrize("name", ["mixed", "sawtooth", "loss-reset", "dense"])
def test_a_training_in_order_hears_nothing(name: str):
    model = wrap(bare(), name)
    cycler = RegimeCycler(model, total_steps=400)

    train(model, cycler, 400)  # a warning would be an error
    assert cycler.updates == 400


@pytest.mark.parametrize("full_share", [0.5, 0.75, 0.97])
@pytest.mark.parametrize("batch", [1, 2])
def test_updates_in_which_all_rows_are_dense_are_no_reason_to_refuse(batch: int, full_share: float):
    model = wrap(bare(), RegimePolicy(cycle={"full_share": full_share}))

    cycler = RegimeCycler(model)
    train(model, cycler, 100, batch=batch)
    assert cycler.updates == 100


# A gate that never cuts


def test_a_run_in_which_no_gate_ever_cut_is_told_once_with_the_remedy():
    policy = RegimePolicy(cycle=CyclePolicy(strategy=EmaReset(), every=128))  # the method's numbers in a short run
    model = wrap(bare(), policy)
    cycler = RegimeCycler(model, total_steps=1000)

    with pytest.warns(RuntimeWarning, match=r"no gate has cut anything in 100 updates.*total_steps=N") as told:
        train(model, cycler, 110)
    assert len(told) == 1
    train(model, cycler, 10)


# A floor that is never left


def test_a_ratio_that_stays_at_its_floor_is_told_once_with_the_remedy():
    strategy = EmaReset(decay=0.5, floor=0.1)
    cycler = RegimeCycler(TopKGate(), CyclePolicy(strategy=strategy, every=2, guarded=False))

    with pytest.warns(RuntimeWarning, match=r"at its floor, 0.1, for 10 updates, longer than the 8 .*guarded") as told:
        [cycler.step(1.0) for _ in range(100)]
    assert len(told) == 1


def test_a_rule_that_waits_above_its_floor_hears_nothing():
    strategy = PlateauReset(decay=0.9, patience=20)
    cycler = RegimeCycler(TopKGate(), CyclePolicy(strategy=strategy, every=1, guarded=False))
    for step in range(40):
        cycler.step(1.0 if step < 2 else 9.0)


def test_a_run_beyond_its_length_is_told_once():
    cycler = RegimeCycler(TopKGate(), "sawtooth", total_steps=10)  # epochs taken for updates

    with pytest.warns(RuntimeWarning, match="optimizer updates of the whole run: epochs × updates an epoch") as told:
        [cycler.step() for _ in range(30)]
    assert len(told) == 1


# To look at


def test_a_cycler_shows_where_it_is():
    cycler = RegimeCycler(TopKGate(), CyclePolicy(strategy=EmaReset(decay=0.5), every=4))
    for _ in range(5):
        cycler.step(1.0)

    assert repr(cycler) == (
        "RegimeCycler('ema-reset', keep_ratio=0.5, cycle=0, phase='compress', updates=5, next decision at update 8)"
    )
    assert "updates=0 of 800" in repr(RegimeCycler(TopKGate(), "sawtooth", total_steps=800))
    assert "moves at each update" in repr(RegimeCycler(TopKGate()))


def test_each_cycle_is_logged_on_one_line(caplog: pytest.LogCaptureFixture):
    model = wrap(bare())
    cycler = RegimeCycler(model, "sawtooth", total_steps=120)
    with caplog.at_level(logging.INFO, logger="regimewrap"):
        train(model, cycler, 50)

    lines = [record.getMessage() for record in caplog.records if record.name == "regimewrap"]
    assert lines[0] == "cycle 1: reset at update 10, keep ratio 0.05 to 1; 100% of the gates were bound"
    assert len(lines) == 5


# Counting without steps


def test_counting_ahead_is_as_if_the_steps_had_been_made():
    for name, steps in (("mixed", None), ("sawtooth", 300)):
        stepped, counted = (RegimeCycler(TopKGate(), name, total_steps=steps) for _ in range(2))
        for _ in range(130):
            stepped.step()

        assert counted.fast_forward(130) == stepped.regime
        assert counted.state_dict() == stepped.state_dict()
        assert float(counted._gates[0].keep_ratio) == stepped.keep_ratio


def test_counting_ahead_is_refused_where_the_count_does_not_say_all():
    with pytest.raises(PolicyError, match="watches a signal: go on from state_dict"):
        RegimeCycler(TopKGate(), CyclePolicy(strategy=EmaReset())).fast_forward(3)
    cycler = RegimeCycler(TopKGate())
    cycler.fast_forward(9)
    with pytest.raises(PolicyError, match="at least the 9 that have been counted; got 3"):
        cycler.fast_forward(3)


def test_the_rows_at_the_full_budget_are_put_into_force_with_each_update():
    model = wrap(bare())
    cycler = RegimeCycler(model, CyclePolicy(full_share=0.25))
    assert gate_of(model).dense_rows.tolist() == [0.25, 0.0]
    for update in (1, 2, 3):
        cycler.step()
        assert gate_of(model).dense_rows.tolist() == [0.25, float(update)]
    state = cycler.state_dict()
    cycler.step()
    cycler.load_state_dict(state)
    assert gate_of(model).dense_rows.tolist() == [0.25, 3.0]
