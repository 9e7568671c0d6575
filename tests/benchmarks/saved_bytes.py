"""Bytes kept between forward and backward by a wrapped model, as a multiple of the dense model's.

    python tests/benchmarks/saved_bytes.py [--model wrn|functions|vit|bert] [--batch 4]

Counts every storage that autograd holds after a forward pass, once each, without parameters. ``functions`` is a network
that calls its ReLUs as functions, in code that is traced and in code that is rewritten; in ``wrn`` they are modules.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from paired import arguments, show
from step_speed import Published, bert, vit, with_published_gates, wrn
from torch import Tensor, nn

import regimewrap


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in storages.items() if pointer not in own)


class FunctionRelus(nn.Module):
    """A convolutional network without an activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(64), nn.BatchNorm2d(64)
        self.conv1, self.conv2 = (nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(self.norm2(y).relu())


def functions(batch: int) -> tuple[nn.Module, Tensor]:
    return FunctionRelus(), torch.randn(batch, 3, 32, 32)


def main() -> None:
    options = arguments(__doc__, model="wrn", batch=4)
    model, x = {"wrn": wrn, "functions": functions, "vit": vit, "bert": bert}[options.model](options.batch)
    scope = "sample" if options.model in ("wrn", "functions") else "position"
    policy = regimewrap.RegimePolicy.from_yaml(f"gate: {{scope: {scope}}}")
    models = {"wrapped": regimewrap.wrap(copy.deepcopy(model), policy)}
    if options.model == "wrn":
        models["published"] = with_published_gates(model)
    dense = saved_bytes(model, x)
    rows = []
    for keep_ratio in (1.0, 0.5, 0.1):
        regimewrap.gate_of(models["wrapped"]).set_keep_ratio(keep_ratio)
        Published.keep_ratio = keep_ratio
        row = {"model": options.model, "keep ratio": keep_ratio, "dense MB": dense / 1e6}
        rows.append(row | {f"{name}/dense": saved_bytes(other, x) / dense for name, other in models.items()})
    target = "<= 1.02" if options.model == "wrn" else "<= 1.06"
    show(rows, options, by=("model", "keep ratio"), targets={"wrapped/dense": target})


if __name__ == "__main__":
    main()
