"""The graphs of a traced module."""

from __future__ import annotations

from torch import fx

#: Where a ``GraphModule`` of ours keeps one graph for train mode and one for eval mode.
MODES = "regimewrap_modes"


def graphs_of(module: fx.GraphModule) -> tuple[fx.Graph, ...]:
    """Return the graphs of a ``GraphModule``: one, or one for each mode, as feature extractors have them too."""
    kept = [*getattr(module, "meta", {}).get(MODES, {}).values(), *vars(module).values()]  # torchvision's have no meta
    graphs = [module.graph, *(each for each in kept if isinstance(each, fx.Graph))]
    return tuple({id(each): each for each in graphs}.values())
