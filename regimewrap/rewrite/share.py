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
    """Return the ids of the activations that containers outside ``model`` refer to.

    Only containers that other models could be built from count: dictionaries, lists and tuples (other modules'
    children, globals, default arguments); local variables do not.
    """
    own = {id(each) for module in model.modules() for each in (module._modules, *_plain(module))}
    # Counting references is quick; looking for who holds them walks all objects there are.
    own_holders = Counter(id(child) for module in model.modules() for child in module._modules.values())
    suspects = [each for each in activations if sys.getrefcount(each) > own_holders[id(each)] + _REFERENCES_HERE]
    if not suspects:
        return set()
    wanted = {id(each) for each in suspects}
    found: set[int] = set()
    for holder in gc.get_referrers(*suspects):
        if isinstance(holder, types.FrameType) or id(holder) in own or holder is activations or holder is suspects:
            continue
        if type(holder) in (list, tuple):
            found.update(id(each) for each in holder if id(each) in wanted)
        elif isinstance(holder, dict):
            found.update(id(each) for each in holder.values() if id(each) in wanted)
    return found


def _plain(module: nn.Module) -> Iterable[object]:
    """The lists, tuples and dictionaries that are plain attributes of a module of the model itself."""
    return [value for value in module.__dict__.values() if type(value) in (list, tuple, dict)]


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
