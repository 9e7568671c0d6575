"""The shortest way from a gate of a served model to the kernel that selects: what cannot change is looked up once.

Outputs are those of the gate. Whatever is not plain inference on a CPU goes the gate's own way.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from regimewrap import torch_private
from regimewrap.gate.gate import Site, TopKGate
from regimewrap.topk.cpu import dispatch as cpu
from regimewrap.topk.selection import Selection, effective_ratio

#: Kinds of calls that are remembered; a model that sees more shapes than that pays for looking them up again.
_REMEMBERED = 1024


@final
class LeanSelection:
    """What a served gate calls in place of ``TopKGate._select``."""

    def __init__(self, gate: TopKGate) -> None:
        self._gate = gate
        self._known: dict[tuple[str, torch.Size, bool], Selection | None] = {}
        self._no_bits = torch.empty(0, dtype=torch.uint8)

    def __call__(self, x: Tensor, site: Site, training: bool, after_relu: bool = False) -> Tensor:
        """See ``TopKGate._select``."""
        gate = self._gate
        if training or gate.network is not None or gate._fixed() is not None or not is_plain(x):
            return TopKGate._select(gate, x, site, training, after_relu)
        key = site.name, x.shape, after_relu
        selection = self._known[key] if key in self._known else self._look_up(x, site, after_relu)
        ratio = gate._ratio(training).item()
        if selection is None or not 0.0 < ratio < 1.0 or (gate._dense_in_eval and not gate.budget.forced):
            return TopKGate._select(gate, x, site, training, after_relu)
        ratio, y = effective_ratio(ratio, site.multiplier), torch.empty_like(x)
        if ratio < 1.0 and cpu.gate(x, y, self._no_bits, ratio, selection):
            return y
        return TopKGate._select(gate, x, site, training, after_relu)

    def _look_up(self, x: Tensor, site: Site, after_relu: bool) -> Selection | None:
        """Return what is ranked with what; ``None`` where the gate itself has something to check, or to say."""
        rule, gate, found = self._gate.policy.gate, self._gate, None
        small = gate._min_units > 1 and x.numel() < gate._min_units * x.shape[0] if x.dim() else True
        if x.dim() > 1 and x.numel() > 0 and not small:
            score = "positive" if after_relu else rule.score
            found = Selection(rule.scope, site.channels_of(x, rule.scope), score, rule.relative_to, rule.ties)
        if len(self._known) < _REMEMBERED:
            self._known[site.name, x.shape, after_relu] = found
        return found


def is_plain(x: Tensor) -> bool:
    """Say whether nothing but plain eager torch, without gradients and on a CPU, looks at this call."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and not torch_private.is_jit_tracing()
        and not torch_private.has_dispatch_modes()
        and not torch_private.has_functorch_transforms()
    )
