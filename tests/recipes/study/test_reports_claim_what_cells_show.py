from __future__ import annotations

import json
import math
from statistics import stdev

import pytest

from regimewrap.errors import DataError
from regimewrap.recipes.study.cells import open_folder, read_cells, trial_cells
from regimewrap.recipes.study.figures import figures
from regimewrap.recipes.study.page import write_study_report
from regimewrap.recipes.study.runner import run_study
from regimewrap.recipes.study.verify import _spread, problems_in, verify_cells

from .conftest import Here, figures_of

MEANS = {"dense": 0.80, "weight-decay": 0.85, "dropout": 0.801, "label-smoothing": 0.80}


def maker(cell, _data):
    noise = {"label-smoothing": 0.03}.get(cell.arm, 0.0002)
    wobble = noise * (1 if (cell.seed + len(cell.arm)) % 2 else -1)
    found = figures_of(cell, MEANS[cell.arm] + wobble)
    found["accuracy"]["0.1"] -= 0.5
    return found | {"bound": 0.25, "corrupted": {"noise": {"1": 0.4, "0.1": 0.2}}, "post-hoc": figures_of(cell, 0.8)}


@pytest.fixture
def folder(digits, tmp_path):
    study = digits.replace(arms=tuple(MEANS), seeds=8)
    run_study(open_folder(study, tmp_path), tmp_path, Here(maker))
    return tmp_path


def test_the_page_says_above_tie_and_unknown_as_interval_and_test_allow(folder):
    page = write_study_report(folder)
    assert "32 of 32 final cells" in page
    assert (
        "At keep ratio 1, above dense: weight-decay; tied with dense: dropout, post-hoc; not told from dense: label"
        in page
    )
    assert "data digits, train_samples 40, steps 4, batch_size 10, lr 0.05. Figures" in page
    assert "Nothing was tuned: each arm has the spec's learning rate and its own default number." in page
    assert "| weight-decay | 8 | 85.0 ± 0.0 ▲ | 35.0 ± 0.0 ▲ |" in page.replace("\N{NO-BREAK SPACE}", " ")
    assert (folder / "report.md").read_text() == page
    assert (folder / "digits.svg").read_text().startswith("<?xml")


def test_the_page_says_what_trials_chose_and_where_that_is_the_edge(digits, tmp_path):
    study = digits.replace(arms=("dense", "dropout"), seeds=1, trials={"count": 3})
    rates = sorted({cells[0].lr for cells in trial_cells(study, "digits", "dense")})
    middle = {"dense": rates[0], "dropout": study.tasks["digits"].training.lr}
    here = Here(lambda cell, _: figures_of(cell, 0.9 if cell.lr == middle[cell.arm] else 0.5))
    run_study(open_folder(study, tmp_path), tmp_path, here)
    page = write_study_report(tmp_path)
    assert f" | {rates[0]:g}* |" in page
    assert " | 0.05, 0.1 |" in page
    assert "a star: the edge of what was tried" in page


def test_a_report_is_the_same_when_it_is_made_again(folder):
    write_study_report(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    write_study_report(folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_cells_of_other_settings_and_broken_files_do_not_count_and_are_named(folder):
    cell = next((folder / "cells").glob("digits_dense_0_*"))
    record = json.loads(cell.read_text())
    record["cell"]["task"]["training"]["lr"] = 0.7
    renamed = type_of(record).file
    (folder / "cells" / renamed).write_text(json.dumps(record))
    (folder / "cells" / "digits_dense_1_broken.json").write_text("{")
    page = write_study_report(folder)
    assert "32 of 32 final cells" in page
    assert "1 cells are of other settings and are not counted." in page
    assert "digits_dense_1_broken.json: it is not whole." in page


def type_of(record):
    from regimewrap.recipes.study.cells import Cell

    return Cell.model_validate(record["cell"])


def test_the_lowest_budget_within_one_percent_and_the_worst_seed_are_those_of_the_figures(digits, folder):
    study = digits.replace(arms=tuple(MEANS), seeds=8)
    ((task,), count) = figures(study, read_cells(folder)[0])
    assert (count.done, count.total, count.others) == (32, 32, 0)
    assert task.lowest_budget("dense") == "1"
    assert task.lowest_budget("post-hoc") == "0.1"
    assert task.worst("label-smoothing") == pytest.approx(0.77)
    assert task.corrupted("dense", "0.1") == pytest.approx(0.2)
    assert task.mean_of("dense", "bound") == 0.25


def test_text_is_compared_by_nats_where_less_is_better(study, tmp_path):
    study = study.replace(tasks={"text": study.tasks["text"]}, seeds=8)
    better = Here(lambda cell, _: figures_of(cell, 0.5 + 0.1 * (cell.arm == "weight-decay") + cell.seed / 1e4))
    run_study(open_folder(study, tmp_path), tmp_path, better)
    ((task,), _) = figures(study, read_cells(tmp_path)[0])
    assert task.outcome == "nll"
    assert task.compared("1")["weight-decay"].verdict(task.equivalent) == "above"
    assert "0.400" in write_study_report(tmp_path)


def test_a_study_without_dense_cells_has_no_report_yet(digits, tmp_path):
    open_folder(digits, tmp_path)
    with pytest.raises(DataError, match="no finished cell of the dense arm yet"):
        write_study_report(tmp_path)


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(DataError, match=r"study.json cannot be read"):
        write_study_report(tmp_path)


@pytest.fixture
def trained(digits, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        run_study(open_folder(digits.replace(arms=("dense",)), tmp_path), tmp_path, pool)
    return tmp_path


def test_cells_made_again_here_are_equal_and_edited_ones_differ(trained):
    checks = list(verify_cells(trained, 5))
    assert [(check.equal, check.alike) for check in checks] == [(True, True)] * 2
    path = next((trained / "cells").glob("digits_dense_0_*"))
    record = json.loads(path.read_text())
    record["figures"]["accuracy"]["1"] += 0.4
    record["made"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    edited = next(check for check in verify_cells(trained, 5) if check.file == path.name)
    assert not edited.alike
    assert "differs by -40.00 points (made with torch 1.0)" in edited.text


def test_other_seeds_that_broke_are_left_out_of_what_seeds_spread(trained):
    first, second = sorted((trained / "cells").glob("digits_dense_*"))
    record = json.loads(first.read_text())
    others = {}
    for seed, value in ((1, math.nan), (2, 0.5), (3, 0.7)):
        figures_there = {"accuracy": {"1": value}}
        others[str(seed)] = {"cell": {**record["cell"], "seed": seed}, "figures": figures_there}
    assert _spread(record, others, "1") == pytest.approx(stdev([0.5, 0.7]))
    second.write_text("{")
    assert len(problems_in(trained)) == 1


def test_nothing_to_verify_is_said(digits, tmp_path):
    open_folder(digits, tmp_path)
    with pytest.raises(DataError, match="no cell that this version"):
        list(verify_cells(tmp_path, 3))
