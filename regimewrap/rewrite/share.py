"""Activation objects that something outside the model holds too: gate a copy, so that nothing else is touched.

A function's default argument (``act=nn.ReLU()``) or a global makes many models share one module. A hook on it would
gate them all, so the model that is wrapped gets a shallow copy in its place, and ``unwrap`` puts the original back.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from torch import nn

_ORIGINAL = "_regimewrap_original"

# The list of activations, the variable of the loop over it, and the argument of getrefcount.
_REFERENCES_HERE = 3


def held_elsewhere(model: nn.Module, activations: list[nn.Module]) -> set[int]:
    """Return the ids of the activations that something outside ``model`` refers to.

    A holder counts if another model could be built from it: another module, a global, a default argument, a setting, a
    closure, an object with slots. A local variable does not count.
    """
    own, explained = _explained(model)

    def suspected() -> list[nn.Module]:
        return [each for each in activations if sys.getrefcount(each) > explained[id(each)] + _REFERENCES_HERE]

    # Counting references is quick; to find the holders takes a walk over all objects.
    if suspected():
        gc.collect(1)  # what planning left behind in cycles
    suspects = suspected()
    wanted = {id(each) for each in suspects}
    if (
        not suspects or gc.get_freeze_count()
    ):  # holders may be among the frozen objects, where none is found; a copy is cheap
        return wanted
    found: set[int] = set()
    own |= {id(activations), id(suspects)}
    for holder in gc.get_referrers(*suspects):
        if id(holder) not in own and not isinstance(holder, _RUNNING):
            found.update(id(each) for each in gc.get_referents(holder) if id(each) in wanted)
    return found


#: Objects with local variables.
_RUNNING = (types.FrameType, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


def _explained(model: nn.Module) -> tuple[set[int], Counter[int]]:
    """Return the ids of all holders in a model, and, by id, how often they refer to an object."""
    own: set[int] = set()
    explained: Counter[int] = Counter()
    ahead: list[object] = [each for module in model.modules() for each in (module, module.__dict__)]
    while ahead:
        holder = ahead.pop()
        if id(holder) in own:
            continue
        own.add(id(holder))
        if isinstance(holder, nn.Module):
            continue  # its dictionary is ahead
        if isinstance(holder, dict):
            values = list(holder.values())
        elif isinstance(holder, types.FunctionType):
            values = [*(holder.__closure__ or ()), holder.__dict__]
        else:
            values = gc.get_referents(holder)
        explained.update(map(id, values))
        # Most are empty; and all of Python shares one empty tuple.
        full = [each for each in values if type(each) not in _BUILT_IN or each]
        ahead += [each for each in full if isinstance(each, _CONTAINERS) and id(each) not in own]
    return own, explained


_BUILT_IN = frozenset((dict, OrderedDict, list, tuple, set, frozenset))


#: What a model may keep its parts in: containers, and methods or functions around its own methods.
_CONTAINERS = (
    *(dict, list, tuple, set, frozenset, deque),
    *(types.MethodType, functools.partial, types.FunctionType, types.CellType),
)


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
