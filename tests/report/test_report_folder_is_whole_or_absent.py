from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from regimewrap.errors import DataError
from regimewrap.report import write_report
from regimewrap.report.results import Experiment

FILES = {
    "report.html",
    "results.json",
    "policy.yaml",
    "accuracy-by-budget.svg",
    "density-by-budget.svg",
    "milliseconds-by-budget.svg",
    "keep-ratio-trace.svg",
}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_is_made_and_holds_the_page_plots_results_and_policies(three_arms, tmp_path):
    folder = tmp_path / "new" / "folder"
    write_report(three_arms, folder)
    assert _names(folder) == FILES
    for picture in folder.glob("*.svg"):
        assert ElementTree.fromstring(picture.read_text())[0].tag.endswith("style")  # noqa: S314 - our own


def test_results_read_back_as_the_same_experiment(three_arms, tmp_path):
    write_report(three_arms, tmp_path)
    assert Experiment.model_validate_json((tmp_path / "results.json").read_text()) == three_arms


def test_results_with_a_lost_run_read_back(make_experiment, tmp_path):
    write_report(make_experiment({"dense": [{"1.0": math.nan}, {"1.0": 0.5}]}), tmp_path)
    back = Experiment.model_validate_json((tmp_path / "results.json").read_text())
    assert math.isnan(back.runs[0].accuracy["1.0"])


def test_policies_are_one_yaml_document_an_arm(three_arms, tmp_path):
    write_report(three_arms, tmp_path)
    documents = list(yaml.safe_load_all((tmp_path / "policy.yaml").read_text()))
    assert documents == [arm.policy for arm in three_arms.arms]


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"dense": []},
        {"dense": [{}]},
        {"loss-reset": [{"1.0": 0.5}]},
        {"dense": [{"1.0": math.nan}], "loss-reset": [{"0.1": math.inf}]},
        {"dense": [{"1.0": 0.5}, {"0.1": 0.5}], "loss-reset": [{"0.2": 0.5}]},
        {f"arm-{i}": [{"1.0": 0.5}] for i in range(9)},
    ],
    ids=["no arm", "no run", "no ratio", "one arm and seed", "not finite", "ratios that differ", "many arms"],
)
@pytest.mark.parametrize("trace", [True, False])
def test_thin_records_still_make_a_report(make_experiment, tmp_path, figures, trace):
    write_report(make_experiment(figures, trace=trace), tmp_path)
    assert {"report.html", "results.json", "policy.yaml"} <= _names(tmp_path)


def test_writing_again_replaces_everything_and_drops_a_plot_no_longer_drawn(three_arms, make_experiment, tmp_path):
    write_report(three_arms, tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    write_report(make_experiment({"dense": [{"1.0": 0.5}]}, trace=False), tmp_path)
    assert _names(tmp_path) == {"report.html", "results.json", "policy.yaml", "accuracy-by-budget.svg", "mine.txt"}


def test_an_interruption_leaves_the_old_files_whole_and_nothing_besides(three_arms, tmp_path, monkeypatch):
    write_report(three_arms, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupt(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report(three_arms.model_copy(update={"title": "Another"}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_a_file_is_a_clear_error(three_arms, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Cannot write the report to .*file: .*Choose another folder"):
        write_report(three_arms, tmp_path / "file")
