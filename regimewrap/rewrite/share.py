"""Activation objects that something outside the model holds too: gate a copy, so that nothing else is touched.

A function's default argument (``act=nn.ReLU()``) or a global makes many models share one module. A hook on it would
gate them all, so the model that is wrapped gets a shallow copy in its place, and ``unwrap`` puts the original back.
"""

from __future__ import annotations

import copy
import gc
import sys
import types
from collections import Counter
from collections.abc import Iterable

from torch import nn

_ORIGINAL = "_regimewrap_original"

# The list of activations, the variable of the loop over it, and the argument of getrefcount.
_REFERENCES_HERE = 3


def held_elsewhere(model: nn.Module, activations: list[nn.Module]) -> set[int]:
    """Return the ids of the activations that something outside ``model`` refers to.

    Only what other models could be built from counts: dictionaries, lists, tuples and attributes (other modules'
    children, globals, default arguments, settings); local variables do not.
    """
    own, explained = _explained(model)

    def suspected() -> list[nn.Module]:
        return [each for each in activations if sys.getrefcount(each) > explained[id(each)] + _REFERENCES_HERE]

    # Counting references is quick; looking for who holds them walks all objects there are.
    if suspected():
        gc.collect(1)  # what planning left behind in cycles
    suspects = suspected()
    wanted = {id(each) for each in suspects}
    if not suspects or gc.get_freeze_count():  # nobody can say who is among the frozen objects, and a copy is cheap
        return wanted
    found: set[int] = set()
    for holder in gc.get_referrers(*suspects):
        if isinstance(holder, types.FrameType) or id(holder) in own or holder is activations or holder is suspects:
            continue
        if type(holder) in (list, tuple):
            found.update(id(each) for each in holder if id(each) in wanted)
        else:
            values = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
            found.update(id(each) for each in values.values() if id(each) in wanted)
    return found


def _explained(model: nn.Module) -> tuple[set[int], Counter[int]]:
    """Return the ids of the containers in a model, and how often what has an id is referred to in it."""
    own: set[int] = set()
    explained: Counter[int] = Counter()
    for module in model.modules():
        own.update((id(module), id(module.__dict__)))
        for value in module.__dict__.values():
            if isinstance(value, dict | list | tuple):
                if value:
                    own.add(id(value))
                    explained.update(map(_referred, value.values() if isinstance(value, dict) else value))
            elif isinstance(value, nn.Module | types.MethodType):
                explained[_referred(value)] += 1
    return own, explained


def _referred(value: object) -> int:
    """The id of what an attribute refers to; modules hold methods of themselves as functions to call."""
    return id(value.__self__ if isinstance(value, types.MethodType) else value)


def replace_shared(model: nn.Module, activations: Iterable[nn.Module]) -> None:
    """Put a copy in the place of each activation that something outside the model holds too."""
    candidates = list(activations)
    shared = held_elsewhere(model, candidates)
    copies = {id(each): _own_copy(each) for each in candidates if id(each) in shared}
    if not copies:
        return
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in copies:
                parent._modules[name] = copies[id(child)]


def put_back(model: nn.Module) -> None:
    """Put every original back."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and _ORIGINAL in child.__dict__:
                original: nn.Module = child.__dict__[_ORIGINAL]
                original.training = child.training
                parent._modules[name] = original


def _own_copy(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    for name, value in module.__dict__.items():
        if isinstance(value, dict):
            twin.__dict__[name] = value.copy()  # hooks and buffers tables of its own, the same entries
    twin.__dict__[_ORIGINAL] = module
    return twin
