"""regimewrap in Hugging Face's Trainer: a tiny language model on generated counting rows. Fifteen seconds on one core.

Needs ``pip install -e '.[transformers]'`` in a checkout. Run it with ``python examples/hf_trainer.py``.
"""

from __future__ import annotations

import tempfile

import torch
from regimewrap.integrations.transformers import RegimeCallback, RegimeTrainerMixin
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import regimewrap
from regimewrap.policy.strategies import PlateauReset

STEPS, ROWS, WORDS = 400, 256, 32
SETTINGS = {"max_steps": STEPS, "learning_rate": 0.01, "logging_steps": 20, "save_strategy": "no", "report_to": "none"}


class RegimeTrainer(RegimeTrainerMixin, Trainer):
    """Hugging Face's trainer, with each update's loss steering the keep ratio, which is logged."""


def main() -> None:
    """Train, then see what the model can do at each budget."""
    torch.manual_seed(0)
    first, stride = torch.randint(0, WORDS, (ROWS, 1)), torch.randint(1, 5, (ROWS, 1))
    rows = (first + stride * torch.arange(12)) % WORDS  # counting by ones, twos, threes or fours
    size = {"vocab_size": WORDS, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))

    policy = regimewrap.RegimePolicy(
        gate=regimewrap.GatePolicy(scope="position"),  # later tokens must not decide what earlier ones keep
        cycle=regimewrap.CyclePolicy(strategy=PlateauReset(decay=0.7, floor=0.1), every=5),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = RegimeTrainer(
            model=model,
            args=TrainingArguments(output_dir=folder, dataloader_pin_memory=False, disable_tqdm=True, **SETTINGS),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[RegimeCallback(policy)],
        )
        trainer.train()

    def evaluate(model: torch.nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            guesses = model(input_ids=rows.to(model.device)).logits[:, 1:-1].argmax(-1).cpu()
        return (guesses == rows[:, 2:]).float().mean().item()

    print(regimewrap.sweep(model, evaluate, keep_ratios=(1.0, 0.5, 0.2, 0.1)))


if __name__ == "__main__":
    main()
