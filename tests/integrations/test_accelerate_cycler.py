"""AccelerateCycler counts updates as the accelerator does, is in its checkpoints, and refuses what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import POLICY, digest, loss_of, sgd, trace, wrapped
from torch import nn

from regimewrap import RegimeCycler, RegimePolicy, gate_of, unwrap, verify, wrap
from regimewrap.errors import NotWrappedError, SignalError, StateError

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from regimewrap.integrations.accelerate import AccelerateCycler

EVERY_UPDATE = POLICY.replace(cycle={"every": 1, "smoothing": 0.0})


@pytest.fixture(autouse=True)
def _no_state_left() -> Iterator[None]:
    """Accelerate keeps the state of its first accelerator for all that come later in a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _loop(
    updates: int, policy: RegimePolicy = EVERY_UPDATE, kind: str = "modules", micro_batches: int = 1
) -> tuple[Accelerator, nn.Module, AccelerateCycler, list[float]]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model = wrapped(kind, policy)
    model, optimizer = accelerator.prepare(model, sgd(model))
    cycler, losses = AccelerateCycler(accelerator, model), []
    for number in range(updates * micro_batches):
        with accelerator.accumulate(model):
            loss = loss_of(model, number)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            regime = cycler.step(loss)
        losses.append(loss.item())
        assert (regime is None) == ((number + 1) % micro_batches != 0)
    return accelerator, model, cycler, losses


def _saved(folder: Path) -> tuple[Path, dict[str, bytes]]:
    accelerator, *_ = _loop(4)
    accelerator.save_state(str(folder / "saved"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder / "saved", _content(folder / "saved")


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_signal_of_an_update_is_the_mean_loss_of_its_micro_batches():
    _, _, cycler, losses = _loop(5, micro_batches=4)

    means = [sum(losses[first : first + 4]) / 4 for first in range(0, 20, 4)]
    assert [decision.signal for decision in cycler.cycler.history] == pytest.approx(means, rel=1e-6)


def test_the_ratio_is_that_of_the_models_gate():
    _, model, cycler, _ = _loop(1)

    assert cycler.keep_ratio == float(gate_of(model).keep_ratio) == pytest.approx(0.9)


def test_another_value_than_the_loss_can_be_monitored():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(wrapped(policy=EVERY_UPDATE.replace(cycle={"monitor": "accuracy", "mode": "max"})))
    cycler = AccelerateCycler(accelerator, model)

    cycler.step(1.0, accuracy=torch.tensor(0.25))

    assert cycler.cycler.history[0].signal == 0.25
    with pytest.raises(SignalError, match=r"monitors 'accuracy', which is missing"):
        cycler.step(1.0)


def test_a_checkpoint_goes_on_where_it_was_saved(tmp_path: Path):
    accelerator, model, cycler, _ = _loop(7, POLICY)
    accelerator.save_state(str(tmp_path))
    state, weights = cycler.state_dict(), digest(model)
    for _ in range(3):
        cycler.step(9.0)

    accelerator.load_state(str(tmp_path))

    assert cycler.state_dict() == state
    assert digest(model) == weights


def test_the_plain_cycler_can_be_registered_too(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(wrapped())
    cycler = RegimeCycler(model)
    accelerator.register_for_checkpointing(cycler)
    for loss in (3.0, 2.0, 1.0, 0.5, 0.4, 0.3):
        cycler.step(accelerator.reduce(torch.tensor(loss), "mean"))
    accelerator.save_state(str(tmp_path))
    before = trace(cycler)
    for _ in range(5):
        cycler.step(9.0)

    accelerator.load_state(str(tmp_path))

    assert trace(cycler) == before
    assert cycler.updates == 6


@pytest.mark.parametrize(
    ("policy", "kind", "message"),
    [
        (POLICY, "modules", "the state belongs to another policy: cycle.every is 1 in the state and 5 here"),
        (
            EVERY_UPDATE,
            "functions",
            r"the state belongs to another model: it gates 1 activations \(1\); "
            r"this one gates 1 activations \(forward.relu\)",
        ),
    ],
)
def test_a_state_of_another_policy_or_model_is_refused_before_anything_is_loaded(
    policy: RegimePolicy, kind: str, message: str, tmp_path: Path
):
    folder, files = _saved(tmp_path)
    accelerator, model, cycler, _ = _loop(0, policy, kind)
    weights, state = digest(model), cycler.state_dict()

    with pytest.raises(StateError, match=message):
        accelerator.load_state(str(folder))

    assert (digest(model), cycler.state_dict()) == (weights, state)
    assert _content(folder) == files


def _changed(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "version": 7}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "is damaged: .* Resume from an older checkpoint"),
        (lambda path: path.write_bytes(b""), "is damaged: .* Resume from an older checkpoint"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "is damaged: .* Resume from an older checkpoint"),
        (lambda path: path.unlink(), "is not there: the checkpoint was saved without an AccelerateCycler"),
        (
            lambda path: torch.save(_changed(torch.load(path)), path),
            "has version 7; this regimewrap reads",
        ),
        (lambda path: torch.save([1, 2], path), "expected a state from RegimeCycler.state_dict"),
    ],
    ids=["truncated", "empty", "something else", "missing", "another version", "no mapping"],
)
def test_a_damaged_state_is_refused_before_anything_is_loaded(damage: Any, message: str, tmp_path: Path):
    folder, _ = _saved(tmp_path)
    damage(folder / "custom_checkpoint_0.pkl")
    files = _content(folder)
    accelerator, model, cycler, _ = _loop(0)
    weights, state = digest(model), cycler.state_dict()

    with pytest.raises(StateError, match=message) as caught:
        accelerator.load_state(str(folder))

    assert "custom_checkpoint_0.pkl" in str(caught.value)
    assert (digest(model), cycler.state_dict()) == (weights, state)
    assert _content(folder) == files


def test_a_model_that_is_not_wrapped_is_refused():
    with pytest.raises(NotWrappedError, match="Linear is not wrapped"):
        AccelerateCycler(Accelerator(cpu=True), nn.Linear(1, 1))


class CallsGelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.gelu(self.a(x)))


@pytest.mark.parametrize("wrap_first", [True, False])
def test_a_model_prepared_for_bf16_is_gated_and_comes_back(wrap_first: bool) -> None:
    """``prepare`` binds the forward that it finds, before ``wrap`` or after it."""
    model, x = CallsGelu(), torch.randn(4, 8)
    if wrap_first:
        wrap(model)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    if not wrap_first:
        wrap(prepared)
    dense = prepared(x)
    gate_of(prepared).set_keep_ratio(0.1)
    assert not torch.equal(prepared(x), dense)
    assert verify(prepared, x).escaped == ()
    unwrap(prepared)
    assert torch.equal(prepared(x), dense)
