"""The zoo's report, and a path so that its tests can import ``zoo_checks``, which importmode=importlib would not."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    # Several would add numbers up in another order from run to run.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if dict(request.node.user_properties).get("parameters", 0) > 1_000_000:
        gc.collect()  # it takes longer than a tiny model, and lets a large one go


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[Mapping[str, object]], None]:
    """Take a model's figures into the report (and into ``--junitxml``)."""

    def take(figures: Mapping[str, object]) -> None:
        for name, value in figures.items():
            record_property(name, value)

    return take


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add a row for each test to the file that ``ZOO_REPORT`` names: name, result, seconds, figures, reason."""
    result: Any = yield
    path = os.environ.get("ZOO_REPORT")
    if path and call.when == "call":
        reason = getattr(result, "wasxfail", "") or str(call.excinfo.value if call.excinfo else "").partition("\n")[0]
        outcome = "xfailed" if hasattr(result, "wasxfail") and result.skipped else result.outcome
        figures = " ".join(f"{name}={value}" for name, value in item.user_properties)
        with Path(path).open("a") as file:
            print(item.name, outcome, f"{call.duration:.1f}", figures, reason, sep="\t", file=file)
    return result
