from __future__ import annotations

import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from regimewrap.errors import DataError, PolicyError, RegimewrapError
from regimewrap.recipes.study import cells as cells_module
from regimewrap.recipes.study.cells import choice, final_cell, make_file, open_folder, read_cells, trial_cells
from regimewrap.recipes.study.page import write_study_report
from regimewrap.recipes.study.runner import Processes, run_study
from regimewrap.recipes.study.verify import verify_cells

from .conftest import Here, figures_of


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "cells").iterdir())


def test_a_cell_s_name_depends_on_every_setting_and_the_seed(digits):
    base = final_cell(digits, "digits", "dense", 0, 0.05, None)
    others = [
        final_cell(digits, "digits", "dense", 1, 0.05, None),
        final_cell(digits, "digits", "dense", 0, 0.06, None),
        final_cell(digits, "digits", "weight-decay", 0, 0.05, 0.1),
        final_cell(digits, "digits", "weight-decay", 0, 0.05, 0.2),
        base.replace(part="validation"),
        base.replace(budgets=(1.0, 0.2)),
        base.replace(task={"train_samples": 41}),
        final_cell(digits, "digits", "sawtooth", 0, 0.05, None),
        final_cell(digits, "digits", "sawtooth-half", 0, 0.05, None),
    ]
    assert len({cell.file for cell in [base, *others]}) == 10
    assert type(base).model_validate_json(base.model_dump_json()).file == base.file


def test_a_run_makes_what_is_missing_and_nothing_else(study, tmp_path):
    first = Here()
    run_study(open_folder(study, tmp_path), tmp_path, first, at_most=3)
    assert len(first.made) == 3
    second = Here()
    run_study(open_folder(study, tmp_path), tmp_path, second)
    assert len(second.made) == 5
    assert len(names(tmp_path)) == 8
    third = Here()
    assert run_study(open_folder(study, tmp_path), tmp_path, third).done == 0
    assert third.made == []


def test_all_arms_of_a_seed_come_before_the_next_seed(digits, tmp_path):
    here = Here()
    run_study(open_folder(digits, tmp_path), tmp_path, here)
    assert [(cell.seed, cell.arm) for cell in here.made] == [
        (0, "dense"), (0, "weight-decay"), (1, "dense"), (1, "weight-decay"),
    ]  # fmt: skip


def test_trials_choose_the_learning_rate_and_the_knob_on_other_seeds_and_samples(digits, tmp_path):
    digits = digits.replace(trials={"count": 4, "seeds": 2})

    def maker(cell, _):
        return figures_of(cell, accuracy=0.9 if cell.lr == wanted.lr and cell.knob == wanted.knob else 0.5)

    wanted = trial_cells(digits, "digits", "weight-decay")[2][0]
    here = Here(maker)
    run_study(open_folder(digits, tmp_path), tmp_path, here)
    trials = [cell for cell in here.made if cell.part == "validation"]
    finals = [cell for cell in here.made if cell.part == "test"]
    assert (len(trials), len(finals)) == (16, 4)
    assert not {cell.seed for cell in trials} & {cell.seed for cell in finals}
    assert {(cell.lr, cell.knob) for cell in finals if cell.arm == "weight-decay"} == {(wanted.lr, wanted.knob)}


def test_a_trial_that_broke_is_never_chosen(digits):
    digits = digits.replace(trials={"count": 2, "seeds": 1})
    first, second = (cells[0] for cells in trial_cells(digits, "digits", "dense"))
    figures = {first.file: figures_of(first, math.nan), second.file: figures_of(second, 0.1)}
    assert choice(digits, "digits", "dense", figures) == (second.lr, None)
    assert choice(digits, "digits", "dense", {first.file: figures[first.file]}) is None


