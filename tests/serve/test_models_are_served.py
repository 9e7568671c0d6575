"""``serve`` gives the gated model's outputs, says what it chose, and is taken back without a trace."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading

import pytest
import torch
from torch import nn

from regimewrap import GatePolicy, RegimePolicy, at_keep_ratio, calibrate, gate_of, serve, unwrap, wrap
from regimewrap.errors import NotWrappedError, PolicyError, ServeError, StateError
from regimewrap.serve.serving import skip_where_it_pays, slower
from regimewrap.serve.table import ServedLayer

X = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
WIDE = 1024


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, WIDE),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(WIDE, WIDE),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(WIDE, 9),
    ).eval()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return wrap(net())


def at(model, ratio, x=X):
    with at_keep_ratio(model, ratio):
        return model(x)


def close_to(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def force(served, kind="sparse"):
    served._kind = kind  # whatever is faster on the machine that tests


def quiet(*args, **kwargs):
    """Serve where it is no matter whether that pays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        return serve(*args, **kwargs)


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.05])
@pytest.mark.parametrize("batch", [0, 1, 3, 33])
def test_outputs_are_those_of_the_gated_model(model, ratio, batch):
    x = torch.randn(batch, 16)
    expected = at(model, ratio, x)
    with quiet(model, ratio, example_inputs=X) as served:
        for kind in ("sparse", "dense", None):
            force(served, kind)
            assert close_to(model(x), expected)


def test_layers_behind_dropout_and_flattening_are_found_and_the_first_one_is_not(model):
    with quiet(model, 0.1, example_inputs=X) as served:
        whys = {layer.name: layer.why for layer in served.layers}
        text = str(served)
    assert whys["3"] == whys["6"] == ""
    assert "not gated" in whys["0"]
    assert "keep ratio 0.1" in text
    assert all(name in text for name in ("density", "ms dense", "ms sparse", "ms select", "MiB"))


def test_rows_hold_what_was_measured(model):
    with quiet(model, 0.1, example_inputs=X) as served:
        row = next(layer for layer in served.layers if layer.name == "3")
        assert row.density == pytest.approx(0.1, abs=0.01)
        assert row.dense_ms > 0
        assert row.sparse_ms > 0
        assert row.select_ms > 0
        assert row.most_density is not None
        assert served.copied_bytes >= 4 * WIDE * (WIDE + 9)
        assert served.dense_ms > 0 < served.served_ms


def test_the_keep_ratio_moves_while_serving(model):
    with quiet(model, 0.1, example_inputs=X) as served:
        force(served)
        served.keep_ratio = 0.3
        assert served.keep_ratio == 0.3
        assert close_to(model(X), at(model, 0.3))
        with pytest.raises(PolicyError):
            served.keep_ratio = 0
        assert served.keep_ratio == 0.3


@pytest.mark.parametrize("how", ["close", "block", "error", "unwrap"])
def test_the_end_restores_everything_bit_for_bit(how):
    model = net()
    before, keys = model(X), list(model.state_dict())
    layers = [dict(module.__dict__) for module in model.modules()]
    wrap(model)
    served = quiet(model, 0.1, example_inputs=X)
    assert not torch.equal(model(X), before)
    if how == "close":
        served.close()
        served.close()
    elif how == "block":
        with served:
            model(X)
    elif how == "error":
        with pytest.raises(KeyError), served:
            raise KeyError
    else:
        unwrap(model)
    assert served.closed
    assert torch.equal(model(X), before)
    if how != "unwrap":
        unwrap(model)
    assert list(model.state_dict()) == keys
    assert [set(module.__dict__) for module in model.modules()] == [set(each) for each in layers]
    with pytest.raises(ServeError, match="closed"):
        served.keep_ratio = 0.2


def test_keys_stay_while_serving(model):
    keys = list(model.state_dict())
    with quiet(model, 0.1, example_inputs=X):
        assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.weight.data.copy_(torch.randn_like(layer.weight)),
        lambda layer: layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias}),
        lambda layer: layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias}, assign=True),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
        lambda layer: layer.bias.add_(1),
        lambda layer: layer.weight.fill_(math.inf),
    ],
)
def test_changed_weights_are_noticed(model, change):
    with quiet(model, 0.1, example_inputs=X) as served:
        force(served)
        model(X)
        change(model[3])
        y = model(X)
        force(served, "dense")
        assert torch.allclose(y, model(X), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_another_dtype_is_served_as_well(model):
    with quiet(model, 0.1, example_inputs=X) as served:
        force(served)
        model.double()
        y = model(X.double())
        force(served, "dense")
        assert torch.allclose(y, model(X.double()))


def test_copies_are_refused_with_a_reason(model):
    with quiet(model, 0.1, example_inputs=X):
        for copied in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(ServeError, match="close"):
                copied(model)
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def test_gradients_and_training_mode_are_refused(model):
    with quiet(model, 0.1, example_inputs=X):
        with torch.enable_grad(), pytest.raises(ServeError, match="no_grad"):
            model(X)
        with torch.inference_mode():
            model(X)
        model.train()
        with pytest.raises(ServeError, match="eval"):
            model(X)
    model(X)


def test_two_threads_serve_at_once(model):
    inputs = [torch.randn(1, 16) for _ in range(2)]
    expected = [at(model, 0.1, x) for x in inputs]
    wrong = []

    def work(x, y):
        with torch.no_grad():
            wrong.extend(1 for _ in range(60) if not close_to(model(x), y))

    with quiet(model, 0.1, example_inputs=X) as served:
        served._forwards["3"].choices.clear()
        threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_calibration_selects_by_its_thresholds(model):
    calibration = calibrate(model, [torch.randn(64, 16)], (0.3, 0.1))
    with calibration.apply(model, 0.1):
        expected = model(X)
    with quiet(model, 0.1, example_inputs=X, calibration=calibration) as served:
        force(served)
        assert close_to(model(X), expected)
        served.keep_ratio = 0.3
        assert gate_of(model).thresholds == calibration.thresholds(0.3)
    assert gate_of(model).thresholds is None
    with pytest.raises(PolicyError):
        serve(model, 0.5, example_inputs=X, calibration=calibrate(model, [X], (0.1,)))
    other = wrap(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)).eval())
    with pytest.raises(StateError):
        serve(other, 0.1, example_inputs=X, calibration=calibration)


