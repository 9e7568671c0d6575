"""What new code, hooks and graphs call while a model runs, and where it is kept on the user's modules."""

from __future__ import annotations

import copy
import functools
import operator
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from regimewrap.errors import WrapError
from regimewrap.gate.gate import SITES_ATTRIBUTE, SiteGate
from regimewrap.rewrite import shown
from regimewrap.rewrite.exchange import Copies, Part, put_in_place
from regimewrap.rewrite.source import NotRewritableError
from regimewrap.torch_private import forward_hooks, has_hooks, remove_forward_hook

#: The child of a traced module that calls gates; a module that is being traced lends it one under this name.
GATE_CHILD = "_regimewrap_gate"
#: What ``torch.jit.script`` asks a module for, before it does anything.
SCRIPTING = "__prepare_scriptable__"

_F_RELU, _TORCH_RELU = F.relu, torch.relu


class Sites:
    """The gates of one module, as its code finds them.

    Args:
        gates: key of a call to its gate.
        parts: the methods whose code is exchanged while this object lives.
    """

    def __init__(self, gates: Mapping[str, SiteGate], parts: tuple[Part, ...]) -> None:
        self.gates = dict(gates)
        self.parts = parts
        self.copies: Copies = {}
        for part in parts:
            self.copies |= put_in_place(self, part)
        # For an activation module: the forward that computes activation and gate in one operation.
        self.forward = getattr(parts[0].owner, "forward", None) if parts else None

    def at(self, module: nn.Module, key: str, value: Tensor) -> Tensor:
        """Gate ``value`` in the mode of ``module``, if this call is a site of it."""
        gate = self.gates.get(key)
        return value if gate is None else gated(module, gate, value)

    def relu(self, module: nn.Module, key: str, function: Any, value: Any, **options: Any) -> Any:
        """Call what was a ReLU when the plan was made, and gate the result: in one operation if it still is a ReLU.

        Args:
            module: whose mode counts.
            key: of the call.
            function: what is called, or the name of the tensor's method.
            value: its argument.
            **options: such as ``inplace=False``.
        """
        if isinstance(function, str):
            function = torch.relu if isinstance(value, Tensor) else operator.methodcaller(function)
        gate = self.gates.get(key)
        if gate is None or (isinstance(gate, ModuleGate) and not gate.runs_in_forward(module)):
            return function(value, **options)
        if is_relu(function) and not any(options.values()) and not isinstance(value, fx.Proxy):
            return gate.relu(function, value, module.training)
        return gated(module, gate, function(value, **options))

    def copy(self, module: nn.Module, key: str, function: Any) -> Any:
        """Return a function's copy that calls the gates of ``module``, or the function if it is not the one planned."""
        planned, twin = self.copies.get(key, (None, None))
        return functools.partial(twin, self, module) if twin is not None and function is planned else function

    def while_idle(self, module: nn.Module, allowed: Any) -> Any:
        """Return what allows a fused kernel, but ``False`` whenever the gate has something to do."""
        return False if any(gate.gate.acts(module.training) for gate in self) else allowed

    def __iter__(self) -> Iterator[SiteGate]:
        return iter(self.gates.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Sites:
        return Sites(copy.deepcopy(self.gates, memo), self.parts)

    def __reduce__(self) -> Any:
        return (_from_file, (self.gates, self.parts))


def _from_file(gates: Mapping[str, SiteGate], parts: tuple[Part, ...]) -> Sites:
    """Exchange the code in another process, where the classes are still what they were."""
    whole, lost = [], []
    for part in parts:
        try:
            if not part.unchanged:
                raise NotRewritableError("its source is another than when the model was saved")
            part.build(part.edits)
            whole.append(part)
        except (KeyError, AttributeError, NotRewritableError) as error:
            why = str(error) if isinstance(error, NotRewritableError) else "it is no longer there"
            lost.append(f"{part.owner.__qualname__}.{part.name} ({why})")
    if lost:
        warnings.warn(
            f"activations in these methods of a loaded model are not gated: {', '.join(lost)}. Its parameters are in "
            "order and its code is today's; call regimewrap.unwrap and wrap to gate what is there now.",
            stacklevel=2,
        )
    return Sites(gates, tuple(whole))


class ModuleGate(SiteGate):
    """The gate of an activation module whose class's ``forward`` may be one operation with it.

    A ReLU saves its output for backward, and the next layer saves what it is given: with a gate in between these are
    two tensors, in one operation they are one (WRN-28-4 keeps 1.00 times the bytes of the dense net instead of 1.34),
    and memory is written once. The hook of the module has the last word: it gates what ``forward`` did not.
    """

    def runs_in_forward(self, module: nn.Module) -> bool:
        """Say whether the exchanged ``forward`` of ``module`` does the gating, so that the hook need not."""
        # torch.ao puts the hooks of a ReLU that it fuses on the fused module; others replace its forward.
        sites = getattr(module, SITES_ATTRIBUTE, None)
        if sites is None or "forward" in module.__dict__ or getattr(type(module), "forward", None) is not sites.forward:
            return False
        return any(type(hook) is GateHook and hook.gate is self for hook in forward_hooks(module).values())


class GateHook:
    """A forward hook that gates a module's output.

    A class at the top level, not a closure: it can be pickled, and a deep copy of the model takes a copy of it along.
    """

    #: All hooks that exist, also in copies and in models that were read from a file.
    alive: ClassVar[weakref.WeakSet[GateHook]] = weakref.WeakSet()

    def __new__(cls, *_: Any) -> GateHook:
        """Make a hook, and add it to ``alive``."""
        hook = super().__new__(cls)
        cls.alive.add(hook)
        return hook

    def __init__(self, gate: SiteGate) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002  torch fixes the signature
        """Gate ``output``, in the mode of the module itself, unless its ``forward`` has done it."""
        gate = self.gate
        if isinstance(gate, ModuleGate) and gate.runs_in_forward(module):
            return output
        return gated(module, gate, output)


def attach_hook(module: nn.Module, gate: SiteGate) -> None:
    """Gate what ``module`` returns, before any other forward hook of it sees it."""
    module.register_forward_hook(GateHook(gate), prepend=True)
    module.__dict__[SCRIPTING] = refuse_scripting
    shown.show(module)


def attach_sites(module: nn.Module, sites: Sites) -> None:
    """Give ``module`` what its exchanged code asks for."""
    module.__dict__[SITES_ATTRIBUTE] = sites
    module.__dict__[SCRIPTING] = refuse_scripting
    shown.show(module)


def detach(module: nn.Module) -> None:
    """Remove what ``attach_hook`` and ``attach_sites`` put on ``module``, also if it is a copy or came from a file."""
    for number in [number for number, hook in forward_hooks(module).items() if isinstance(hook, GateHook)]:
        remove_forward_hook(module, number)
    for name in (SITES_ATTRIBUTE, GATE_CHILD, SCRIPTING):
        module.__dict__.pop(name, None)
    shown.hide(module)


def refuse_scripting() -> None:
    """Refuse ``torch.jit.script``, which looks here first and would leave out the gates.

    Raises:
        WrapError: always.
    """
    raise WrapError("a wrapped model, or a part of one, cannot be scripted; call regimewrap.unwrap(model) first.")


def is_relu(function: object) -> bool:
    """Say whether a call is a ReLU into a new tensor and nothing else; one that was patched is not."""
    if function is _F_RELU or function is _TORCH_RELU:
        return True
    if type(function) is not nn.ReLU or function.inplace or "forward" in function.__dict__:
        return False
    return not has_hooks(function)


def gated(module: nn.Module, gate: SiteGate, value: Any) -> Any:
    """Gate what an activation returned; while ``torch.fx`` traces, the gate is one call of a leaf."""
    if not isinstance(value, fx.Proxy):
        return gate(value, module.training)
    tracer: Any = value.tracer
    if not isinstance(tracer, fx.Tracer):
        return value  # no trace that will run
    path, site = tracer.path_of_module(module), gate.site.name
    leaf = module.__dict__.setdefault(GATE_CHILD, GraphGates({}).train(module.training))
    leaf.add(gate)
    return tracer.create_proxy("call_module", f"{path}.{GATE_CHILD}" if path else GATE_CHILD, (value, site), {})


class GraphGates(nn.Module):
    """Gates as the child that the nodes of a graph call; it has no state of its own.

    Args:
        gates: name of a site to its gate.
    """

    def __init__(self, gates: Mapping[str, SiteGate]) -> None:
        super().__init__()
        self.__dict__[SITES_ATTRIBUTE] = dict(gates)
        self.__dict__[SCRIPTING] = refuse_scripting

    def add(self, gate: SiteGate) -> None:
        """Add a gate."""
        self.__dict__[SITES_ATTRIBUTE][gate.site.name] = gate

    def forward(self, value: Tensor, site: str) -> Tensor:
        """Gate ``value`` at the site of this name, in this module's mode."""
        gate: SiteGate = self.__dict__[SITES_ATTRIBUTE][site]
        return gate(value, self.training)

    def extra_repr(self) -> str:
        """Say what it gates."""
        return shown.calls(self.__dict__[SITES_ATTRIBUTE].values())
