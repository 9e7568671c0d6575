from __future__ import annotations

import io
import math

from rich.console import Console

from regimewrap.report import console_table


def _printed(experiment) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(console_table(experiment))
    return stream.getvalue()


def test_each_arm_has_a_row_with_mean_spread_binding_and_cycles(three_arms):
    row = next(line for line in _printed(three_arms).splitlines() if "loss-reset" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["loss-reset", "93.2 ± 0.4", "91.0 ± 0.4", "60.0 %", "2 to 4"]


def test_budgets_run_from_full_to_smallest(make_experiment):
    text = _printed(make_experiment({"dense": [{"0.1": 0.1, "1.0": 0.9, "0.5": 0.5}]}))
    assert text.index("full budget") < text.index("keep ratio 0.5") < text.index("keep ratio 0.1")


def test_one_seed_has_no_spread_and_says_it_is_one(make_experiment):
    text = _printed(make_experiment({"dense": [{"1.0": 0.9}]}))
    assert "one seed" in " ".join(text.split())
    assert "±" not in text


def test_missing_and_non_finite_figures_are_told_from_numbers(make_experiment):
    text = _printed(
        make_experiment({"dense": [{"1.0": math.nan}, {"1.0": 0.5}], "loss-reset": [{"0.1": 0.5}], "late": []})
    )
    assert "50.0 (1 without a number)" in text
    late = next(line for line in text.splitlines() if "late" in line)
    assert late.count("–") == 4
