"""Did every selected activation really pass the gate? Runs one forward pass and counts."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regimewrap.files import Table, Tabled
from regimewrap.gate.gate import GATE_ATTRIBUTE, Site, TopKGate, gate_of, whole_of
from regimewrap.policy.policy import SitePolicy
from regimewrap.sites.census import Census
from regimewrap.sites.choose import choose
from regimewrap.sites.finder import Activation, find
from regimewrap.sites.flow.dataflow import Dataflow
from regimewrap.sites.flow.purpose import Purpose
from regimewrap.sites.probe import untouched
from regimewrap.sites.read.memory import remembering
from regimewrap.sites.survey import Verdict


@dataclass(frozen=True, repr=False)
class Coverage(Tabled):
    """What one forward pass showed.

    Attributes:
        gated: names of the sites whose activation ran and was gated.
        escaped: activations that the policy selects and that ran, as far as is known, without a gate.
        idle: sites of the plan that did not run in this pass.
        reasons: by the name of what escaped or did not run, what happened and what to do about it.
    """

    gated: tuple[str, ...]
    escaped: tuple[str, ...]
    idle: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __repr__(self) -> str:
        return f"Coverage(gated={len(self.gated)}, escaped={len(self.escaped)}, idle={len(self.idle)})"

    def _table(self) -> Table:
        head = f"{len(self.gated)} sites gated, {len(self.escaped)} escaped, {len(self.idle)} did not run"
        unless = "or exclude it in sites.exclude if it is meant"
        rows = [(name, "escaped", f"{self.reasons[name]}, {unless}") for name in self.escaped]
        rows += [(name, "did not run", self.reasons[name]) for name in self.idle if name not in self.escaped]
        return Table([("activation", "state", "why"), *rows] if rows else [], head, left=range(3))


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Coverage:
    """Run one forward pass and compare what was gated with the activations that really ran.

    Args:
        model: a wrapped model, or a part of one, in the mode to be checked.
        *args: passed to the model.
        **kwargs: passed to the model.

    Returns:
        The coverage; print it. Buffers, random number generators and what watches the gate are as they were. Each name
        in it may stand in ``sites.exclude`` or ``sites.include``.

    Raises:
        NotWrappedError: the model is not wrapped.
        WrapError: lazy layers would have to be made, and the model cannot be copied.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)))
    >>> print(regimewrap.verify(model, torch.randn(3, 4)))
    1 sites gated, 0 escaped, 0 did not run
    """
    with remembering():
        return watched(model, args, kwargs)[0]


def watched(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], verdicts: Sequence[Verdict] = ()
) -> tuple[Coverage, Any]:
    """Return the coverage of one forward pass, and what the model returned; ``verdicts`` are those of a plan."""
    gate = gate_of(model)
    root, prefix = _root_of(model, gate)
    known = {each.activation.name: each.selected for each in verdicts}
    planned = [each.activation for each in verdicts] or find(root)
    gated_sites: list[Site] = []
    seen: dict[int, Tensor] = {}
    made: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}

    def saw_gate(site: Site, before: Tensor, after: Tensor) -> None:  # an Observer
        gated_sites.append(site)
        seen[id(before)] = before
        if census.stack:
            made[id(after)] = census.stack[-1], before, after

    def before_gate(module: nn.Module, output: Any) -> Any:
        inside, before, _ = made.get(id(output), (None, None, None))
        return before if inside is module else output  # a ReLU with its gate inside returns the gated value

    census = Census(root, planned, before_gate)
    watching = gate.observers
    gate.observers = [saw_gate]
    try:
        with untouched(model), gate.uncounted(), torch.compiler.set_stance("force_eager"), census.watching():
            output = model(*args, **kwargs)
    finally:
        gate.observers = watching
    judge = _Judge(root, planned, census, gate.policy.sites, known, {site.name for site in gated_sites})
    gated = dict.fromkeys(site.name for site in gated_sites)
    idle = [site.name for site in gate.sites if site.name not in gated and f"{site.name}.".startswith(prefix)]
    sites = {site.name for site in gate.sites}
    escaped = {each.name: judge.reason(each, sites) for each in judge.escaped(seen)}
    bypassed, reasons = judge.why_idle([name for name in idle if name not in escaped])
    escaped |= bypassed
    return Coverage(tuple(gated), tuple(escaped), tuple(idle), reasons | escaped), output


def _root_of(model: nn.Module, gate: TopKGate) -> tuple[nn.Module, str]:
    """Return the wrapped model that ``model`` is, holds or is a part of, and how names of what is in it start."""
    for module in model.modules():
        if module.__dict__.get(GATE_ATTRIBUTE) is gate:
            return module, ""
    root = whole_of(model, gate)
    if root is None:
        return model, ""  # copies of graph modules lose plain attributes
    return root, next(f"{path}." for path, module in root.named_modules() if module is model)


class _Judge:
    """Tells which of the activations that ran escaped, and why."""

    def __init__(
        self,
        root: nn.Module,
        planned: list[Activation],
        census: Census,
        policy: SitePolicy,
        known: Mapping[str, bool],
        gated: set[str],
    ) -> None:
        self._gated = gated
        self._root, self._planned, self._ran, self._called = root, planned, census.ran, census.called
        self._policy, self._known_to_plan = policy, known
        self._purpose = functools.cache(lambda: Purpose(Dataflow(root), census.shapes))

    def _selects(self, activation: Activation) -> bool:
        known = self._known_to_plan.get(activation.name)
        return choose(self._policy, activation, self._purpose())[0] if known is None else known

    def escaped(self, seen: Mapping[int, Tensor]) -> Iterator[Activation]:
        """Yield what the policy selects and no gate saw."""
        for activation, output, planned in self._ran:
            if id(output) in seen:
                continue
            known = [] if planned else self._known(activation)
            if all(map(self._selects, known or [activation])):
                yield known[0] if len(known) == 1 else activation
        ran = {each.activation.module for each in self._ran}
        for activation in self._planned:
            hidden = activation.problem is not None and activation.call is None and activation.module not in ran
            if hidden and self._entered(activation.module) and self._selects(activation):
                yield activation

    def _known(self, activation: Activation) -> list[Activation]:
        """Return what the plan may call an activation that ran in code it does not know, such as a traced method.

        Of several calls of one function nothing tells which this was; it may be one that was left alone.
        """
        return [
            each
            for each in self._planned
            if (each.call is not None or each.problem is not None)
            and each.module == activation.module
            and (each.short == activation.label or (_is_made(activation) and each.kind == activation.kind))
        ]

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
            replaced = replaced and not any(self._is_own_call(each, path, module) for each in self._gated)
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
    return activation.call is None and activation.label[:1].isupper() and activation.name != activation.module
