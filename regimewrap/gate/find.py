"""Finds the gate of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from regimewrap.errors import NotWrappedError, WrapError
from regimewrap.gate.site import GATE_ATTRIBUTE, SITES_ATTRIBUTE, SiteGate
from regimewrap.torch_private import forward_hooks

if TYPE_CHECKING:
    from regimewrap.gate.gate import TopKGate


def find_gate(model: nn.Module) -> TopKGate | None:
    """Return the gate of a wrapped model, or of a wrapper around one or a part of one; ``None`` if there is none.

    Raises:
        WrapError: several wrapped models are inside ``model``.
    """
    gates = {id(gate): (gate, home) for home in model.modules() for gate in _gates_on(home)}
    if len(gates) > 1:
        kinds = ", ".join(type(home).__name__ for _, home in gates.values())
        raise WrapError(f"{len(gates)} separately wrapped models are inside this one ({kinds}); pass one of them.")
    for gate, home in gates.values():
        if gate._root is None and GATE_ATTRIBUTE in home.__dict__:  # it came out of a file
            gate.anchor(home)
        return gate
    return None


def _gates_on(module: nn.Module) -> Iterator[TopKGate]:
    if GATE_ATTRIBUTE in module.__dict__:
        yield module.__dict__[GATE_ATTRIBUTE]
    # Copies of graph modules lose plain attributes, and a part of a model never had one.
    sites = module.__dict__.get(SITES_ATTRIBUTE, ())
    for holder in (*forward_hooks(module).values(), *(sites.values() if isinstance(sites, dict) else sites)):
        site_gate = holder if isinstance(holder, SiteGate) else getattr(holder, "gate", None)
        if isinstance(site_gate, SiteGate):
            yield site_gate.gate


def whole_of(part: nn.Module, gate: TopKGate) -> nn.Module | None:
    """Return the wrapped model that ``part`` is a part of; ``None`` if ``part`` is that model itself, or in none."""
    root = gate.root
    if root is None or root is part or not any(module is part for module in root.modules()):
        return None
    return root


def is_wrapped(model: nn.Module) -> bool:
    """Say whether a model, or a part of it, is wrapped.

    >>> model = nn.Sequential(nn.Linear(4, 10), nn.GELU())
    >>> regimewrap.is_wrapped(model), regimewrap.is_wrapped(regimewrap.wrap(model))
    (False, True)
    """
    return any(True for home in model.modules() for _ in _gates_on(home))


def gate_of(model: nn.Module) -> TopKGate:
    """Return the one gate that a wrapped model's activations share.

    Args:
        model: a wrapped model, or DDP, ``torch.compile`` or any other module around one.

    Raises:
        NotWrappedError: there is no wrapped model in it.
        WrapError: there are several.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)))
    >>> regimewrap.gate_of(model)
    TopKGate(keep_ratio=1, scope='sample', sites=1)
    """
    if not isinstance(model, nn.Module):
        raise NotWrappedError(f"expected a wrapped torch.nn.Module; got {type(model).__name__}.")
    gate = find_gate(model)
    if gate is None:
        raise NotWrappedError(
            f"{type(model).__name__} is not wrapped; call regimewrap.wrap(model) first (and keep using that model)."
        )
    return gate
