"""Warns, once, of what a gate cannot rank: a tuple, a sparse tensor, samples of one unit."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from regimewrap.topk.selection import DTYPES

if TYPE_CHECKING:
    from regimewrap.gate.site import Site


@final
class Told:
    """Checks what comes to one gate, and remembers what it warned of."""

    def __init__(self) -> None:
        self._sites: set[str] = set()
        self._single_units = False

    def is_ranked(self, x: object, site: Site) -> bool:
        """Say whether a gate can rank the units of ``x``; warn, once a site, where it cannot."""
        if not isinstance(x, Tensor):
            found = f"a {type(x).__name__}"
        elif x.dtype not in DTYPES:
            found = f"a tensor of {x.dtype}"
        elif x.is_nested:
            found = "a nested tensor"
        elif x.layout is not torch.strided:
            found = f"a {str(x.layout).removeprefix('torch.')} tensor"
        else:
            return True
        if site.name not in self._sites and not torch.compiler.is_compiling():
            self._sites.add(site.name)
            warnings.warn(
                f"{site.name} is left alone: it returned {found}, and a gate ranks the units of one dense tensor of "
                "16, 32 or 64-bit floats. Exclude the site in sites.exclude to silence this.",
                RuntimeWarning,
                stacklevel=4,
            )
        return False

    def of_single_units(self, x: Tensor, site: Site) -> None:
        """Warn once of a tensor without a second dimension, whose samples would compete for nothing."""
        if self._single_units or len(x) < 2 or torch.compiler.is_compiling():
            return
        self._single_units = True
        warnings.warn(
            f"{site.name} returned a tensor of shape {tuple(x.shape)}: read as {len(x)} samples of one unit each, "
            "which a gate always keeps, so nothing is cut there. If it is one sample, pass a batch of one: "
            "model(x.unsqueeze(0)), also inside torch.vmap.",
            RuntimeWarning,
            stacklevel=5,
        )
