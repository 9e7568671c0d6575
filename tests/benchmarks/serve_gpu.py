"""Products that skip zeros on a GPU against dense ones, for few rows: single layers, and whole models served.

Layers are timed by replaying a CUDA graph of 20 calls with copies of the weight that are together larger than the
cache, so that launches cost nothing and weights come from memory; models as they are called, launches and all.

    python tests/benchmarks/serve_gpu.py [--rounds 11] [--json FILE]
"""

# ruff: noqa: T201  a script prints
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import paired
import torch
import torch.nn.functional as F
from serve_speed import Block
from torch import nn

import regimewrap
from regimewrap import GatePolicy, RegimePolicy
from regimewrap.serve.gpu import dispatch as gpu

_CALLS = 20
_CACHE = 1 << 28
_SHAPES = ((3072, 768), (3072, 3072), (11008, 4096), (14336, 4096))
_DENSITIES = (1.0, 0.2, 0.1, 0.05)


def replayed(call: Callable[[int], object], rounds: int) -> float:
    """Return the median microseconds of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(3):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(_CALLS):
            call(index)
    times = []
    for _ in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / _CALLS)
    return statistics.median(times[2:])


def layers(options: object) -> None:
    """Time single layers, and check each result."""
    rows = []
    for inputs, outputs in _SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            copies = max(2, min(_CALLS, _CACHE // (inputs * outputs * 2)))
            weights = [(torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(dtype) for _ in range(copies)]
            turned = [weight.t().contiguous() for weight in weights]
            for batch in (1, 4):
                full = torch.randn(batch, inputs, device="cuda", dtype=dtype)
                dense = replayed(lambda i, x=full, w=weights: F.linear(x, w[i % len(w)]), options.rounds)
                for density in _DENSITIES if dtype == torch.bfloat16 else (0.1,):
                    x = full * (torch.rand(full.shape, device="cuda") < density)
                    right, (ours, _) = F.linear(x.double(), weights[0].double()), gpu.linear(x, turned[0], None)
                    sparse = replayed(lambda i, x=x, w=turned: gpu.linear(x, w[i % len(w)], None), options.rounds)
                    rows.append(
                        {
                            "inputs": inputs,
                            "outputs": outputs,
                            "dtype": str(dtype).removeprefix("torch."),
                            "batch": batch,
                            "density": density,
                            "dense us": dense,
                            "sparse us": sparse,
                            "dense/sparse": dense / sparse,
                            "error": float((ours.double() - right).abs().max() / right.abs().max()),
                        }
                    )
    paired.show(rows, options, by=("inputs", "outputs", "dtype", "batch", "density"))


def models(options: object) -> None:
    """Serve decoders at keep ratio 0.1, and time them as they are called."""
    rows = []
    for kind, width, hidden, count in (("relu", 768, 3072, 12), ("swiglu", 768, 2048, 12), ("swiglu", 4096, 11008, 8)):
        torch.manual_seed(paired.SEED)
        with torch.device("cuda"):
            model = nn.Sequential(*(Block(width, hidden, kind) for _ in range(count))).eval().to(torch.bfloat16)
            x = torch.randn(1, 1, width, dtype=torch.bfloat16)

        def once(model: nn.Module = model, x: torch.Tensor = x) -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            model(x)
            torch.cuda.synchronize()
            return 1000 * (time.perf_counter() - began)

        with torch.no_grad():
            bare = statistics.median(once() for _ in range(options.rounds + 3))
            regimewrap.wrap(model, RegimePolicy(gate=GatePolicy(scope="position")))
            with regimewrap.at_keep_ratio(model, 0.1):
                gated = statistics.median(once() for _ in range(options.rounds + 3))
                right = model(x)
            with regimewrap.serve(model, 0.1, example_inputs=x) as served:
                ms = statistics.median(once() for _ in range(options.rounds + 3))
                error = float((model(x) - right).abs().max() / right.abs().max())
                chosen = sum(bool(layer.most_density) for layer in served.layers if not layer.why)
        rows.append(
            {
                "model": f"{kind} {width}-{hidden} x{count}",
                "bare ms": bare,
                "gated ms": gated,
                "served ms": ms,
                "bare/served": bare / ms,
                "sparse layers": chosen,
                "error": error,
            }
        )
    paired.show(rows, options, by=("model",))


def main() -> None:
    """Time both on this GPU."""
    options = paired.arguments(__doc__)
    print(torch.cuda.get_device_name())
    layers(options)
    models(options)


if __name__ == "__main__":
    main()