def test_a_cell_that_fails_is_kept_apart_with_its_error_and_tried_again(digits, tmp_path):
    def breaks(cell, _):
        if cell.arm == "weight-decay" and cell.seed == 0:
            raise ZeroDivisionError("no luck")
        return figures_of(cell)

    progress = run_study(open_folder(digits, tmp_path), tmp_path, Here(breaks))
    (failed,) = (tmp_path / "failed").iterdir()
    assert progress.failed == [failed.name]
    assert "ZeroDivisionError: no luck" in json.loads(failed.read_text())["error"]
    assert len(names(tmp_path)) == 3

    run_study(open_folder(digits, tmp_path), tmp_path, Here())
    assert len(names(tmp_path)) == 4
    assert not failed.exists()


def test_what_the_user_must_mend_stops_the_run(digits, tmp_path):
    def breaks(_cell, _data):
        raise DataError("no such zip")

    with pytest.raises(DataError, match="no such zip"):
        run_study(open_folder(digits, tmp_path), tmp_path, Here(breaks))
    assert names(tmp_path) == []


def test_a_full_disk_loses_no_finished_cell(digits, tmp_path, monkeypatch):
    run_study(open_folder(digits, tmp_path), tmp_path, Here(), at_most=2)

    def full(path, _content):
        raise DataError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr(cells_module, "write_whole", full)
    with pytest.raises(DataError, match="No space left"):
        run_study(digits, tmp_path, Here())
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_text(path.read_text()[:-40]), "not whole"),
        (lambda path: path.write_text("{}"), "not a cell"),
        (lambda path: path.rename(path.with_name("digits_dense_7_0123456789ab.json")), "renamed or edited"),
        (lambda path: path.write_text(path.read_text().replace('"seed": 0', '"seed": 5')), "renamed or edited"),
        (lambda path: path.write_text(path.read_text().replace('"0.1": 0.5', '"0.3": 0.5')), "lacks budgets"),
    ],
)
def test_a_file_that_is_no_whole_cell_is_named_and_left_alone(digits, tmp_path, harm, said):
    run_study(open_folder(digits, tmp_path), tmp_path, Here())
    harm(next((tmp_path / "cells").glob("digits_dense_0_*")))
    before = names(tmp_path)
    with pytest.raises(DataError, match=said):
        run_study(digits, tmp_path, Here())
    assert names(tmp_path) == before
    records, problems = read_cells(tmp_path)
    assert (len(records), len(problems)) == (3, 1)


def test_a_folder_of_another_study_is_refused_with_the_difference(digits, tmp_path):
    run_study(open_folder(digits, tmp_path), tmp_path, Here(), at_most=1)
    with pytest.raises(DataError, match=r"name is 'tiny' in the folder and 'other' here"):
        open_folder(digits.replace(name="other"), tmp_path)
    changed = digits.replace(tasks={"digits": digits.tasks["digits"].replace(train_samples=50)})
    with pytest.raises(DataError, match=r"train_samples is 40 in the folder and 50 here.*--out"):
        open_folder(changed, tmp_path)
    with pytest.raises(DataError, match=r"trials.count is 1 in the folder and 3 here"):
        open_folder(digits.replace(trials={"count": 3}), tmp_path)


def test_a_folder_without_cells_takes_a_spec_that_was_mended(digits, tmp_path):
    open_folder(digits, tmp_path)
    mended = digits.replace(tasks={"digits": digits.tasks["digits"].replace(train_samples=50)})
    assert open_folder(mended, tmp_path) == mended


def test_a_folder_grows_by_arms_seeds_and_tasks(study, digits, tmp_path):
    run_study(open_folder(study, tmp_path), tmp_path, Here(), at_most=1)
    grown = open_folder(digits.replace(arms=("dense", "dropout"), seeds=9), tmp_path)
    assert grown.arms == ("dense", "dropout", "weight-decay")
    assert (grown.seeds, set(grown.tasks)) == (9, {"text", "digits"})


def test_a_folder_without_a_study_is_said_to_be_none(tmp_path):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(DataError, match="holds no study"):
        cells_module.folder_study(tmp_path)


