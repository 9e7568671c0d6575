"""One place where an activation's output is gated, and the shared gate as it is seen from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

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