def test_a_sweep_while_serving_visits_its_own_budgets(model):
    expected = at(model, 1.0)
    with quiet(model, 0.1, example_inputs=X) as served:
        force(served)
        with at_keep_ratio(model, 1.0):
            assert close_to(model(X), expected)
        assert served.keep_ratio == 0.1


def test_bad_input_is_said_and_leaves_the_model_alone(model):
    with pytest.raises(NotWrappedError):
        serve(net(), 0.1, example_inputs=X)
    with pytest.raises(ServeError, match="example_inputs"):
        serve(model, 0.1, example_inputs=None)
    with pytest.raises(PolicyError):
        serve(model, 1.5, example_inputs=X)
    with pytest.raises(RuntimeError):
        serve(model, 0.1, example_inputs=torch.randn(1, 5))
    model[2].train()
    with pytest.raises(ServeError, match=r"2 is in training mode.*eval"):
        serve(model, 0.1, example_inputs=X)
    model.eval()
    with quiet(model, 0.1, example_inputs=X), pytest.raises(ServeError, match="already"):
        serve(model, 0.1, example_inputs=X)
    assert not any("forward" in module.__dict__ for module in model if isinstance(module, nn.Linear))


def test_nothing_to_serve_says_what_was_looked_at():
    model = wrap(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8)).eval())
    with pytest.raises(ServeError, match=r"Looked at: 0: .*not gated.*; 3: .*not gated"):
        serve(model, 0.1, example_inputs=X)


def test_where_nothing_pays_there_is_a_warning_and_a_dense_model():
    model = wrap(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)).eval())
    with pytest.warns(UserWarning, match="faster sparse"):
        served = serve(model, 1.0, example_inputs=X)
    assert not any(layer.sparse for layer in served.layers)
    assert "sparse is not faster here" in str(served)


def test_a_layer_with_a_way_of_its_own_stays_dense():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = wrap(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), Own(64, 64), nn.ReLU(), nn.Linear(64, 2)).eval())
    with quiet(model, 0.1, example_inputs=X) as served:
        assert "its own way" in next(layer.why for layer in served.layers if layer.name == "2")


def test_the_function_and_its_room_share_a_name():
    import regimewrap.serve.calibration

    assert callable(regimewrap.serve)
    assert not isinstance(regimewrap.serve, type(regimewrap))


def test_position_scope_serves_tokens():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)).eval()
    model = wrap(layers, RegimePolicy(gate=GatePolicy(scope="position")))
    x = torch.randn(2, 5, 16)
    expected = at(model, 0.1, x)
    with quiet(model, 0.1, example_inputs=x) as served:
        force(served)
        assert close_to(model(x), expected)


def test_a_model_that_is_slower_served_is_told_with_how_much(model):
    with serve(model, 0.1, example_inputs=X) as served:
        served._forwards["3"].choices.clear()
        choice = served._forwards["3"].choice(gate_of(model), 1, WIDE)
        choice.most = 100.0  # a layer that is sparse
        served._shown["3"] = 1, WIDE
        for dense, ms, told in ((2.0, 2.1, False), (2.0, 3.0, True), (0.02, 0.03, False), (2.0, 1.0, False)):
            served.dense_ms, served.served_ms = dense, ms
            assert ("takes 1.50 times as long served at keep ratio 0.1" in slower(served)) == told


def test_no_layer_skips_zeros_where_the_whole_model_is_not_faster_with_it(model):
    with quiet(model, 0.1, example_inputs=X) as served:
        for choice in served._choices():
            choice.most = math.inf
        skip_where_it_pays(served, dense=2.0, sparse=1.0)
        assert any(layer.sparse for layer in served.layers)
        skip_where_it_pays(served, dense=1.0, sparse=1.0)
        assert not any(layer.sparse for layer in served.layers)
        for layer in served.layers:
            alone = "the whole model is no faster" if layer.sparse_ms < layer.dense_ms else "sparse is not faster here"
            assert layer.reason in (layer.why, alone)


def test_a_layer_that_is_faster_alone_but_not_in_its_model_says_so():
    layer = ServedLayer("fc", density=0.1, dense_ms=2.0, sparse_ms=1.5, most_density=0.0)
    assert not layer.sparse
    assert layer.reason == "the whole model is no faster"
    assert ServedLayer("fc", 0.1, 1.5, 2.0, most_density=0.0).reason == "sparse is not faster here"
