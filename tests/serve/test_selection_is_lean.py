"""A served gate goes the shortest way to its kernel, and keeps what the gate would have kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy
from regimewrap.gate.gate import TopKGate
from regimewrap.serve.lean import LeanSelection

pytest.importorskip("numba")


def _served(policy: RegimePolicy, ratio: float = 0.2, act: type[nn.Module] = nn.ReLU) -> tuple[Any, torch.Tensor, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 512), act(), nn.Linear(512, 512), act(), nn.Linear(512, 8)).eval()
    x = torch.randn(4, 32)
    regimewrap.wrap(model, policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, x, regimewrap.serve(model, ratio, example_inputs=x)


@contextmanager
def _own_ways() -> Iterator[list[str]]:
    """Note each call that goes the gate's own way."""
    seen, own = [], TopKGate._select

    def noted(self: Any, x: Any, site: Any, *more: Any, **keywords: Any) -> Any:
        seen.append(site.name)
        return own(self, x, site, *more, **keywords)

    TopKGate._select = noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        TopKGate._select = own  # type: ignore[method-assign]


@pytest.mark.parametrize("scope", ["sample", "position", "batch"])
@pytest.mark.parametrize("relative_to", ["all", "active"])
@pytest.mark.parametrize("ties", ["keep", "exact"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_it_keeps_what_the_gate_keeps(scope: Any, relative_to: Any, ties: Any, act: Any) -> None:
    policy = RegimePolicy(gate=GatePolicy(scope=scope, relative_to=relative_to, ties=ties))
    model, x, served = _served(policy, act=act)
    gate, site = served.gate, served.gate.sites[0]
    with served, torch.no_grad():
        before = model[0](x)
        for after_relu in (False, True):
            lean = gate._select(before, site, False, after_relu)
            assert torch.equal(lean, TopKGate._select(gate, before, site, False, after_relu))
            assert 0 < (lean != 0).float().mean() < 0.3
        with _own_ways() as seen:
            model(x)
        assert seen == []


def test_what_is_not_plain_goes_the_gates_own_way() -> None:
    model, x, served = _served(RegimePolicy())
    with served, torch.no_grad():
        served.keep_ratio = 1.0
        with _own_ways() as seen:
            assert not (model[1](model[0](x)) == 0).float().mean() > 0.7
        assert seen, "a full budget"
        served.keep_ratio = 0.1
        with _own_ways() as seen, pytest.warns(RuntimeWarning, match="64 samples of one unit"):
            model[1](torch.randn(64))
        assert seen == ["1"], "a tensor without a second dimension, of which the gate warns"


def test_another_model_that_is_sampled_makes_no_difference() -> None:
    model, x, served = _served(RegimePolicy())
    other = regimewrap.gate_of(regimewrap.wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU())))
    other.sample_next()
    with served, torch.no_grad(), _own_ways() as seen:
        model(x)
    other.take_sample()
    assert seen == []


def test_a_new_budget_is_seen_at_once() -> None:
    model, x, served = _served(RegimePolicy())
    with served, torch.no_grad():
        kept = {}
        for ratio in (0.4, 0.1, 0.02):
            served.keep_ratio = ratio
            kept[ratio] = int((model[1](model[0](x)) != 0).sum())
        assert kept[0.4] > kept[0.1] > kept[0.02] > 0
        with regimewrap.at_keep_ratio(model, 0.02):
            assert int((model[1](model[0](x)) != 0).sum()) == kept[0.02]


def test_the_gate_has_its_own_way_back_after_close() -> None:
    _, _, served = _served(RegimePolicy())
    assert isinstance(served.gate._select, LeanSelection)
    served.close()
    assert "_select" not in served.gate.__dict__
