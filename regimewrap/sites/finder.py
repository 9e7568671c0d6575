"""Find every activation of a model, without running or changing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from regimewrap.sites import catalog
from regimewrap.sites.calls import Call, find_calls, own_methods


@dataclass(frozen=True)
class Activation:
    """One activation of a model: a module, or a call of a function in a method.

    Attributes:
        name: dotted name; for a call, the module's, the method's and the function's (``layer1.0.forward.relu``).
        label: what it is, as the user would write it (``ReLU``, ``F.relu``).
        kind: its family.
        module: dotted name of the module that it is, or that calls it.
        method: the calling method; ``None`` for a module.
        call: the call itself, for a call.
        problem: why no mechanism can reach it, if that is known already.
    """

    name: str
    label: str
    kind: str
    module: str
    method: str | None = None
    call: Call | None = None
    problem: str | None = None


def find(model: nn.Module) -> list[Activation]:
    """Return a model's activations, in the order of ``named_modules``; shared modules once."""
    found: list[Activation] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            name = getattr(module, "original_name", type(module).__name__)
            kind = catalog.kind_of_name(name)
            if kind is not None:
                found.append(Activation(path, name, kind, path, problem="it is scripted; wrap before torch.jit.script"))
            continue
        kind = catalog.kind_of_module(module)
        if kind is not None:
            found.append(Activation(path or type(module).__name__, type(module).__name__, kind, path))
        else:
            found.extend(_in_methods(path, module))
    return found


def _in_methods(path: str, module: nn.Module) -> Iterator[Activation]:
    prefix = f"{path}." if path else ""
    for cls, method, function in own_methods(module):
        current = getattr(type(module), method, None)
        overridden = current is not function
        if overridden and not _calls_super(current, method):
            continue
        counts: Counter[str] = Counter()
        for call, _ in find_calls(function, module):
            counts[call.short] += 1
            suffix = f"_{counts[call.short]}" if counts[call.short] > 1 else ""
            yield Activation(
                f"{prefix}{method}.{call.short}{suffix}",
                call.text,
                call.kind,
                path,
                method,
                call,
                f"it is in {cls.__name__}.{method}, reached through super()" if overridden else None,
            )


def _calls_super(function: object, method: str) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and "__class__" in code.co_freevars and method in code.co_names
