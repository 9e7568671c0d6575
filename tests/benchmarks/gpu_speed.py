"""On a GPU: ReLU and gate against a ReLU and against the published method's way; a WRN-28-4's step against the dense.

    python tests/benchmarks/gpu_speed.py [--batch 128] [--steps 1]

Times of operations are those of the device alone (``triton.testing.do_bench_cudagraph``, which replays a recording), so
what the host needs to launch them is not in them; ``host us`` is that, for a small tensor, forward only. ``copy`` reads
and writes the tensor once, the least that any gate could. Rows are per sample at the three shapes of a WRN-28-4 and at
a ResNet-50's first on 224 by 224 pixels, per token for ``tokens``. ``both`` is forward and backward. A step is timed as
the user would see it, launches included.
"""

# ruff: noqa: B023  each lambda is timed at once
from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable

import torch
from gate_speed import published_way
from paired import arguments, show
from step_speed import step, wrn
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

import regimewrap
from regimewrap.topk.op import topk_gate

relu_gate = functools.partial(topk_gate, after_relu=True)

SHAPES = {
    "wrn 64x32x32": (64, 32, 32),
    "wrn 128x16x16": (128, 16, 16),
    "wrn 256x8x8": (256, 8, 8),
    "tokens 197x768": (197, 768),
    "resnet 64x112x112": (64, 112, 112),
}


def device_ms(run: Callable[[], object]) -> float:
    return float(do_bench_cudagraph(run, rep=20, return_mode="median"))


def host_us(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(300):
        run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / 300 * 1e6


def kernel_rows(batch: int, dtype: torch.dtype) -> list[dict[str, object]]:
    rows = []
    for name, shape in SHAPES.items():
        x = torch.randn(batch, *shape, device="cuda", dtype=dtype)
        upstream, out = torch.randn_like(x), torch.empty_like(x)
        rule = {"scope": "position", "channel_dim": -1} if name.startswith("tokens") else {"scope": "sample"}
        flat = x.flatten(0, 1) if name.startswith("tokens") else x
        for keep_ratio in (0.5, 0.2, 0.05):
            r = torch.tensor(keep_ratio, dtype=torch.float64)
            leaf = x.clone().requires_grad_()
            with torch.no_grad():
                copied, relu = device_ms(lambda: out.copy_(x)), device_ms(lambda: torch.relu(x))
                gate = device_ms(lambda: relu_gate(x, r, **rule))
                behind = device_ms(lambda: topk_gate(x, r, **rule))
                published = device_ms(lambda: published_way(flat, keep_ratio))
            row = {"what": name, "dtype": str(dtype)[6:], "keep ratio": keep_ratio, "gate us": gate * 1e3}
            row |= {"gate/copy": gate / copied, "published/gate": published / gate, "topk_gate/copy": behind / copied}
            both = device_ms(lambda: torch.autograd.grad(relu_gate(leaf, r, **rule), leaf, upstream))
            both_relu = device_ms(lambda: torch.autograd.grad(torch.relu(leaf), leaf, upstream))
            both_behind = device_ms(lambda: torch.autograd.grad(topk_gate(leaf, r, **rule), leaf, upstream))
            rows.append(
                row | {"gate/relu": gate / relu, "both": both / both_relu, "topk both": both_behind / both_relu}
            )
    return rows


def host_rows() -> list[dict[str, object]]:
    x, r = torch.randn(8, 64, device="cuda"), torch.tensor(0.2, dtype=torch.float64)
    with torch.no_grad():
        contenders: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": torch.relu,
            "relu_gate": lambda x: relu_gate(x, r),
            "published": lambda x: published_way(x, 0.2),
        }
        return [{"what": name, "host us": host_us(lambda: run(x))} for name, run in contenders.items()]


def step_rows(batch: int) -> list[dict[str, object]]:
    model, x = wrn(batch)
    model, x = model.cuda(), x.cuda()
    wrapped = regimewrap.wrap(copy.deepcopy(model))
    rows = []
    for amp in (False, True):
        for keep_ratio in (1.0, 0.5, 0.2, 0.05):
            regimewrap.gate_of(wrapped).set_keep_ratio(keep_ratio)
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                dense, gated = step(model, x, compiled=False), step(wrapped, x, compiled=False)
                pairs = [
                    (
                        do_bench(dense, warmup=50, rep=200, return_mode="median"),
                        do_bench(gated, warmup=50, rep=200, return_mode="median"),
                    )
                    for _ in range(3)
                ]
            ratios = sorted(gated / dense for dense, gated in pairs)
            row = {"batch": batch, "bf16": amp, "keep ratio": keep_ratio, "dense step ms": min(pairs)[0]}
            rows.append(row | {"wrapped/dense": ratios[1], "least": ratios[0], "most": ratios[2]})
    return rows


def main() -> None:
    options = arguments(__doc__, batch=128, steps=1)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_speed measures on a GPU, and torch sees none here; see torch.cuda.is_available().")
    print(torch.cuda.get_device_name())  # noqa: T201
    for dtype in (torch.float32, torch.bfloat16):
        show(kernel_rows(options.batch, dtype), options)
    show(host_rows(), options)
    if options.steps:
        show(step_rows(options.batch), options)


if __name__ == "__main__":
    main()
