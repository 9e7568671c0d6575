"""What ``print(model)`` shows of its gates; reads what the other files of this room put on modules.

``repr`` asks a module for its ``extra_repr``, and an object in the module's ``__dict__`` can answer in place of the
class: the class stays the user's, and modules get no child that ``named_modules`` or ``state_dict`` would see.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from regimewrap.gate.gate import GATE_ATTRIBUTE, SITES_ATTRIBUTE, Site, SiteGate, TopKGate
from regimewrap.torch_private import forward_hooks

#: What ``repr`` of a module calls.
SHOWN = "extra_repr"


class Shown:
    """A module's own ``extra_repr``, and what is gated there."""

    def __init__(self, module: nn.Module | None) -> None:
        # Weak, so that a model that is let go is freed at once and not when cycles are looked for.
        self._module = weakref.ref(module) if module is not None else None

    def __call__(self) -> str:
        """Return the text: one line for each thing in a module with children, else all in one."""
        module = self._module() if self._module is not None else None
        if module is None:  # a shallow copy of a module that is gone
            return ""
        return ("\n" if module._modules else ", ").join(
            filter(None, [type(module).extra_repr(module), *_lines(module)])
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Shown:
        module = self._module() if self._module is not None else None
        return Shown(memo.get(id(module)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Shown, (self._module() if self._module is not None else None,)


def show(module: nn.Module) -> None:
    """Let ``print`` show what is gated at ``module``, unless its own ``extra_repr`` is an object's already."""
    module.__dict__.setdefault(SHOWN, Shown(module))


def hide(module: nn.Module) -> None:
    """Let ``print`` show what it showed before."""
    if isinstance(module.__dict__.get(SHOWN), Shown):
        del module.__dict__[SHOWN]


def calls(gates: Iterable[SiteGate]) -> str:
    """Say which calls in a module's code are gated, by their kinds.

    >>> from regimewrap.gate.site import Site
    >>> gate = regimewrap.TopKGate()
    >>> calls(SiteGate(gate, Site(name, "relu")) for name in ("forward.relu", "forward.relu.2"))
    'gated: 2 relu'
    """
    found = Counter(f"{gate.site.kind}{_multiplier(gate.site)}" for gate in gates)
    return "gated: " + ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in found.items())


def _lines(module: nn.Module) -> Iterator[str]:
    gate = module.__dict__.get(GATE_ATTRIBUTE)
    if gate is not None:
        yield _whole(gate)
    held = (getattr(hook, "gate", None) for hook in forward_hooks(module).values())
    hooked = [gate for gate in held if isinstance(gate, SiteGate)]
    yield from (f"gated{_multiplier(each.site)}" for each in hooked)
    sites = module.__dict__.get(SITES_ATTRIBUTE)
    # A ReLU's forward may be one with the gate that its hook stands for; what only guards a fused kernel has no key.
    inside = [each for key, each in sites.gates.items() if key and each not in hooked] if sites is not None else []
    if inside:
        yield calls(inside)


def _multiplier(site: Site) -> str:
    return "" if site.multiplier == 1.0 else f" (multiplier {site.multiplier:g})"


def _whole(gate: TopKGate) -> str:
    """Say what is in force for a whole model, in one line."""
    rule, count = gate.policy.gate, len(gate.sites)
    ratio, in_eval = float(gate.keep_ratio), rule.eval_keep_ratio
    other = "" if in_eval in ("current", ratio) or gate.budget.forced else f" ({in_eval:g} in eval mode)"
    budget = f"keep ratio {ratio:.3g}{other}" if gate.thresholds is None else "fixed thresholds"
    return f"gate: {count} site{'s' * (count != 1)}, {budget}, scope {rule.scope}"
