"""A small run of regimewrap.integrations.timm.train for the tests in this folder, and what it leaves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SCRIPT = """\
import sys
from regimewrap.integrations.timm.train import main
sys.exit(main())
"""

POLICY = Path(__file__).with_name("timm_policy.yaml")

# 15 batches in 8 updates an epoch, the last one of a single batch; dropout and augmentation draw random numbers.
SMALL = (
    *("--data", "digits", "--limit", "150", "--test-limit", "40"),
    *("--model", "test_resnet", "--model-kwargs", "drop_rate=0.2", "--augment", "crop-flip"),
    *(
        "--policy",
        str(POLICY),
        "--epochs",
        "3",
        "--batch-size",
        "10",
        "--grad-accum-steps",
        "2",
        "--lr",
        "0.1",
        "--sched-on-updates",
    ),
    *("--model-ema", "--model-ema-decay", "0.9", "--device", "cpu", "--recovery-interval", "3", "--log-interval", "1"),
)
UPDATES = 24


def script_in(folder: Path) -> Path:
    """Write the script that runs the command, and return where it is."""
    script = folder / "train_timm.py"
    script.write_text(SCRIPT)
    return script


def last_of(folder: Path) -> dict[str, Any]:
    """Return the last checkpoint of a run."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded: dict[str, Any] = torch.load(folder / "last.pth.tar", weights_only=True)
    return loaded


def trace_of(folder: Path) -> list[tuple[int, float]]:
    """Return step and keep ratio of each decision of a run."""
    history = last_of(folder)["task_state"]["regimewrap"]["cycler"]["history"]
    return [(each["step"], each["keep_ratio"]) for each in history]


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the paths at which two nested values differ, tensors bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found for key in {**one, **other} for found in differences(one.get(key), other.get(key), f"{path}.{key}")
        ]
    if isinstance(one, Sequence) and not isinstance(one, str) and isinstance(other, Sequence):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} long"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for place, pair in pairs for found in differences(*pair, f"{path}[{place}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    return [] if one == other else [f"{path}: {one!r} and {other!r}"]
