"""What is said of a served model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from regimewrap.files import Table

if TYPE_CHECKING:
    from regimewrap.serve.served import Served


@final
@dataclass(frozen=True)
class ServedLayer:
    """One layer that was looked at; times are the least of some calls inside the whole model.

    Attributes:
        name: dotted name.
        density: share of its input that is not zero.
        dense_ms: milliseconds of the layer as it is.
        sparse_ms: milliseconds when it skips zeros, finding them included.
        select_ms: milliseconds that the gate took to make the input.
        most_density: the share up to which it skips zeros, 0 for never; ``None`` while that is measured.
        why: why it stays dense whatever its input; empty if it may skip zeros.
    """

    name: str
    density: float = math.nan
    dense_ms: float = math.nan
    sparse_ms: float = math.nan
    select_ms: float = math.nan
    most_density: float | None = None
    why: str = ""

    @property
    def sparse(self) -> bool:
        """Whether it skips the zeros of inputs like those it was measured on."""
        return bool(self.most_density and self.density <= self.most_density)

    @property
    def reason(self) -> str:
        """Why it runs as it does, in words."""
        if self.why:
            return self.why
        if self.most_density is None:
            return "measured in the next calls"
        if self.most_density == 0.0:
            return "the whole model is no faster" if self.sparse_ms < self.dense_ms else "sparse is not faster here"
        return f"faster below a density of {self.most_density:.2g}"


def served_table(served: Served, model: str) -> Table:
    """Return a row a layer, below the figures of the whole model."""
    layers = served.layers
    skipping = sum(layer.sparse for layer in layers)
    threads = torch.get_num_threads()
    gain = served.dense_ms / served.served_ms
    compared = f"{gain:.2f} times faster" if not gain < 1 else f"{1 / gain:.2f} times slower, not worth it here"
    head = (
        f"{model} at keep ratio {served.keep_ratio:g}, {threads} thread{'s' * (threads > 1)}: "
        f"{skipping} of {len(layers)} layers skip zeros; copies of their weights take "
        f"{served.copied_bytes / 2**20:.1f} MiB\n"
        f"whole model: {served.dense_ms:.2f} ms dense at the full budget, {served.served_ms:.2f} ms served at "
        f"{served.measured_ratio:g}: {compared}"
    )
    rows: list[tuple[str, ...]] = [("layer", "density", "ms dense", "ms sparse", "ms select", "runs", "why")]
    for layer in layers:
        figures = (layer.density, layer.dense_ms, layer.sparse_ms, layer.select_ms)
        shown = [f"{value:.3f}" if math.isfinite(value) else "-" for value in figures]
        rows.append((layer.name, *shown, "sparse" if layer.sparse else "dense", layer.reason))
    return Table(rows, head, left=(0, 5, 6))
