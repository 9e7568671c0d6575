"""Which layers of a model take gated activations: seen by running it once at a small budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from regimewrap.gate.gate import at_keep_ratio
from regimewrap.serve.cpu import dispatch as cpu
from regimewrap.serve.layers import CannotSkip, LinearProduct, Product, RowsProduct, product_of
from regimewrap.serve.partners import Link, products_seen
from regimewrap.sites.probe import run

#: The budget at which a layer is looked at, and the share of its input that may then be other than zero.
_LOOK, _SPARSE = 0.05, 0.5


@final
@dataclass
class Candidate:
    """A layer that was looked at.

    Attributes:
        name: dotted name.
        module: the layer.
        product: how it skips zeros; ``None`` if it stays dense.
        why_not: why it stays dense.
        site: where the activation comes from that its output is multiplied with, if that is what it skips by.
        link: hands that activation over.
    """

    name: str
    module: nn.Module
    product: Product | None
    why_not: str = ""
    site: str = ""
    link: Link | None = None


def candidates(model: nn.Module, example_inputs: Any) -> list[Candidate]:
    """Return every layer with a weight, with how it skips zeros or why not.

    What counts is what a layer is given: its zeros may have come through dropout, flattening or pooling, and a sum with
    something that is not gated has none. So no code is read; the model runs once.
    """
    found: list[Candidate] = []
    for name, module in model.named_modules():
        try:
            product = product_of(module)
        except CannotSkip as reason:
            found.append(Candidate(name, module, None, str(reason)))
        else:
            if product is not None:
                found.append(Candidate(name, module, product))
    linear = [each.module for each in found if isinstance(each.product, LinearProduct)]
    with (
        at_keep_ratio(model, _LOOK) as gate,
        _inputs_counted([each.module for each in found]) as counts,
        products_seen(gate, linear) as sites,
    ):
        run(model, example_inputs)
    for each in found:
        units, other = counts.get(each.module, (0, 0))
        if each.product is None:
            continue
        if units == 0:
            each.why_not = "it did not run, or took no tensor"
        elif other > _SPARSE * units and each.module in sites and cpu.KERNELS.get() is not None:
            each.site, each.link = sites[each.module], Link()
            each.product = RowsProduct(each.module, each.link)
        elif other > _SPARSE * units:
            each.why_not = f"its input is not gated: {100 * other / units:.0f} % of it is not zero at a budget of 5 %"
        if each.why_not:
            each.product = None
    return found


@contextmanager
def _inputs_counted(modules: list[nn.Module]) -> Iterator[dict[nn.Module, tuple[int, int]]]:
    """Count what the modules are given, and how much of it is not zero."""
    counts: dict[nn.Module, tuple[int, int]] = {}

    def count(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            units, other = counts.get(module, (0, 0))
            counts[module] = units + args[0].numel(), other + int(torch.count_nonzero(args[0]))

    handles = [module.register_forward_pre_hook(count) for module in modules]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
