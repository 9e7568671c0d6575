"""A pytest plugin for the peers' own tests: it wraps every model that they make, and skips what wants the network.

In the environment: ``PEER`` is the library; ``WRAPPING`` says how: ``bare`` wraps nothing, ``full`` holds the keep
ratio at 1, ``moving`` at 0.3 or 0.7, model by model; ``RESULTS`` is the file that gets the outcome of each test.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy
from regimewrap.errors import AlreadyWrappedError, NoSitesError

MODE = os.environ.get("WRAPPING", "bare")
#: Eval mode too goes through the gates.
POLICY = RegimePolicy(gate=GatePolicy(eval_keep_ratio="current", scope="position", channel_dim=-1))
OFFLINE = ("offline", "LocalEntryNotFound", "couldn't connect", "Cannot find the requested files", "valid model id")
#: Of what has many thousand variants each so many-th one runs.
EVERY = {"test_custom_models.py": 60}

models: Counter[str] = Counter()
outcomes: dict[str, str] = {}
_ratios = itertools.cycle((0.3, 0.7))


def wrapped(model: Any) -> Any:
    """Wrap a model that was just made; return it."""
    if MODE == "bare" or not isinstance(model, nn.Module):
        return model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            regimewrap.wrap(model, POLICY)
    except NoSitesError:
        models["without activations"] += 1
    except AlreadyWrappedError:
        models["made of wrapped ones"] += 1
    else:
        models["wrapped"] += 1
        if MODE == "moving":
            regimewrap.gate_of(model).set_keep_ratio(next(_ratios))
    return model


def patch_timm() -> None:
    """Wrap what ``create_model`` returns, wherever it is imported from."""
    import timm

    create: Callable[..., Any] = timm.create_model

    @functools.wraps(create)
    def creating(*args: Any, **kwargs: Any) -> Any:
        return wrapped(create(*args, **kwargs))

    for home in (timm, timm.models, timm.models._factory):
        home.create_model = creating


def patch_peft() -> None:
    """Wrap each base model before its adapters come."""
    import peft

    def before(cls: Any) -> None:
        initialise = cls.__init__

        @functools.wraps(initialise)
        def initialising(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
            initialise(self, wrapped(model), *args, **kwargs)

        cls.__init__ = initialising

    before(peft.PeftModel)
    before(peft.PeftMixedModel)


def patch_transformers() -> None:
    """Wrap each whole model where its ``__init__`` ends; models inside one are a part of it."""
    from transformers import PreTrainedModel

    making: list[Any] = []
    initialise, end = PreTrainedModel.__init__, PreTrainedModel.post_init

    @functools.wraps(initialise)
    def initialising(self: Any, *args: Any, **kwargs: Any) -> None:
        making.append(self)
        initialise(self, *args, **kwargs)

    @functools.wraps(end)
    def ending(self: Any) -> None:
        end(self)
        place = next((place for place, each in enumerate(making) if each is self), len(making))
        del making[place:]
        if not making:
            wrapped(self)

    PreTrainedModel.__init__, PreTrainedModel.post_init = initialising, ending


def pytest_configure(config: pytest.Config) -> None:  # noqa: ARG001  pytest's signature
    """Patch the peer that the run is for."""
    {"timm": patch_timm, "peft": patch_peft, "transformers": patch_transformers}[os.environ["PEER"]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take timm's tiny models instead of its thousand others, and few of very many variants."""
    numbers: Counter[str] = Counter()

    def runs(item: Any) -> bool:
        numbers[item.path.name] += 1
        tiny = item.path.name != "test_models.py" or "[test_" in item.name or "-test_" in item.name
        return tiny and numbers[item.path.name] % EVERY.get(item.path.name, 1) == 0

    items[:] = list(filter(runs, items))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Turn a failure for want of the network into a skip."""
    report: Any = yield
    if report.failed and any(each in repr(call.excinfo) + str(report.longrepr) for each in OFFLINE):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "needs the network")
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what became of a test: a failure of any part of it counts."""
    if report.failed or report.nodeid not in outcomes or (report.skipped and outcomes[report.nodeid] == "passed"):
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Write the outcomes down."""
    Path(os.environ["RESULTS"]).write_text(json.dumps({"outcomes": outcomes, "models": models}))
