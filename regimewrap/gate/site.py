"""One place where an activation's output is gated, and the shared gate as it is seen from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from regimewrap.errors import SelectionError

if TYPE_CHECKING:
    from regimewrap.gate.gate import TopKGate

#: The attribute of a wrapped model's ``__dict__`` that holds its gate.
GATE_ATTRIBUTE = "_regimewrap"
#: The attribute of a module with rewritten methods that holds the site gates which these call.
SITES_ATTRIBUTE = "_regimewrap_sites"


@dataclass(frozen=True)
class Site:
    """One place where an activation's output is gated.

    ``name`` is the dotted name of an activation module, or of a module followed by the method and the function called
    in it. ``kind`` is the family of the activation, ``multiplier`` scales the shared keep ratio here, ``channel_dim``
    is the dimension that position scope selects over (``None``: the last, if there are three dimensions at most).
    """

    name: str
    kind: str
    multiplier: float = 1.0
    channel_dim: int | None = None

    def channels_of(self, x: Tensor, scope: str) -> int:
        """Return the dimension of ``x`` that holds its channels.

        Raises:
            SelectionError: position scope asks for it, and nothing tells.
        """
        if self.channel_dim is None and x.dim() > 3 and scope == "position":
            raise SelectionError(
                f"nothing tells which dimension of {tuple(x.shape)} holds the channels; set gate.channel_dim in the "
                "policy (1 for images, -1 for channels last), or exclude the site."
            )
        return -1 if self.channel_dim is None else self.channel_dim


#: Called at each gated site with the site, the activation's output, and what the gate made of it.
Observer = Callable[[Site, Tensor, Tensor], None]
#: Called with the same while thresholds are being found; returns the one to cut at instead of selecting.
Recorder = Callable[[Site, Tensor, Tensor], float]


class SiteGate:
    """The shared gate as seen from one site: what hooks and rewritten methods call."""

    def __init__(self, gate: TopKGate, site: Site) -> None:
        self.gate = gate
        self.site = site

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """Gate ``x``; see ``TopKGate.__call__``."""
        return self.gate(x, self.site, training)

    def relu(self, function: Callable[..., Tensor], x: Tensor, training: bool) -> Tensor:
        """Return the gated ``function(x)``, a ReLU; see ``TopKGate.relu``."""
        return self.gate.relu(function, x, self.site, training)


def cut(x: Tensor, threshold: float | None, score: str) -> Tensor:
    """Return ``x`` with zeros where the score is not above a threshold; NaN stays, and ``None`` cuts nothing."""
    # One standard operation, which keeps NaN and the memory format, and which every exporter knows.
    if threshold is None:
        return x
    if score == "magnitude":
        return nn.functional.hardshrink(x, threshold)
    return nn.functional.threshold(x, threshold, 0.0)
