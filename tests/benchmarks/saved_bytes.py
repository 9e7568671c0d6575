"""Bytes kept between forward and backward by a wrapped model, as a multiple of the dense model's.

    python tests/benchmarks/saved_bytes.py [--model wrn|vit|bert] [--batch 4]

Counts every storage that autograd holds after a forward pass, once each, without parameters.
"""

from __future__ import annotations

import copy

import torch
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


def main() -> None:
    options = arguments(__doc__, model="wrn", batch=4)
    model, x = {"wrn": wrn, "vit": vit, "bert": bert}[options.model](options.batch)
    scope = "sample" if options.model == "wrn" else "position"
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
    show(rows, options)


if __name__ == "__main__":
    main()
