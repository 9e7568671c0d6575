"""Did every selected activation really pass the gate? Runs one forward pass and counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from regimewrap.gate.gate import GATE_ATTRIBUTE, Site, TopKGate, gate_of, whole_of
from regimewrap.sites import catalog
from regimewrap.sites.choose import choose
from regimewrap.sites.finder import Activation, find
from regimewrap.sites.flow.purpose import Purpose
from regimewrap.sites.probe import Shapes, untouched


@dataclass(frozen=True)
class Coverage:
    """What one forward pass showed.

    Attributes:
        gated: names of the sites whose activation ran and was gated.
        escaped: activations that the policy selects and that ran, as far as can be told, without a gate.
        idle: sites of the plan that did not run in this pass.
        reasons: by the name of what escaped or did not run, what happened and what to do about it.
    """

    gated: tuple[str, ...]
    escaped: tuple[str, ...]
    idle: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        lines = [f"{len(self.gated)} sites gated, {len(self.escaped)} escaped, {len(self.idle)} did not run"]
        lines += [
            f"  escaped: {name}: {self.reasons[name]}, or exclude it in sites.exclude if it is meant"
            for name in self.escaped
        ]
        lines += [f"  did not run: {name}: {self.reasons[name]}" for name in self.idle if name not in self.escaped]
        return "\n".join(lines)


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Coverage:
    """Run one forward pass and compare what was gated with the activations that really ran.

    Args:
        model: a wrapped model, or a part of one, in the mode to be checked.
        *args: passed to the model.
        **kwargs: passed to the model.

    Returns:
        The coverage; print it. Buffers, random number generators and what watches the gate are as they were.

    Raises:
        NotWrappedError: the model is not wrapped.
    """
    gate = gate_of(model)
    root, prefix = _root_of(model, gate)
    census = _Census(root)
    watching = gate.observers
    gate.observers = [census.saw_gate]
    try:
        with untouched(model), gate.uncounted(), torch.compiler.set_stance("force_eager"), census.watching():
            model(*args, **kwargs)
    finally:
        gate.observers = watching
    gated = dict.fromkeys(site.name for site in census.gated_sites)
    idle = [site.name for site in gate.sites if site.name not in gated and f"{site.name}.".startswith(prefix)]
    sites = {site.name for site in gate.sites}
    escaped = {each.name: census.reason(each, sites) for each in census.escaped(gate.policy.sites)}
    bypassed, reasons = census.why_idle([name for name in idle if name not in escaped])
    escaped |= bypassed
    return Coverage(tuple(gated), tuple(escaped), tuple(idle), reasons | escaped)


def _root_of(model: nn.Module, gate: TopKGate) -> tuple[nn.Module, str]:
    """Return the wrapped model that ``model`` is, holds or is a part of, and how names of what is in it start."""
    for module in model.modules():
        if module.__dict__.get(GATE_ATTRIBUTE) is gate:
            return module, ""
    root = whole_of(model, gate)
    if root is None:
        return model, ""  # copies of graph modules lose plain attributes
    return root, next(f"{path}." for path, module in root.named_modules() if module is model)


class _Census(TorchFunctionMode):
    """Every activation that runs, and every tensor that a gate sees."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.gated_sites: list[Site] = []
        self._root = root
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._stack: list[nn.Module] = []
        self._called: set[str] = set()
        # Tensors are kept, so that no other one takes their identity meanwhile.
        self._ran: list[tuple[Activation, Any]] = []
        self._seen: dict[int, Tensor] = {}
        self._made: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}
        self._shapes = Shapes()

    def saw_gate(self, site: Site, before: Tensor, after: Tensor) -> None:  # an Observer
        self.gated_sites.append(site)
        self._seen[id(before)] = before
        if self._stack:
            self._made[id(after)] = self._stack[-1], before, after

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
            self._called.add(self._paths[id(module)])
            self._shapes.record(self._paths[id(module)], args, output)
        inside, before, _ = self._made.get(id(output), (None, None, None))
        if inside is module:  # a ReLU returns what it has gated by itself
            output = before
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
        seen = {activation.module for activation, _ in self._ran}
        for activation in planned:
            hidden = activation.problem is not None and activation.method is None and activation.module not in seen
            if hidden and self._entered(activation.module) and choose(policy, activation, purpose)[0]:
                yield activation

    def reason(self, activation: Activation, sites: Set[str]) -> str:
        """Say why an activation escaped, and what to do about it."""
        if activation.problem is not None:
            return f"{activation.problem}; put a plain module in its place and unwrap and wrap again"
        module = self._module(activation.module)
        if activation.name in sites and module is not None:
            return f"a {type(module).__name__} was put in the place of what was gated; unwrap and wrap again"
        if activation.name != activation.module and not _is_made(activation):
            caller = type(module).__name__ if module is not None else activation.module
            return (
                f"{caller} calls it in code that was not there, or not seen, when the model was wrapped (a replaced "
                "forward, or a module's forward called directly); call modules, not their forward, and unwrap and wrap "
                "again"
            )
        return "it was put in, or made, after the model was wrapped; unwrap and wrap again"

    def why_idle(self, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Say of sites that did not run why: those that a replaced forward goes around, and the others."""
        bypassed, idle = {}, {}
        for name in names:
            parts = name.split(".")
            paths = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
            path = next(path for path in paths if path in self._called or path == "")
            module = self._module(path)
            gone = not hasattr(module, parts[len(path.split(".")) if path else 0])
            kind = type(module).__name__
            replaced = module is not None and "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
            # A forward that leads to other sites of the module is the module's own.
            replaced = replaced and not any(self._is_own_call(site.name, path, module) for site in self.gated_sites)
            if replaced:
                bypassed[name] = (
                    f"the forward of {path or 'the model'} ({kind}) has been replaced, by a fused kernel perhaps, "
                    "and goes around it; put its own forward back"
                )
            elif gone:
                idle[name] = (
                    f"it is no longer in the model: {path or 'the model'} is a {kind} now; if that computes an "
                    "activation out of sight, put back what was there; unwrap and wrap again"
                )
            elif path:
                idle[name] = f"{path} ({kind}) ran without it: a branch that was not taken, or a class that was patched"
            else:
                idle[name] = "its part of the model did not run"
        return bypassed, idle

    @staticmethod
    def _is_own_call(name: str, path: str, module: nn.Module | None) -> bool:
        """Whether a site is a call in a method of the module with this path."""
        inside = name.removeprefix(f"{path}." if path else "")
        return (inside != name or not path) and inside.partition(".")[0] not in getattr(module, "_modules", ())

    def _entered(self, path: str) -> bool:
        """Whether a module ran; of scripted ones only the outermost is seen."""
        parts = path.split(".")
        above = [".".join(parts[:length]) for length in range(len(parts) + 1)]
        scripted = next((each for each in above if isinstance(self._module(each), torch.jit.ScriptModule)), path)
        return scripted in self._called

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self._root.get_submodule(path)
        except AttributeError:
            return None


def _is_made(activation: Activation) -> bool:
    """Say whether an activation that ran is a module that the tree of modules does not have."""
    return activation.label[:1].isupper() and activation.name != activation.module
