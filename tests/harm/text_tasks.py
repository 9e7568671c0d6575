"""Language models over characters, in position scope: one from scratch, and a small Llama trained on.

The text is Python's own: what ``help`` says about the language, and the source of the standard library.
"""

from __future__ import annotations

import copy
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trial import Trial, accuracy

LENGTH, BATCH = 64, 8
_LETTERS = {chr(i): i - 31 for i in range(32, 127)} | {"\n": 96}  # what else there is becomes 0
VOCABULARY = 97


@cache
def _documentation() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(topics.values())


@cache
def _source() -> tuple[str, ...]:
    """Return some files of the standard library, cut into pieces of 8,000 characters."""
    names = ("argparse", "ast", "configparser", "inspect", "subprocess", "tarfile", "typing", "unittest/mock")
    library = Path(sysconfig.get_path("stdlib"))
    text = "".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)
    return tuple(text[i : i + 8000] for i in range(0, len(text), 8000))


def _split(pieces: tuple[str, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return characters to train on, and 500 windows to test on; each piece is on one side."""
    order = torch.randperm(len(pieces), generator=generator).tolist()
    encoded = [torch.tensor([_LETTERS.get(c, 0) for c in pieces[i]]) for i in order]
    test, size = [], 0
    while size < 60_000:
        test.append(encoded.pop())
        size += len(test[-1])
    windows = torch.cat(test).unfold(0, LENGTH + 1, LENGTH)
    return torch.cat(encoded), windows[torch.randperm(len(windows), generator=generator)[:500]]


class Block(nn.Module):
    """Attention to what came before, then a ReLU layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharacterModel(nn.Module):
    """A decoder of a few blocks."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.place.weight[: tokens.shape[1]])))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    made = model(tokens)
    return made if isinstance(made, Tensor) else made.logits


def _trial(model: nn.Module, pieces: tuple[str, ...], updates: int, lr: float, generator: torch.Generator) -> Trial:
    text, test = _split(pieces, generator)

    def loss(model: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
        logits, after = _logits(model, windows[:, :-1]), windows[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), after.flatten()), accuracy(logits, after)

    starts = (torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator) for _ in range(updates))
    return Trial(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01),
        batches=([text[start + torch.arange(LENGTH + 1)]] for start in starts),
        updates=updates,
        loss=loss,
        evaluate=lambda model: loss(model, test)[0].item(),
        unit="nats",
        scope="position",
    )


def character_model(seed: int, *, updates: int = 1000, lr: float = 6e-3) -> Trial:
    torch.manual_seed(seed)
    return _trial(CharacterModel(), _documentation(), updates, lr, torch.Generator().manual_seed(seed))


@cache
def _pretrained(seed: int, updates: int) -> nn.Module:
    """Return a Llama that has read documentation, without any gate: what all arms of a seed are trained on from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )
    trial = _trial(model, _documentation(), updates, 3e-3, torch.Generator().manual_seed(seed))
    for batch in trial.batches:
        trial.loss(model, batch[0])[0].backward()
        trial.optimizer.step()
        trial.optimizer.zero_grad()
    return model


def llama(seed: int, *, updates: int = 500, before: int = 500) -> Trial:
    model = copy.deepcopy(_pretrained(seed, before))
    return _trial(model, _source(), updates, 5e-4, torch.Generator().manual_seed(1000 + seed))


TASKS = {"Character model": character_model, "Llama, fine-tuned": llama}
