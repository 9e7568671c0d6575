"""A ``Calibration`` on a model, on paper and in a file."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from regimewrap import Calibration, GatePolicy, RegimePolicy, SitePolicy, at_keep_ratio, calibrate, gate_of, sweep, wrap
from regimewrap.errors import DataError, NotWrappedError, PolicyError, StateError, WrapError
from regimewrap.serve.calibration import CalibrationReport, Comparison

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
RATIOS = (0.5, 0.2)


def net(hidden=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 16), nn.GELU())


def wrapped(sites=None, **gate):
    return wrap(net(), RegimePolicy(gate=GatePolicy(**gate), sites=sites or SitePolicy()))


@pytest.fixture
def model():
    return wrapped()


@pytest.fixture
def calibration(model):
    return calibrate(model, [X], RATIOS)


def size(model):
    return float(model(X).abs().mean())


def test_a_handle_takes_the_thresholds_back(model, calibration):
    dense = model.eval()(X)

    handle = calibration.apply(model, 0.2)
    assert gate_of(model).thresholds == calibration.thresholds(0.2)
    assert not torch.equal(model(X), dense)
    handle.remove()

    assert torch.equal(model(X), dense)


def test_blocks_nest_and_end_with_an_error_too(model, calibration):
    with pytest.raises(KeyError), calibration.apply(model, 0.5):  # noqa: PT012  the blocks are the point
        with calibration.apply(model, 0.2):
            assert gate_of(model).thresholds == calibration.thresholds(0.2)
        assert gate_of(model).thresholds == calibration.thresholds(0.5)
        raise KeyError
    assert gate_of(model).thresholds is None


def test_a_sweep_selects_while_thresholds_are_in_force(model, calibration):
    selected = sweep(model, size, (1.0, 0.2))
    with calibration.apply(model, 0.2):
        assert sweep(model, size, (1.0, 0.2)) == selected


def test_a_wrapper_around_the_model_will_do(model, calibration):
    outer = nn.Sequential(model)
    with calibration.apply(outer, 0.2):
        assert gate_of(model).thresholds


def test_a_report_compares_thresholds_with_the_selection(model, calibration):
    model.train()
    report = calibration.report(model, size, (1.0, 0.5, 0.2))

    assert [row.keep_ratio for row in report.rows] == [1.0, 0.5, 0.2]
    dense, _, small = report.rows
    assert (dense.density_fixed, dense.fixed, dense.difference) == (dense.density_selected, dense.selected, 0.0)
    assert small.density_fixed == pytest.approx(small.density_selected, rel=0.05)
    assert small.difference == small.fixed - small.selected != 0.0
    with torch.no_grad():
        with at_keep_ratio(model.eval(), 0.2):
            assert small.selected == size(model)
        with calibration.apply(model, 0.2):
            assert small.fixed == size(model)


def test_a_report_leaves_the_model_as_it_was(model, calibration):
    model.train()
    model[1].eval()
    gate_of(model).set_keep_ratio(0.7)
    with pytest.raises(ZeroDivisionError):
        calibration.report(model, lambda _: 1 / 0, (0.5,))

    gate = gate_of(model)
    assert (model.training, model[1].training) == (True, False)
    assert (float(gate.keep_ratio), gate.thresholds, gate.observers) == (0.7, None, [])


@pytest.mark.parametrize("ratios", [(), (0.0,), (0.5, 0.1)])
def test_a_report_at_impossible_budgets_is_refused_before_anything_runs(model, calibration, ratios):
    with pytest.raises(PolicyError):
        calibration.report(model, lambda _: pytest.fail("it ran"), ratios)


def test_a_report_needs_a_number(model, calibration):
    with pytest.raises(WrapError, match="evaluate must return one number"):
        calibration.report(model, lambda _: "good", (0.5,))


def test_a_report_prints_and_saves(tmp_path):
    report = CalibrationReport((Comparison(0.2, 0.199, 0.201, 0.9, float("nan")), Comparison(0.1, 0.1, 0.1, 0.5, 0.25)))

    assert str(report).splitlines() == [
        "keep ratio  density selected  density fixed  value selected  value fixed  difference",
        "0.2                   0.1990         0.2010          0.9000          nan        +nan",
        "0.1                   0.1000         0.1000          0.5000       0.2500     -0.2500",
    ]
    report.save(tmp_path / "report.csv")
    report.save(tmp_path / "report.json")
    head = "keep_ratio,density_selected,density_fixed,selected,fixed,difference"
    assert (tmp_path / "report.csv").read_text().splitlines()[::2] == [head, "0.1,0.1,0.1,0.5,0.25,-0.25"]
    rows = json.loads((tmp_path / "report.json").read_text())
    assert rows[0]["fixed"] is None
    assert rows[1] == dict(zip(head.split(","), [0.1, 0.1, 0.1, 0.5, 0.25, -0.25], strict=True))
    with pytest.raises(DataError, match=r"a report is saved as \.json or \.csv"):
        report.save(tmp_path / "report.txt")


def test_a_calibration_prints_as_a_table(calibration):
    head, columns, *rows = str(calibration).splitlines()
    assert head == "Sequential: thresholds by keep ratio"
    assert columns.split() == ["site", "0.5", "0.2"]
    first = calibration.sites[0].thresholds
    assert [row.split()[0] for row in rows] == ["1", "3"]
    assert rows[0].split()[1:] == [f"{first[1]:.4g}", f"{first[0]:.4g}"]


def test_a_file_is_plain_json_and_comes_back_equal(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.json")

    assert json.loads((tmp_path / "calibration.json").read_text())["keep_ratios"] == [0.2, 0.5]
    assert Calibration.load(str(tmp_path / "calibration.json")) == calibration
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: wrapped(scope="position"), "gate.scope: sample / position"),
        (lambda: wrapped(score="value"), "gate.score: magnitude / value"),
        (lambda: wrapped(relative_to="active"), "gate.relative_to: all / active"),
        (lambda: wrapped(ties="exact"), "gate.ties: keep / exact"),
        (
            lambda: wrapped(SitePolicy(multipliers={"1": 0.5})),
            "site 1: multiplier 1, channel dimension None / multiplier 0.5, channel dimension None",
        ),
        (lambda: wrapped(SitePolicy(exclude=("3",))), "no such site"),
        (lambda: wrap(nn.Sequential(net())), "site 0.1: no such site / multiplier 1"),
    ],
)
def test_another_model_or_policy_is_refused_with_both_sides_shown(calibration, other, message):
    other = other()
    for use in (lambda: calibration.apply(other, 0.2), lambda: calibration.report(other, size, (0.2,))):
        with pytest.raises(StateError) as caught:
            use()
        assert message in str(caught.value)
        assert "calibrated / here" in str(caught.value)
    assert gate_of(other).thresholds is None


def test_settings_that_thresholds_do_not_depend_on_may_differ(calibration):
    model = wrapped(gradient="straight_through", eval_keep_ratio=0.5)
    calibration.apply(model, 0.2)
    assert gate_of(model).thresholds == calibration.thresholds(0.2)


def test_a_bare_model_is_refused(calibration):
    with pytest.raises(NotWrappedError):
        calibration.apply(net(), 0.2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "Invalid JSON"),
        (lambda _: "[]", "Input should be an object"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version: Input should be 1"),
        (lambda text: text.replace('"scope"', '"scoop"'), "scope: Field required"),
        (lambda text: text.replace("0.5", "1.5"), r"keep_ratios must rise, within \(0, 1\]"),
        (lambda text: text.replace("0.2,", ""), "1 has 2 thresholds for 1 keep ratios"),
        (lambda text: text.replace("0.5\n", "NaN\n"), "keep_ratios"),
    ],
)
def test_a_damaged_file_is_refused(calibration, tmp_path, damage, message):
    path = tmp_path / "calibration.json"
    calibration.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(StateError, match=message):
        Calibration.load(path)


def test_a_file_that_is_not_there_or_cannot_be_written_is_named(calibration, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        Calibration.load(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match=r"calibration\.json cannot be written"):
        calibration.save(tmp_path / "nowhere" / "calibration.json")
