"""One training run with Hugging Face's Trainer, as the tests start it: ``transformers_run.py FOLDER OPTIONS``.

OPTIONS is a JSON mapping, see ``DEFAULTS``. It goes on from the folder's last whole checkpoint, prints a line at every
update, and leaves what came of it in ``result-RANK.json`` there.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from regimewrap.integrations.transformers import RegimeCallback, RegimeTrainerMixin, last_checkpoint
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from regimewrap import CyclePolicy, GatePolicy, RegimePolicy
from regimewrap.policy.strategies import Dense, EmaReset

DEFAULTS: dict[str, Any] = {
    "steps": 60,
    "adapter": "mixin",  # or "callback" or None
    "model": "gpt2",  # or "mlp", which is quicker
    "strategy": "ema-reset",  # or "dense"
    "resume": True,
    "nan_on_rank_1": False,
    "args": {},  # of TrainingArguments
}
STRATEGIES = {"ema-reset": EmaReset(decay=0.8, tolerance=0.05, cooldown=1), "dense": Dense()}


def policy(strategy: str) -> RegimePolicy:
    cycle = CyclePolicy(strategy=STRATEGIES[strategy], every=4, smoothing=0.5)
    return RegimePolicy(gate=GatePolicy(scope="position"), cycle=cycle)


def tiny_model(**changes: Any) -> GPT2LMHeadModel:
    """Return a causal language model, with its default dropout: an exact resume has to go on with that too."""
    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **size | changes))


class Perceptron(nn.Module):
    """A model of no particular library, as the trainer takes it too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(input_ids / 32)
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 0] // 16), "logits": logits}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return tiny_model() if name == "gpt2" else Perceptron()


def tokens(rows: int = 64, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    numbers = torch.randint(0, 32, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in numbers]


def arguments(folder: str | Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 5,
        "save_steps": 7,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings | changes)


class Progress(TrainerCallback):
    """Prints a line at each update."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control, kwargs
        print(state.global_step, flush=True)  # noqa: T201 - a test waits for it


class NanOnRank1:
    """A trainer whose rank 1 reports a loss that is not a number at every fifth update."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        return loss * float("nan") if self.args.process_index == 1 and self.state.global_step % 5 == 0 else loss


def main(folder: Path, options: dict[str, Any]) -> None:
    options = DEFAULTS | options
    callback = RegimeCallback(policy(options["strategy"]))
    bases = [RegimeTrainerMixin] if options["adapter"] == "mixin" else []
    bases += [NanOnRank1] if options["nan_on_rank_1"] else []
    trainer = type("TestTrainer", (*bases, Trainer), {})(
        model=model_of(options["model"]),
        args=arguments(folder, max_steps=options["steps"], **options["args"]),
        train_dataset=tokens(),
        callbacks=[Progress(), *([callback] if options["adapter"] else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if options["resume"] else None)
    weights = b"".join(each.detach().numpy().tobytes() for each in trainer.model.state_dict().values())
    result: dict[str, Any] = {
        "weights": hashlib.sha256(weights).hexdigest(),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    if options["adapter"]:
        cycler = callback.cycler
        result["trace"] = [[each.step, each.keep_ratio.hex(), each.event, each.signal] for each in cycler.history]
        result["state"] = cycler.state_dict()
    (folder / f"result-{trainer.args.process_index}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    disable_progress_bar()
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
