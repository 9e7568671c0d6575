from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from regimewrap.errors import DataError, MissingExtraError, NotWrappedError, PolicyError, WrapError
from regimewrap.gate.gate import gate_of
from regimewrap.measure.sweep import Sweep, sweep
from regimewrap.policy.policy import RegimePolicy
from regimewrap.wrap import wrap

X = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Dropout(0.5)))


def alive(model):
    return model(X).count_nonzero() / X.shape[0]


def test_each_ratio_is_evaluated_at_that_budget_in_eval_mode(model):
    seen = []

    def evaluate(same):
        assert same is model
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        seen.append(float(gate_of(model).keep_ratio))
        return alive(model)

    result = sweep(model, evaluate, (1.0, 0.2, 0.1))

    assert seen == [1.0, 0.2, 0.1] == list(result.values)
    assert result.values[1.0] > 4
    assert result.values[0.2] == 4
    assert result.values[0.1] == 2


def test_the_budgets_of_the_sweep_win_over_the_policys_eval_keep_ratio():
    policy = RegimePolicy().replace(gate={"eval_keep_ratio": 0.5})
    model = wrap(nn.Sequential(nn.Linear(10, 20), nn.ReLU()), policy)

    assert sweep(model, alive, (0.1,)).values[0.1] == 2


def test_modes_and_the_ratio_come_back(model):
    model.train()
    model[2].eval()
    gate_of(model).set_keep_ratio(0.3)

    sweep(model, alive)

    assert (model.training, model[0].training, model[2].training) == (True, True, False)
    assert gate_of(model).keep_ratio == pytest.approx(0.3)
    assert torch.is_grad_enabled()


def test_modes_and_the_ratio_come_back_when_evaluate_fails(model):
    gate_of(model).set_keep_ratio(0.3)

    def evaluate(model):
        model.train()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep(model.eval(), evaluate)

    assert not model.training
    assert gate_of(model).keep_ratio == pytest.approx(0.3)


def test_a_model_that_is_not_wrapped_is_refused():
    with pytest.raises(NotWrappedError):
        sweep(nn.ReLU(), alive)


@pytest.mark.parametrize("ratio", [0, 1.5, -1, float("nan"), "half"])
def test_a_bad_ratio_is_refused_before_anything_is_evaluated(model, ratio):
    with pytest.raises(PolicyError, match="keep_ratios must be a fraction"):
        sweep(model, lambda _: pytest.fail("evaluated"), (0.5, ratio))


def test_no_ratio_is_refused(model):
    with pytest.raises(PolicyError, match="at least one fraction"):
        sweep(model, alive, ())


@pytest.mark.parametrize("value", [None, "good", torch.zeros(2), {"accuracy": 1.0}])
def test_an_evaluate_that_returns_no_number_is_refused(model, value):
    with pytest.raises(WrapError, match="evaluate must return one number"):
        sweep(model, lambda _: value)


def test_a_sweep_prints_as_a_table():
    assert str(Sweep({1.0: 0.93456, 0.05: 11.5})) == ("keep ratio    value\n         1   0.9346\n      0.05  11.5000")


def test_a_sweep_saves_json_and_csv(tmp_path):
    result = Sweep({1.0: 0.75, 0.1: float("nan")})

    result.save(tmp_path / "sweep.json")
    result.save(str(tmp_path / "sweep.csv"))

    assert json.loads((tmp_path / "sweep.json").read_text()) == {"1": 0.75, "0.1": None}
    assert (tmp_path / "sweep.csv").read_text() == "keep_ratio,value\n1.0,0.75\n0.1,nan\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.json"]


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"saved as \.json or \.csv; got '\.txt'"):
        Sweep({1.0: 1.0}).save(tmp_path / "sweep.txt")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DataError, match=r"sweep\.json cannot be written"):
        Sweep({1.0: 1.0}).save(tmp_path / "nowhere" / "sweep.json")


def test_a_sweep_draws_on_the_axes_it_is_given():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ax = figure.subplots()

    assert Sweep({1.0: 0.9, 0.1: 0.5}).plot(ax) is ax
    assert ax.lines[0].get_xydata().tolist() == [[0.1, 0.5], [1.0, 0.9]]


def test_plotting_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(MissingExtraError, match=r"\.\[cli\]"):
        Sweep({1.0: 0.9}).plot()


def test_importing_sweep_loads_no_plotting():
    code = "import sys, regimewrap.measure.sweep; sys.exit('matplotlib' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
