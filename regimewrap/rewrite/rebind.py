"""Give one object new versions of some of its methods, in a way that copies, pickles and comes off again.

The object gets a subclass of its class, with the same name, whose dictionary holds the new methods. Compared with
methods on the instance, a subclass keeps ``super()``, ``DataParallel`` replicas, deep copies and wrappers that look at
the class working. A method's new code is described by a ``Recipe``, a small picklable value, so that a fresh process
can build it again.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regimewrap.errors import WrapError
from regimewrap.gate.gate import SITES_ATTRIBUTE, SiteGate

#: How rewritten code calls the gate: ``self._regimewrap_gate(value, index)``.
GATE_METHOD = "_regimewrap_gate"
#: How it calls a ReLU with the gate: ``self._regimewrap_relu(F.relu, value, index)``. Instead of a function it may give
#: the name of torch's one, as graphs do, which cannot hold functions.
RELU_METHOD = "_regimewrap_relu"
#: How it calls a plain function in a copy with gates: ``self._regimewrap_copy(function, (planned, copy))(value)``.
COPY_METHOD = "_regimewrap_copy"
_F_RELU, _TORCH_RELU = F.relu, torch.relu
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FUSED = "_regimewrap_fused"
_BASE = "_regimewrap_base"
_METHODS = "_regimewrap_methods"
_MADE_FROM = "_regimewrap_made_from"
_SLOTS = {"__dict__", "__weakref__"}

#: Attributes by which torch's own modules allow kernels that compute the activation inside. Without this the gate would
#: be bypassed in eval mode under no_grad, or be handed nested tensors.
FUSED_PATHS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


class Recipe(Protocol):
    """How to build one method's new code; hashable and picklable."""

    def build(self, original: types.FunctionType) -> types.FunctionType:
        """Return the new function for ``original``."""
        ...


@dataclass(frozen=True)
class NewMethod:
    """A method to be replaced: the class whose dictionary holds it, its name, and the recipe of its new code."""

    owner: type
    name: str
    recipe: Recipe


def rebind(module: nn.Module, methods: tuple[NewMethod, ...], gates: tuple[SiteGate, ...]) -> None:
    """Bind new versions of some methods to ``module``.

    Args:
        module: the object; only its class and one private entry of its ``__dict__`` change.
        methods: what to replace.
        gates: the site gates that the new code calls by index.
    """
    fused = [name for cls, name in FUSED_PATHS.items() if isinstance(module, cls)]
    top: Any = type(module)  # mypy takes nn.Module's __hash__ for that of the class
    module.__dict__[SITES_ATTRIBUTE] = gates
    parametrized = module._modules.get("parametrizations")
    if isinstance(parametrized, nn.ModuleDict) and any(name in vars(top) for name in parametrized):
        # torch takes a parametrization off the class on top, whatever that is; so ours goes below.
        (base,) = top.__bases__
        module.__class__ = _on(top, base, _subclass(base, methods, tuple(fused)))
    else:
        module.__class__ = _subclass(top, methods, tuple(fused))


def release(module: nn.Module) -> None:
    """Give ``module`` its own class back; classes that somebody put on top of ours stay on top."""
    ours = next((cls for cls in type(module).__mro__ if _BASE in vars(cls)), None)
    if ours is not None:
        module.__class__ = _on(type(module), ours, vars(ours)[_BASE])
    module.__dict__.pop(SITES_ATTRIBUTE, None)


def _on(cls: Any, below: type, instead: type) -> Any:
    """Return a class like ``cls``, which somebody made for one object, with another one in place of one below it."""
    if cls is below:
        return instead
    if below not in cls.__mro__:
        return cls
    own = {name: value for name, value in vars(cls).items() if name not in {*_SLOTS, _MADE_FROM}}
    made_from = vars(cls).get(_MADE_FROM)
    if made_from is not None and made_from.__bases__ == (instead,) and vars(made_from).keys() - _SLOTS == own.keys():
        return made_from
    own[_MADE_FROM] = cls
    return types.new_class(cls.__name__, tuple(_on(each, below, instead) for each in cls.__bases__), {}, _fill(own))


def gates_of(module: nn.Module) -> tuple[SiteGate, ...]:
    """Return the site gates that a module's rewritten methods call."""
    gates: tuple[SiteGate, ...] = module.__dict__.get(SITES_ATTRIBUTE, ())
    return gates


