"""Hugging Face's Trainer on several ranks: whatever each of them sees, all hold one ratio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import preload, run, under

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SCRIPT = Path(__file__).with_name("transformers_run.py")
QUICK = {"save_strategy": "no", "logging_steps": 200, "optim": "sgd", "max_grad_norm": 0}
preload("transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "accelerate")


def _results(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_other_data_and_a_nan_on_one_hold_the_same_ratios_for_1000_steps(ranks: int, tmp_path: Path):
    options = {"steps": 1000, "model": "mlp", "nan_on_rank_1": True, "args": QUICK}
    run(SCRIPT, tmp_path, json.dumps(options), ranks=ranks, timeout=400)

    first, *others = _results(tmp_path, ranks)
    assert len(first["trace"]) == 250
    assert {event for _, _, event, _ in first["trace"]} == {"compress", "hold", "reset"}
    assert [each["trace"] for each in others] == [first["trace"]] * (ranks - 1)
    assert [each["state"]["state"]["skipped"] for each in others] == [200, *[0] * (ranks - 2)]
    assert len({each["logs"][0]["density"] for each in (first, *others)}) > 1  # they did see other data


def test_two_processes_under_accelerate_launch_hold_the_ratios_that_the_logs_steer(tmp_path: Path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    options = {"steps": 40, "model": "mlp", "adapter": "callback", "nan_on_rank_1": True, "args": QUICK}
    under([*launch, "--mixed_precision=no", "--dynamo_backend=no"], SCRIPT, tmp_path, json.dumps(options))

    first, second = _results(tmp_path, 2)
    assert first["trace"] == second["trace"]
    assert {event for _, _, event, _ in first["trace"]} == {"compress", "hold", "reset"}
    assert first["state"] == second["state"]
