"""Nothing asks a device for a value between decisions: not the gate, not its gradient, not a watch, not the cycler.

Without a GPU the networks run on tensors that hold no values: whoever asks for a value, or for a shape that depends on
one, gets an exception. With a GPU torch itself takes waiting for an error.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from specimens import WRITINGS, bare
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import regimewrap
from regimewrap import GatePolicy, RegimeCycler, RegimePolicy, TopKGate, gate_of, watch

GATES = {
    "sample": GatePolicy(scope="sample", channel_dim=1),
    "position": GatePolicy(scope="position", channel_dim=1),
    "batch": GatePolicy(scope="batch"),
    "network": GatePolicy(scope="network"),
    "active units": GatePolicy(relative_to="active"),
    "exact ties": GatePolicy(ties="exact"),
    "straight through": GatePolicy(gradient="straight_through"),
    "by value": GatePolicy(score="value"),
}


def gated(make, gate: GatePolicy, device: str) -> torch.nn.Module:
    model = regimewrap.wrap(bare(make), RegimePolicy(gate=gate)).train().to(device)
    gate_of(model).set_keep_ratio(0.3)
    return model


def train(model: torch.nn.Module, device: str) -> tuple[torch.Tensor, regimewrap.Watch]:
    """Take two training steps, one of them watched, since that moves a ReLU's gate behind it."""
    x = torch.randn(4, 3, 8, 8, device=device)
    with watch(model) as seen:
        model(x).square().mean().backward()
    loss = model(x).square().mean()
    loss.backward()
    return loss, seen


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("make", WRITINGS)
def test_training_works_on_tensors_without_values(make, gate):
    _, seen = train(gated(make, GATES[gate], "meta"), "meta")

    with pytest.raises(RuntimeError):  # this is where a watch waits, and how any other wait would have shown
        _ = seen.density


@pytest.mark.parametrize("preset", ["loss-reset", "accuracy-reset", "sawtooth"])
def test_the_cycler_reads_no_signal_before_a_decision_is_due(preset):
    cycler = RegimeCycler(TopKGate(RegimePolicy.preset(preset).replace(cycle={"every": 4, "scaled_to": None})))
    with FakeTensorMode():
        signal = torch.empty((), device="cuda")
    for _ in range(3):
        cycler.step(signal, accuracy=signal)
    if cycler.policy.strategy.needs_signal:
        with pytest.raises(DataDependentOutputException):
            cycler.step(signal, accuracy=signal)


@pytest.fixture
def waiting_is_an_error():
    """A block in which torch raises whenever the host waits for the GPU."""

    @contextlib.contextmanager
    def block():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return block


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("make", WRITINGS)
def test_no_step_waits_for_the_gpu(make, gate, waiting_is_an_error):
    model = gated(make, GATES[gate], "cuda")
    cycler = RegimeCycler(TopKGate(RegimePolicy().replace(cycle={"every": 100})))
    train(model, "cuda")  # the first call of a kernel compiles and loads it, which may wait

    with waiting_is_an_error():
        loss, seen = train(model, "cuda")
        cycler.step(loss)

    assert 0 < seen.density < 1
    with pytest.raises(RuntimeError, match="synchronizing"), waiting_is_an_error():
        _ = seen.density
