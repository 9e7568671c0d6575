"""Did every selected activation really pass the gate? Runs one forward pass and counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from regimewrap.gate import GATE_ATTRIBUTE, Site, gate_of
from regimewrap.sites import catalog
from regimewrap.sites.choose import choose
from regimewrap.sites.finder import Activation, find
from regimewrap.sites.probe import Shapes, untouched
from regimewrap.sites.purpose import Purpose


@dataclass(frozen=True)
class Coverage:
    """What one forward pass showed.

    Attributes:
        gated: names of the sites whose activation ran and was gated.
        escaped: activations that the policy selects, that ran, and whose output no gate saw.
        idle: sites of the plan that did not run in this pass.
    """

    gated: tuple[str, ...]
    escaped: tuple[str, ...]
    idle: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.gated)} sites gated, {len(self.escaped)} escaped, {len(self.idle)} did not run"]
        lines += [
            f"  escaped: {name}; unwrap and wrap again, or exclude it in sites.exclude if it is meant"
            for name in self.escaped
        ]
        lines += [f"  did not run: {name}" for name in self.idle]
        return "\n".join(lines)


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Coverage:
    """Run one forward pass and compare what was gated with the activations that really ran.

    Args:
        model: a wrapped model, in the mode to be checked.
        *args: passed to the model.
        **kwargs: passed to the model.

    Returns:
        The coverage; print it. Buffers and random number generators are as they were.

    Raises:
        NotWrappedError: the model is not wrapped.
    """
    gate = gate_of(model)
    # A part of a wrapped model, or a copy of a graph module, has the gate but not the attribute.
    root = next((module for module in model.modules() if module.__dict__.get(GATE_ATTRIBUTE) is gate), model)
    census = _Census(root)
    gate.observers.append(census.saw_gate)
    try:
        with untouched(model), gate.uncounted(), torch.compiler.set_stance("force_eager"), census.watching():
            model(*args, **kwargs)
    finally:
        gate.observers.remove(census.saw_gate)
    gated = tuple(dict.fromkeys(site.name for site in census.gated_sites))
    escaped = tuple(dict.fromkeys(each.name for each in census.escaped(gate.policy.sites)))
    idle = tuple(site.name for site in gate.sites if site.name not in set(gated))
    return Coverage(gated, escaped, idle)


class _Census(TorchFunctionMode):
    """Every activation that runs, and every tensor that a gate sees."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.gated_sites: list[Site] = []
        self._root = root
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._stack: list[nn.Module] = []
        # Tensors are kept, so that no other one takes their identity meanwhile.
        self._ran: list[tuple[Activation, Any]] = []
        self._seen: dict[int, Tensor] = {}
        self._shapes = Shapes()

    def saw_gate(self, site: Site, before: Tensor, after: Tensor) -> None:  # noqa: ARG002  an Observer
        self.gated_sites.append(site)
        self._seen[id(before)] = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        kind = catalog.FUNCTIONS.get(func)
        if kind is None and getattr(torch.Tensor, name, None) is func:
            kind = catalog.TENSOR_METHODS.get(name)
        inside = self._stack[-1] if self._stack else self._root
        if kind is not None and catalog.kind_of_module(inside) is None:
            path = self._paths.get(id(inside), type(inside).__name__)
            self._ran.append((Activation(f"{path}.{name}" if path else name, name, kind, path), result))
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            register_module_forward_pre_hook(lambda module, args: self._stack.append(module)),  # noqa: ARG005
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()
        if id(module) in self._paths:
            self._shapes.record(self._paths[id(module)], args, output)
        kind = catalog.kind_of_module(module)
        if kind is not None:
            label = type(module).__name__
            path = self._paths.get(id(module))
            if path is None and self._stack:  # made during the pass, by the code of the module around it
                around = self._paths.get(id(self._stack[-1]), "")
                made = Activation(f"{around}.{label}" if around else label, label, kind, around)
                self._ran.append((made, output))
            else:
                path = path if path is not None else label
                self._ran.append((Activation(path, label, kind, path), output))

    def escaped(self, policy: Any) -> Iterator[Activation]:
        planned, purpose = find(self._root), Purpose(self._root, self._shapes)
        for activation, output in self._ran:
            if id(output) in self._seen:
                continue
            # The plan knows a called function by its method too, and the policy may have left it alone by that name.
            known = [
                each
                for each in planned
                if each.method is not None
                and each.module == activation.module
                and each.call
                and (each.call.short == activation.label or (_is_made(activation) and each.kind == activation.kind))
            ]
            if any(choose(policy, each, purpose)[0] for each in known or [activation]):
                yield activation


def _is_made(activation: Activation) -> bool:
    """Say whether an activation that ran is a module that the tree of modules does not have."""
    return activation.label[:1].isupper() and activation.name != activation.module
