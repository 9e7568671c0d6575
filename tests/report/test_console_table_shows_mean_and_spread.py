from __future__ import annotations

import math

from regimewrap.report import console_table


def test_each_arm_has_a_row_with_mean_spread_binding_and_cycles(three_arms):
    row = next(line for line in console_table(three_arms).splitlines() if "loss-reset" in line)
    cells = [cell.strip() for cell in row.split("  ") if cell]
    assert cells == ["loss-reset", "93.2 ± 0.4", "91.0 ± 0.4", "60.0 %", "2 to 4"]


def test_budgets_run_from_full_to_smallest(make_experiment):
    text = console_table(make_experiment({"dense": [{"0.1": 0.1, "1.0": 0.9, "0.5": 0.5}]}))
    assert text.index("full budget") < text.index("keep ratio 0.5") < text.index("keep ratio 0.1")


def test_one_seed_has_no_spread_and_says_it_is_one(make_experiment):
    text = console_table(make_experiment({"dense": [{"1.0": 0.9}]}))
    assert "one seed" in " ".join(text.split())
    assert "±" not in text


def test_missing_and_non_finite_figures_are_told_from_numbers(make_experiment):
    text = console_table(
        make_experiment({"dense": [{"1.0": math.nan}, {"1.0": 0.5}], "loss-reset": [{"0.1": 0.5}], "late": []})
    )
    assert "50.0 (1 without a number)" in text
    late = next(line for line in text.splitlines() if "late" in line)
    assert late.count("–") == 4


def test_a_narrow_terminal_gets_blocks_that_keep_every_figure(three_arms):
    wide, narrow = console_table(three_arms), console_table(three_arms, width=40)

    assert max(map(len, narrow.splitlines()[1:])) <= 40
    assert "93.2 ± 0.4" in narrow
    assert sorted(wide.split()) != sorted(narrow.split())  # the names of the columns are repeated
    assert set(wide.split()) - set(narrow.split()) == {"arm"}
