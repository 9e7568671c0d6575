from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from torch import nn

from regimewrap import TopKGate
from regimewrap.recipes.study.arms import ARMS, trial
from regimewrap.recipes.study.cells import final_cell
from regimewrap.recipes.study.nets import build, fitting_width, multiply_adds, parameters
from regimewrap.recipes.study.outcomes import _figures, make
from regimewrap.recipes.study.tasks import load, load_before
from regimewrap.recipes.study.train import _Penalty, _random_units, _schedule, _without_largest

pytestmark = pytest.mark.filterwarnings("ignore:the keep ratio has been at its floor", "ignore:no gate")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cell_of(study, task, arm, seed=0, **changes):
    lr, knob = trial(ARMS[arm], study.tasks[task].training.lr, 0)
    study = study.replace(tasks={task: study.tasks[task].replace(**changes)})
    return final_cell(study, task, arm, seed, lr, knob)


@pytest.mark.parametrize(
    "arm", [arm if arm in ("dense", "mixed") else pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS]
)
def test_every_arm_trains_and_is_judged_at_every_budget(study, arm):
    figures = make(cell_of(study, "text", arm, training={"steps": 40}))
    for outcome in ("accuracy", "nll", "ece"):
        assert set(figures[outcome]) == {"1", "0.1"}
        assert all(map(math.isfinite, figures[outcome].values()))
    assert figures["trace"]
    gated = arm not in ("dense",) and ARMS[arm].policy is not None and ARMS[arm].units == "top"
    assert (figures["bound"] > 0) == gated or arm == "sandwich"


@pytest.mark.parametrize("norm", ["rms", "batch"])
def test_the_same_cell_comes_out_the_same_and_another_seed_does_not(study, norm):
    first, again, other = (make(cell_of(study, "digits", "dense", seed, norm=norm)) for seed in (0, 0, 1))
    assert first == again
    assert first["nll"] != other["nll"]
    assert set(first["corrupted"]) == {"noise", "blur", "contrast"}
    post_hoc = first.get("post-hoc", {"accuracy": ()})
    assert set(post_hoc["accuracy"]) == (set() if norm == "batch" else {"1", "0.1"})


def test_arms_of_a_seed_start_from_the_same_weights_with_the_same_samples(study):
    losses = {arm: make(cell_of(study, "text", arm))["trace"][0] for arm in ("dense", "weight-decay", "restarts", "l1")}
    assert len({tuple(point) for point in losses.values()}) == 1


def test_a_network_trained_before_goes_on_with_other_text_from_where_it_was(study):
    before = {"steps": 30, "batch_size": 8, "optimizer": "adamw", "lr": 0.01}
    new, trained = (
        make(cell_of(study, "text", arm, before=each)) for arm, each in (("dense", None), ("dense", before))
    )
    assert trained["trace"][0][2] < new["trace"][0][2] - 0.2
    narrow = make(cell_of(study, "text", "narrow", before=before))
    assert narrow["nll"]["1"] == trained["nll"]["1"]
    first, then = (
        load_before(study.tasks["text"].replace(before=before)),
        load(study.tasks["text"].replace(before=before), 0, "test"),
    )
    assert first.classes == then.classes
    assert first.about != then.about


def test_hidden_layers_are_as_many_and_as_wide_as_their_name_says(study):
    cell = cell_of(study, "digits", "dense", arch="mlp-2-12")
    model = build(cell.task, load(cell.task, 0, "test"))
    assert [each.out_features for each in model if isinstance(each, nn.Linear)] == [12, 12, 10]
    assert make(cell)["multiply_adds"] == 64 * 12 + 12 * 12 + 12 * 10


def test_dense_then_a_budget_is_dense_for_four_fifths_of_the_updates(study):
    dense, then = (
        make(cell_of(study, "text", arm, training={"steps": 40}))["trace"] for arm in ("dense", "dense-then-0.1")
    )
    assert then[:32] == dense[:32]
    assert [ratio for _, ratio, _ in then[32:]] == [0.1] * 8


def test_the_order_of_samples_is_the_seed_s_and_leaves_out_parts_of_batches(study):
    data = load(study.tasks["digits"], 0, "test")
    epoch = torch.cat(list(islice(data.order(3, 15), 2)))
    assert len(epoch.unique()) == 30
    assert torch.equal(epoch, torch.cat(list(islice(data.order(3, 15), 2))))
    assert len(next(data.order(3, 1000))) == 40  # more than there are: all of them