def is_rebound(module: nn.Module) -> bool:
    """Say whether ``module`` has rewritten methods."""
    return any(_BASE in vars(cls) for cls in type(module).__mro__)


def _gate(self: nn.Module, value: Tensor, index: int) -> Tensor:
    gates: tuple[SiteGate, ...] = self.__dict__[SITES_ATTRIBUTE]
    return gates[index](value, self.training)


def is_relu(function: object) -> bool:
    """Say whether a call is a ReLU into a new tensor and nothing else; one that somebody put in its place is not."""
    if function is _F_RELU or function is _TORCH_RELU:
        return True
    if type(function) is not nn.ReLU or function.inplace or "forward" in function.__dict__:
        return False
    return not any(getattr(function, hooks) for hooks in _HOOKS)


def _relu(self: nn.Module, function: Any, value: Tensor, index: int, **options: Any) -> Tensor:
    """Call what was a ReLU when the plan was made, and gate it: in one operation if it is one still."""
    if isinstance(function, str):
        function = F.relu if function == "F.relu" else torch.relu
    if options and not is_relu(function):
        function = functools.partial(function, **options)
    gates: tuple[SiteGate, ...] = self.__dict__[SITES_ATTRIBUTE]
    if is_relu(function):
        return gates[index].relu(function, value, self.training)
    return gates[index](function(value), self.training)


def _copy(self: nn.Module, function: Any, known: tuple[Any, Any]) -> Any:
    """Return a function's copy that calls the gates of this module, or the function if it is not the one planned."""
    planned, copy = known
    return functools.partial(copy, self) if function is planned else function


def _refuse_scripting(self: nn.Module) -> None:
    name = type(self).__name__
    raise WrapError(f"{name} is wrapped, and torch.jit.script would script it without its gates; regimewrap.unwrap it.")


@functools.lru_cache(maxsize=1024)
def _subclass(cls: type[nn.Module], methods: tuple[NewMethod, ...], fused: tuple[str, ...]) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_ex,
        "__prepare_scriptable__": _refuse_scripting,  # torch.jit.script asks for it
        _BASE: cls,
        _METHODS: methods,
        _FUSED: fused,
        GATE_METHOD: _gate,
        RELU_METHOD: _relu,
        COPY_METHOD: _copy,
        **{name: _while_idle(name) for name in fused},
    }
    below: dict[type, dict[str, Any]] = {}
    for method in methods:
        original: types.FunctionType = vars(method.owner)[method.name]
        new = functools.update_wrapper(method.recipe.build(original), original)
        if getattr(cls, method.name) is original:
            namespace[method.name] = new
        else:
            below.setdefault(method.owner, {})[method.name] = new
    # A method reached through super() goes into a class right below its own: (cls, twin) resolves to cls, twin, owner.
    twins = [types.new_class(owner.__name__, (owner,), exec_body=_fill(new)) for owner, new in below.items()]
    return types.new_class(cls.__name__, (cls, *twins), exec_body=_fill(namespace))


def _while_idle(name: str) -> property:
    """Make an attribute that allows a fused kernel read False whenever the gate has something to do."""

    def get(self: nn.Module) -> Any:
        gates: tuple[SiteGate, ...] = self.__dict__.get(SITES_ATTRIBUTE, ())
        return False if gates and gates[0].gate.acts(self.training) else self.__dict__[name]

    def put(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


def _fill(namespace: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.update(namespace)


def _reduce_ex(self: nn.Module, protocol: int) -> Any:
    cls: Any = next(each for each in type(self).__mro__ if _BASE in each.__dict__)
    reduced = super(cls, self).__reduce_ex__(protocol)
    # Only our own subclass cannot be found by name; one that somebody put on top (FSDP does) is theirs to pickle.
    if type(self) is not cls or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced
    return (
        _rebuild,
        (cls.__dict__[_BASE], cls.__dict__[_METHODS], cls.__dict__[_FUSED], *reduced[1][1:]),
        *reduced[2:],
    )


def _rebuild(base: Any, methods: tuple[NewMethod, ...], fused: tuple[str, ...], *arguments: Any) -> nn.Module:
    subclass = _subclass(base, methods, fused)
    return subclass.__new__(subclass, *arguments)
