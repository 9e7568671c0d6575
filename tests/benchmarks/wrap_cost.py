"""What ``wrap`` costs once, and a wrapped model at keep ratio 1 each time, against the bare model in the same run.

python tests/benchmarks/wrap_cost.py
"""

from __future__ import annotations

import time

import torch
import torchvision
from paired import Rounds, arguments, show

import regimewrap


def wrap_row(name: str) -> dict[str, object]:
    """Time the first wrap of a model's classes in this process, and a second one, which finds them known."""
    seconds = []
    for _ in range(2):
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        start = time.process_time()
        regimewrap.wrap(model)
        seconds.append(time.process_time() - start)
    sites = len(regimewrap.gate_of(model).sites)
    return {
        "model": name,
        "what": "wrap",
        "sites": sites,
        "first_seconds": seconds[0],
        "second_ms_a_site": 1000 * seconds[1] / sites,
    }


def step_row(name: str, size: int, rounds: int) -> dict[str, object]:
    """Time a training step of the wrapped model at keep ratio 1 over one of the bare model."""
    bare, wrapped = torchvision.models.get_model(name), regimewrap.wrap(torchvision.models.get_model(name))
    x = torch.randn(4, 3, size, size)
    timed = Rounds({"bare": lambda: bare(x).sum().backward(), "wrapped": lambda: wrapped(x).sum().backward()}, rounds)
    return {"model": name, "what": "step at keep ratio 1", "wrapped_over_bare": timed.ratio("wrapped", "bare")}


if __name__ == "__main__":
    options = arguments(__doc__)
    rows = [wrap_row(name) for name in ("vit_l_16", "resnet152", "densenet121", "efficientnet_b0")]
    targets = {"first_seconds": "<= 0.5", "second_ms_a_site": "<= 1"}
    show(rows, options, by=("model", "what", "sites"), targets=targets)
    rows = [step_row(name, size, options.rounds) for name, size in (("resnet50", 64), ("densenet121", 64))]
    show(rows, options, by=("model", "what"), targets={"wrapped_over_bare": "<= 1.02"})