def test_trials_are_judged_on_training_samples_that_no_trial_trains_on(study):
    digits = study.tasks["digits"].replace(train_samples=None)
    trial_data, final = load(digits, 0, "validation"), load(digits, 0, "test")

    def rows(x):
        return {tuple(row) for row in x.flatten(1).tolist()}

    assert not rows(trial_data.x) & rows(trial_data.test_x)
    assert rows(trial_data.test_x) <= rows(final.x)
    text = [load(study.tasks["text"], 0, part) for part in ("validation", "test")]
    assert torch.equal(text[0].x, text[1].x)
    assert not torch.equal(text[0].test_x, text[1].test_x)


def test_label_noise_replaces_a_share_of_the_training_labels_alone(study):
    plain = study.tasks["digits"].replace(train_samples=1000)
    clean, noisy = load(plain, 0, "test"), load(plain.replace(label_noise=0.4), 0, "test")
    assert torch.equal(clean.x, noisy.x)
    assert torch.equal(clean.test_y, noisy.test_y)
    assert 0.35 < (clean.y != noisy.y).float().mean() < 0.45


def test_random_units_leave_the_rows_at_full_budget_alone_and_scale_nothing():
    gate, y = TopKGate(), torch.ones(8, 5000)
    gate.set_budget(0.25, full_share=0.5, update=0)
    out = _random_units(gate, None)(y)
    assert torch.equal(out[:4], y[:4])
    assert (out[4:] != 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert set(out[4:].unique().tolist()) == {0.0, 1.0}
    gate.set_budget(0.25, full_share=0.5, update=1)
    out = _random_units(gate, None)(y)
    assert torch.equal(out[4:], y[4:])
    assert not torch.equal(out[:4], y[:4])


def test_max_dropping_zeroes_the_largest_units_of_each_sample():
    torch.manual_seed(0)
    y = torch.rand(3, 2, 50)
    out = _without_largest(0.5)(y)
    for before, after in zip(y.flatten(1), out.flatten(1), strict=True):
        assert (after == 0).any()
        assert before[after == 0].min() > before[after != 0].max()


def test_the_penalty_grows_while_units_are_dense_and_falls_while_they_are_sparse():
    weights = []
    for y in (torch.ones(4, 10), torch.zeros(4, 10)):
        penalty = _Penalty()
        for _ in range(10):
            penalty.see(y)
            penalty.take()
        weights.append(penalty._weight)
    assert weights[0] > 1e-3 > weights[1]


def test_the_learning_rate_restarts_twelve_times():
    rates = [_schedule(step, 1200, "restarts") for step in range(1200)]
    assert [step for step, rate in enumerate(rates) if rate == 1.0] == list(range(0, 1200, 100))
    assert _schedule(600, 1200, "cosine") == pytest.approx(0.5)


@pytest.mark.parametrize("task", ["text", "digits"])
@pytest.mark.parametrize("measure", [multiply_adds, parameters])
def test_a_narrow_net_has_at_most_its_share_and_is_as_wide_as_that_allows(study, task, measure):
    data = load(study.tasks[task], 0, "test")

    def make_net(width: float) -> nn.Module:
        return build(study.tasks[task], data, width)

    def size(width: float) -> int:
        return measure(make_net(width), data)

    width = fitting_width(make_net, 0.3, lambda net: measure(net, data))
    assert size(width) <= 0.3 * size(1.0) < size(width + 1 / 8)


def test_the_calibration_error_of_a_right_guess_is_what_it_lacks_to_be_certain():
    logits = torch.tensor([[math.log(0.8), math.log(0.2)]] * 10)
    right = _figures(logits, torch.zeros(10, dtype=torch.int64))
    assert right["accuracy"] == 1
    assert right["ece"] == pytest.approx(0.2, abs=1e-6)
    assert right["nll"] == pytest.approx(-math.log(0.8), abs=1e-6)
    mixed = _figures(logits, torch.tensor([0] * 8 + [1] * 2))
    assert mixed["ece"] == pytest.approx(0, abs=1e-6)
