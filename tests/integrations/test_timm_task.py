"""RegimeTask sits on timm's task seam: it sees each update's loss, and its state is in timm's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from regimewrap.integrations.timm import RegimeTask
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn

import regimewrap
from regimewrap.errors import AlreadyWrappedError, PolicyError, StateError

POLICY = regimewrap.RegimePolicy.preset("loss-reset", total_steps=100)
EVERY_SECOND = POLICY.replace(cycle=POLICY.cycle.replace(every=2))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3, in_chans=1)


def _task(policy: regimewrap.RegimePolicy | None = POLICY, **kwargs: Any) -> RegimeTask:
    return RegimeTask(_model(), nn.CrossEntropyLoss(), policy=policy, verbose=False, **kwargs)


def _train(task: ClassificationTask, optimizer: torch.optim.Optimizer, updates: range, micro_batches: int = 1) -> None:
    """Train as timm's train.py does, on data that depend on the update's number alone."""
    task.trainable_module.train()
    for update in updates:
        data = torch.Generator().manual_seed(update)
        for _ in range(micro_batches):
            x, y = torch.randn(4, 1, 16, 16, generator=data), torch.randint(0, 3, (4,), generator=data)
            loss = task(x, y)["loss"]
            loss /= micro_batches
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=update + 1)


def _sgd(task: ClassificationTask) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.trainable_module.parameters(), lr=0.01, momentum=0.9)


def _save(folder: Path, task: ClassificationTask, optimizer: torch.optim.Optimizer) -> str:
    saver = CheckpointSaver(task.trainable_module, optimizer, checkpoint_dir=str(folder), task=task)
    saver.save_checkpoint(0, metric=1.0)
    return str(folder / "last.pth.tar")


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_cycler_gets_the_mean_loss_of_an_updates_micro_batches():
    seen = []

    class Listening(RegimeTask):
        def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: A002
            result = super().forward(input, target)
            seen.append(result["loss"].item())
            return result

    task = Listening(_model(), nn.CrossEntropyLoss(), policy=EVERY_SECOND, verbose=False)
    _train(task, _sgd(task), range(1), micro_batches=3)
    assert task.cycler.state_dict()["pending"] == [pytest.approx(sum(seen) / 3)]


def test_evaluation_leaves_the_cycler_alone():
    task = _task()
    task.trainable_module.eval()
    task(torch.randn(2, 1, 16, 16), torch.tensor([0, 1]))
    _train(task, _sgd(task), range(1))
    assert task.cycler.updates == 1


def test_it_knows_the_accuracy_also_of_mixed_targets():
    policy = regimewrap.RegimePolicy.preset("accuracy-reset", total_steps=100).replace(cycle={"every": 3})
    task = _task(policy)
    x, hard = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    soft = nn.functional.one_hot(hard, 3).float() * 0.9 + 0.1 / 3
    for target in (hard, soft):
        task(x, target)
        task.update_ema()
    one, other = task.cycler.state_dict()["pending"]
    assert one in (0, 0.25, 0.5, 0.75, 1)
    assert one == other


def test_a_policy_that_watches_something_else_is_refused():
    policy = POLICY.replace(cycle=POLICY.cycle.replace(monitor="top5"))
    with pytest.raises(PolicyError, match="RegimeTask knows loss and accuracy; the policy monitors 'top5'"):
        _task(policy)


def test_a_presets_name_is_scaled_to_the_run():
    assert _task("loss-reset", total_steps=100).cycler.policy == POLICY.cycle
    with pytest.raises(PolicyError, match="pass total_steps=N"):
        _task("loss-reset")
    assert _task(None).cycler.policy.strategy.kind == "spread"


def test_a_wrapped_model_keeps_its_policy():
    model = regimewrap.wrap(_model(), EVERY_SECOND)
    assert RegimeTask(model, nn.CrossEntropyLoss(), verbose=False).cycler.policy.every == 2
    with pytest.raises(AlreadyWrappedError):
        RegimeTask(model, nn.CrossEntropyLoss(), policy=POLICY, verbose=False)


def test_the_averaged_model_follows_the_ratio():
    task = _task(regimewrap.RegimePolicy.preset("sawtooth", total_steps=100))
    averaged = task.setup_ema(decay=0.5)
    _train(task, _sgd(task), range(5))
    assert float(regimewrap.gate_of(averaged).keep_ratio) == task.cycler.keep_ratio < 1
    assert averaged.module.state_dict().keys() == _model().state_dict().keys()


@pytest.mark.parametrize("stop", [4, 5], ids=["at a decision", "between two decisions"])
def test_a_run_resumed_from_timms_checkpoint_is_the_run_that_was_not_stopped(stop: int, tmp_path: Path):
    straight = _task(EVERY_SECOND)
    _train(straight, _sgd(straight), range(16))

    first = _task(EVERY_SECOND)
    optimizer = _sgd(first)
    _train(first, optimizer, range(stop))
    checkpoint = _save(tmp_path, first, optimizer)
    resumed = _task(EVERY_SECOND)
    optimizer = _sgd(resumed)
    resume_task_checkpoint(resumed, checkpoint, optimizer, log_info=False)
    _train(resumed, optimizer, range(stop, 16))

    assert resumed.cycler.history == straight.cycler.history
    assert len({each.keep_ratio for each in straight.cycler.history}) > 1
    assert _same_weights(resumed.trainable_module, straight.trainable_module)


def test_with_the_policy_dense_training_is_bit_equal_to_timms_own_task():
    dense = _task(regimewrap.RegimePolicy.preset("dense"))
    bare = ClassificationTask(_model(), nn.CrossEntropyLoss(), verbose=False)
    for task in (dense, bare):
        task.setup_ema(decay=0.5)
        _train(task, _sgd(task), range(5), micro_batches=2)
    assert _same_weights(dense.trainable_module, bare.trainable_module)
    assert _same_weights(dense.get_trainable_module(ema=True), bare.get_trainable_module(ema=True))


def test_a_checkpoint_made_without_regimewrap_loads_and_the_cycle_begins(tmp_path: Path):
    bare = ClassificationTask(_model(), nn.CrossEntropyLoss(), verbose=False)
    optimizer = _sgd(bare)
    _train(bare, optimizer, range(3))
    task = _task()
    resume_task_checkpoint(task, _save(tmp_path, bare, optimizer), log_info=False)
    assert _same_weights(task.trainable_module, bare.trainable_module)
    assert task.cycler.updates == 0


def test_a_checkpoint_made_with_it_loads_into_timms_own_task(tmp_path: Path):
    task = _task()
    optimizer = _sgd(task)
    _train(task, optimizer, range(3))
    bare = ClassificationTask(_model(), nn.CrossEntropyLoss(), verbose=False)
    resume_task_checkpoint(bare, _save(tmp_path, task, optimizer), _sgd(bare), log_info=False)
    assert _same_weights(task.trainable_module, bare.trainable_module)


@pytest.mark.parametrize(
    ("other", "sides"),
    [
        (POLICY.replace(gate={"scope": "batch"}), "gate.scope is 'sample' in the state and 'batch' here"),
        (POLICY.replace(sites={"exclude": ["layer1*"]}), "the state belongs to another model: it gates"),
        (EVERY_SECOND, "cycle.every is 1 in the state and 2 here"),
    ],
    ids=["gate", "sites", "cycle"],
)
def test_a_state_of_another_policy_is_refused_and_nothing_is_loaded(
    other: regimewrap.RegimePolicy, sides: str, tmp_path: Path
):
    task = _task()
    optimizer = _sgd(task)
    _train(task, optimizer, range(3))
    checkpoint = _save(tmp_path, task, optimizer)
    fresh = _task(other)
    with pytest.raises(StateError, match=sides):
        resume_task_checkpoint(fresh, checkpoint, log_info=False)
    assert _same_weights(fresh.trainable_module, _model())
    assert fresh.cycler.updates == 0


def test_weights_that_do_not_fit_leave_the_cycle_where_it_was():
    task = _task()
    optimizer = _sgd(task)
    _train(task, optimizer, range(3))
    saved = task.get_checkpoint_state()
    saved["state_dict"].popitem()
    fresh = _task()
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    assert fresh.cycler.updates == 0
    assert float(regimewrap.gate_of(fresh.trainable_module).keep_ratio) == 1


def test_it_compiles(tmp_path: Path):
    task, eager = _task(), _task()
    task.compile(backend="eager")
    for each in (task, eager):
        _train(each, _sgd(each), range(6))
    assert task.cycler.history == eager.cycler.history
    optimizer = _sgd(task)
    resume_task_checkpoint(eager, _save(tmp_path, task, optimizer), log_info=False)
