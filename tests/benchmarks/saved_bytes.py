"""Bytes kept between forward and backward as multiples of the dense model's.

    python tests/benchmarks/saved_bytes.py [--model wrn|functions|vit|bert] [--norm rms|batch] [--batch 4]

Counts every storage that the graph of a forward pass holds, once each, without parameters: for the wrapped model as it
is, and for the published way. ``functions`` is a network that calls its ReLUs as
functions, in code that is traced and in code that is rewritten; in ``wrn`` they are modules, and ``norm`` is its norm.
"""

from __future__ import annotations

import copy
import gc
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from paired import arguments, show
from step_speed import Published, bert, vit, with_published_gates, wrn
from torch import Tensor, nn

import regimewrap
from regimewrap.recipes.wide_resnet import WideResNet


def as_it_is() -> AbstractContextManager[None]:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)


def saved_bytes(model: nn.Module, x: Tensor, hooks: AbstractContextManager[None]) -> int:
    with hooks:
        output = model(x)
    storages: dict[int, Tensor] = {}
    nodes, found = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in found:
            continue
        found.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved"):
                held = getattr(node, name)
                for each in held if isinstance(held, list | tuple) else [held]:
                    for tensor in tensors_in(each):
                        storages[tensor.untyped_storage()._cdata] = tensor
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in own)


def tensors_in(saved: Any) -> list[Tensor]:
    """Every tensor that is reached from what a node saved."""
    try:
        objects, tensors, seen = [saved.data], [], set()
    except RuntimeError:  # nothing was saved under this name
        return []
    while objects:
        each = objects.pop()
        if isinstance(each, Tensor):
            tensors.append(each)
        elif id(each) not in seen and (isinstance(each, dict) or type(each).__module__.startswith("regimewrap")):
            seen.add(id(each))
            objects += each.values() if isinstance(each, dict) else gc.get_referents(each)
    return tensors


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
    options = arguments(__doc__, model="wrn", norm="rms", batch=4, full_share=0.0)
    model, x = {"wrn": wrn, "functions": functions, "vit": vit, "bert": bert}[options.model](options.batch)
    if options.model == "wrn":
        model = WideResNet(28, 4, norm=options.norm)
    scope = "sample" if options.model in ("wrn", "functions") else "position"
    policy = regimewrap.RegimePolicy.from_yaml(f"gate: {{scope: {scope}}}")
    wrapped = regimewrap.wrap(copy.deepcopy(model), policy)
    models = {"wrapped": wrapped}
    if options.model == "wrn":
        models["published"] = with_published_gates(model)
    dense = saved_bytes(model, x, as_it_is())
    rows = []
    for keep_ratio in (1.0, 0.5, 0.1):
        regimewrap.gate_of(wrapped).set_budget(keep_ratio, full_share=options.full_share)
        Published.keep_ratio = keep_ratio
        place = {"model": options.model, "full share": options.full_share, "keep ratio": keep_ratio}
        sizes = {f"{name}/dense": saved_bytes(other, x, as_it_is()) / dense for name, other in models.items()}
        rows.append(place | {"dense MB": dense / 1e6} | sizes)
    by = ("model", "full share", "keep ratio")
    target = "<= 1.02" if options.model in ("wrn", "functions") else "<= 1.06"
    show(rows, options, by=by, targets={"wrapped/dense": target})


if __name__ == "__main__":
    main()
