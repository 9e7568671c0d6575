"""Gated linear units: ``act(gate(x)) * up(x)``, where what the gate cut makes rows of ``up`` needless.

The product is seen when the model runs once: a gated activation, made first, times a linear layer's output that goes
nowhere else. While the model is served, the activation says which rows that layer has to compute.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regimewrap.gate.gate import Site, TopKGate

_TIMES = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}


@final
class Link(threading.local):
    """What one site made last, in this thread, until the layer that it is multiplied with takes it."""

    active: Tensor | None = None

    def take(self) -> Tensor | None:
        """Return it, once: what is left over from another call must not be used."""
        active, self.active = self.active, None
        return active


@final
class Links:
    """The links of a served model: an observer of its gate, and hooks that forget what was not taken."""

    def __init__(self, gate: TopKGate) -> None:
        self._gate = gate
        self._by_site: dict[str, list[Link]] = {}
        self._handles: list[Any] = []

    def add(self, site: str, link: Link, parent: nn.Module) -> None:
        """Fill ``link`` from a site from now on; empty it whenever ``parent``, which holds both, begins."""

        def forget(module: nn.Module, args: Any) -> None:  # noqa: ARG001  torch's signature
            link.active = None

        if not self._by_site:
            self._gate.observers.append(self)
        self._by_site.setdefault(site, []).append(link)
        self._handles.append(parent.register_forward_pre_hook(forget))

    def __call__(self, site: Site, before: Tensor, after: Tensor) -> None:  # noqa: ARG002  the gate's signature
        """Take down what a site made."""
        for link in self._by_site.get(site.name, ()):
            link.active = after

    def close(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()
        self._gate.observers[:] = [each for each in self._gate.observers if each is not self]
        self._by_site, self._handles = {}, []


class _Products(TorchFunctionMode):
    """Sees which two tensors are multiplied, and how often a layer's output is used."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[int, Tensor, str]] = {}  # by a site: when, what, which
        self.outputs: dict[int, tuple[int, Tensor, nn.Module]] = {}  # of a layer
        self.uses: dict[int, int] = {}
        self.pairs: dict[nn.Module, set[str]] = {}
        self.clock = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":
            for each in args:
                if id(each) in self.outputs:
                    self.uses[id(each)] = self.uses.get(id(each), 0) + 1
            if func in _TIMES and len(args) == 2:
                for a, b in (args, args[::-1]):
                    if id(a) in self.made and id(b) in self.outputs and a.shape == b.shape:
                        self._meet(*self.made[id(a)], *self.outputs[id(b)])
        return func(*args, **(kwargs or {}))

    def _meet(self, when: int, active: Tensor, site: str, began: int, output: Tensor, layer: nn.Module) -> None:  # noqa: ARG002
        if when < began:
            self.pairs.setdefault(layer, set()).add(site)


@contextmanager
def products_seen(gate: TopKGate, layers: list[nn.Module]) -> Iterator[dict[nn.Module, str]]:
    """Find, while the model runs, the layers whose output is multiplied with a gated activation and used for no more.

    Yields:
        Layer to the name of the site; filled at the end of the block.
    """
    mode, found, began = _Products(), dict[nn.Module, str](), dict[nn.Module, int]()

    def begin(module: nn.Module, args: Any) -> None:  # noqa: ARG001  torch's signature
        began[module] = mode.tick()

    def note(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001  torch's signature
        if isinstance(output, Tensor):
            mode.outputs[id(output)] = began[module], output, module  # held, so that no id is used again

    def observe(site: Site, before: Tensor, after: Tensor) -> None:  # noqa: ARG001  the gate's signature
        mode.made[id(after)] = mode.tick(), after, site.name

    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(note) for layer in layers]
    gate.observers.append(observe)
    try:
        with mode:
            yield found
    finally:
        gate.observers.remove(observe)
        for handle in handles:
            handle.remove()
        often = {layer for _, output, layer in mode.outputs.values() if mode.uses.get(id(output), 0) != 1}
        found.update(
            {layer: min(sites) for layer, sites in mode.pairs.items() if len(sites) == 1 and layer not in often}
        )
