"""A training step of a wrapped model as a multiple of the dense model's.

    python tests/benchmarks/step_speed.py [--model wrn|vit|bert] [--batch 16] [--scope network] [--compile 1]

``wrn`` is a WRN-28-4 on 32 by 32 pixels, against the published way in the same place too; ``vit`` a ViT-tiny on 224 by
224 pixels and ``bert`` a BERT of four layers on 128 tokens. Unless told otherwise, the scope is "sample" for the first
and "position" for the others. A step of the wrapped model ends with ``cycler.step``, and no decision is ever due.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from gate_speed import published_way
from paired import Rounds, arguments, show
from torch import Tensor, nn

import regimewrap


class Published(nn.Module):
    """A ReLU and a gate the published way."""

    keep_ratio = 0.2

    def forward(self, x: Tensor) -> Tensor:
        return published_way(x, self.keep_ratio)


def wrn(batch: int) -> tuple[nn.Module, Tensor]:
    from regimewrap.recipes.wide_resnet import WideResNet

    return WideResNet(28, 4), torch.randn(batch, 3, 32, 32)


def vit(batch: int) -> tuple[nn.Module, Tensor]:
    import timm

    return timm.create_model("vit_tiny_patch16_224"), torch.randn(batch, 3, 224, 224)


class Bert(nn.Module):
    """A small BERT that returns one tensor."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
        self.bert = BertModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens).last_hidden_state


def bert(batch: int) -> tuple[nn.Module, Tensor]:
    return Bert(), torch.randint(30000, (batch, 128))


def with_published_gates(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, Published())
    return model


def step(
    model: nn.Module, x: Tensor, compiled: bool, cycler: regimewrap.RegimeCycler | None = None
) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    runner = torch.compile(model) if compiled else model

    def run() -> None:
        optimizer.zero_grad()
        loss = runner(x).square().mean()
        loss.backward()
        optimizer.step()
        if cycler is not None:
            cycler.step(loss)

    return run


def main() -> None:
    options = arguments(__doc__, model="wrn", batch=16, scope="", compile=0, full_share=0.0)
    model, x = {"wrn": wrn, "vit": vit, "bert": bert}[options.model](options.batch)
    scope = options.scope or ("sample" if options.model == "wrn" else "position")
    policy = regimewrap.RegimePolicy.from_yaml(f"gate: {{scope: {scope}}}").replace(cycle={"every": 10**9})
    wrapped = regimewrap.wrap(copy.deepcopy(model), policy)
    contenders = {
        "dense": step(model, x, bool(options.compile)),
        "wrapped": step(wrapped, x, bool(options.compile), regimewrap.RegimeCycler(wrapped)),
    }
    if options.model == "wrn" and not options.compile:
        contenders["published"] = step(with_published_gates(model), x, compiled=False)
    rows = []
    for keep_ratio in (1.0, 0.5, 0.2, 0.05):
        regimewrap.gate_of(wrapped).set_budget(keep_ratio, full_share=options.full_share)
        Published.keep_ratio = keep_ratio
        times = Rounds(contenders, options.rounds)
        row = {
            "model": options.model,
            "batch": options.batch,
            "scope": scope,
            "full share": options.full_share,
            "keep ratio": keep_ratio,
            "dense s": times.seconds("dense"),
        }
        rows.append(row | {f"{name}/dense": times.ratio(name, "dense") for name in contenders if name != "dense"})
    target = "<= 1.05" if options.model == "wrn" and not options.compile else "<= 1.10"
    show(rows, options, by=("model", "batch", "scope", "full share", "keep ratio"), targets={"wrapped/dense": target})


if __name__ == "__main__":
    main()
