"""One trained net at every budget: milliseconds for one sample, beside its accuracy.

An MLP of three hidden layers, 3,072 wide, learns handwritten digits with the default policy, in 150 updates of 64; the
last 397 of the 1,797 digits are for the test. Dense and served passes are timed in turn; between two passes other
memory is read, so that weights come from there.

    python tests/benchmarks/serve_curve.py [--threads 1] [--plot curve.png]
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import paired
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import regimewrap

KEEP_RATIOS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)
WIDTH, TEST = 3072, 397
_BETWEEN = 1 << 28


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a net after its training, in eval mode, and the test's samples and labels."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    layers = [layer for _ in range(2) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = regimewrap.wrap(nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), *layers, nn.Linear(WIDTH, 10)))
    cycler, optimizer = regimewrap.RegimeCycler(model), torch.optim.AdamW(model.parameters(), 3e-4)
    for _ in range(150):
        batch = torch.randint(len(x) - TEST, (64,))
        loss = F.cross_entropy(model(x[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycler.step(loss)
    return model.eval(), x[-TEST:], labels[-TEST:]


def main() -> None:
    """Train, time, print, draw."""
    options = paired.arguments(__doc__, plot="", rounds=21)
    paired.keep_memory()
    model, x, labels = trained()
    between, rows = torch.zeros(_BETWEEN // 4), []
    clock = time.perf_counter if options.threads > 1 else time.thread_time  # others do not count

    def milliseconds(sample: torch.Tensor) -> float:
        between.sum()
        began = clock()
        model(sample)
        return 1e3 * (clock() - began)

    with torch.no_grad():
        for ratio in KEEP_RATIOS:
            with regimewrap.at_keep_ratio(model, ratio):
                accuracy = float((model(x).argmax(1) == labels).double().mean())
            samples = [x[i : i + 1] for i in range(options.rounds)]
            dense, sparse = [], []
            with regimewrap.serve(model, ratio, example_inputs=samples[0]) as served:
                for sample in samples:
                    sparse.append(milliseconds(sample))
                    served._kind = "dense"
                    with regimewrap.at_keep_ratio(model, 1.0):
                        dense.append(milliseconds(sample))
                    served._kind = None
            low, middle, high = statistics.quantiles(sparse, n=4)
            rows.append(
                {
                    "keep ratio": ratio,
                    "accuracy": accuracy,
                    "dense ms": statistics.median(dense),
                    "served ms": middle,
                    "spread ms": high - low,
                    "dense/served": statistics.median(a / b for a, b in zip(dense, sparse, strict=True)),
                }
            )
    paired.show(rows, options, by=("keep ratio",))
    if options.plot:
        draw(rows, options.plot)


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw milliseconds over the keep ratio, and accuracy on the other axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    right = axes.twinx()
    ratios = [row["keep ratio"] for row in rows]
    axes.semilogx(ratios, [row["dense ms"] for row in rows], "s:", color="gray", label="dense, ms")
    axes.semilogx(ratios, [row["served ms"] for row in rows], "o-", label="served, ms")
    right.semilogx(ratios, [100 * row["accuracy"] for row in rows], "^--", color="tab:green", label="accuracy, %")
    axes.set(xlabel="keep ratio", ylabel="milliseconds for one sample", ylim=(0, None))
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios], minor=False)
    axes.minorticks_off()
    right.set(ylabel="accuracy, %", ylim=(0, 102))
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