def test_figures_that_are_not_finite_come_back_from_a_file(digits, tmp_path):
    run_study(open_folder(digits, tmp_path), tmp_path, Here(lambda cell, _: figures_of(cell, math.inf)))
    records, _ = read_cells(tmp_path)
    assert all(record["figures"]["accuracy"]["1"] == math.inf for record in records.values())
    assert all(record["figures"]["nll"]["1"] == -math.inf for record in records.values())


def test_two_runs_side_by_side_make_each_cell_once(digits, tmp_path):
    digits = open_folder(digits.replace(seeds=8), tmp_path)
    here = Here(lambda cell, _: time.sleep(0.01) or figures_of(cell))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_study, digits, tmp_path, here) for _ in range(2)]
    assert [run.result().failed for run in runs] == [[], []]
    assert sum(run.result().made for run in runs) == 16
    assert len({cell.file for cell in here.made}) == len(here.made) == 16
    assert len(names(tmp_path)) == 16


def test_a_cell_that_another_process_makes_now_is_left_to_it(digits, tmp_path):
    open_folder(digits, tmp_path)
    cell = final_cell(digits, "digits", "dense", 0, 0.05, None)
    with cells_module._lock(tmp_path / "cells" / cell.file) as mine:
        assert mine
        assert make_file(cell, str(tmp_path), None, lambda cell, _: figures_of(cell)) == "elsewhere"
    assert make_file(cell, str(tmp_path), None, lambda cell, _: figures_of(cell)) == "made"
    assert make_file(cell, str(tmp_path), None, lambda cell, _: figures_of(cell)) == "there"
    assert len(list((tmp_path / "cells").iterdir())) == 1  # the lock has gone


def test_what_another_run_has_not_finished_is_named(digits, tmp_path):
    open_folder(digits, tmp_path)
    cell = final_cell(digits, "digits", "dense", 0, 0.05, None)
    with cells_module._lock(tmp_path / "cells" / cell.file):
        progress = run_study(digits, tmp_path, Here())
    assert (progress.done, progress.made, progress.elsewhere) == (4, 3, [cell.file])


def test_a_network_that_breaks_is_a_cell_like_others(digits, tmp_path):
    broken = digits.replace(tasks={"digits": digits.tasks["digits"].replace(training={"lr": 1e30})})
    with ThreadPoolExecutor(1) as pool:
        progress = run_study(open_folder(broken, tmp_path), tmp_path, pool, arms=["dense"])
    assert (progress.made, progress.failed) == (2, [])
    records, _ = read_cells(tmp_path)
    for record in records.values():
        assert math.isnan(record["figures"]["accuracy"]["1"])
        assert math.isnan(record["figures"]["post-hoc"]["accuracy"]["0.1"])
        assert math.isnan(record["figures"]["corrupted"]["noise"]["1"])
    assert all(check.equal for check in verify_cells(tmp_path, 1))
    assert "(2 broke)" in write_study_report(tmp_path)


def test_an_arm_or_task_that_the_study_lacks_is_named(digits, tmp_path):
    open_folder(digits, tmp_path)
    with pytest.raises(PolicyError, match="no arm called 'zz'"):
        run_study(digits, tmp_path, Here(), arms=["zz"])
    with pytest.raises(PolicyError, match="no task called 'digit'"):
        run_study(digits, tmp_path, Here(), tasks=["digit"])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise DataError("as it was raised")


def test_a_process_that_dies_fails_its_own_call_alone():
    processes = Processes(2)
    try:
        dead, raised, fine = (processes.submit(call) for call in (_die, _raise, os.getpid))
        with pytest.raises(RegimewrapError, match=r"died \(signal 9\)"):
            dead.result(60)
        with pytest.raises(DataError, match="as it was raised"):
            raised.result(60)
        assert fine.result(60) != os.getpid()
    finally:
        processes.stop()


def test_stop_ends_processes_and_begins_no_more():
    processes = Processes(1)
    running, waiting = processes.submit(time.sleep, 60), processes.submit(time.sleep, 60)
    while not processes._running:
        time.sleep(0.01)
    processes.stop()
    with pytest.raises(RegimewrapError, match="died"):
        running.result(30)
    assert waiting.cancelled()
