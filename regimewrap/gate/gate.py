"""The shared gate: one keep ratio for every gated activation of a model.

``TopKGate`` is a handle, not a module: it adds nothing to ``state_dict``, ``named_modules`` or ``parameters``, and it
is found again through the model it belongs to. How it gets behind an activation is the business of ``rewrite``; which
units survive is the business of ``topk``.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regimewrap import torch_private
from regimewrap.errors import NotWrappedError, PolicyError, SelectionError, WrapError
from regimewrap.gate import recompute
from regimewrap.gate.compiled import notice_hooks
from regimewrap.gate.network import NetworkThreshold
from regimewrap.policy.policy import PolicyLike, RegimePolicy, require_ratio
from regimewrap.topk.op import relu_gate, topk_gate

#: The attribute of a wrapped model's ``__dict__`` that holds its gate.
GATE_ATTRIBUTE = "_regimewrap"
#: The attribute of a module with rewritten methods that holds the site gates which these call.
SITES_ATTRIBUTE = "_regimewrap_sites"


@dataclass(frozen=True)
class Site:
    """One place where an activation's output is gated.

    ``name`` is the dotted name of an activation module, or of a module followed by the method and the function called
    in it. ``kind`` is the family of the activation, ``multiplier`` scales the shared keep ratio here, ``channel_dim``
    is the dimension that position scope selects over (``None``: the last, if there are three dimensions at most).
    """

    name: str
    kind: str
    multiplier: float = 1.0
    channel_dim: int | None = None


#: Called at each gated site with the site, the activation's output, and what the gate made of it.
Observer = Callable[[Site, Tensor, Tensor], None]
#: Called with the same while thresholds are being found; returns the one to cut at instead of selecting.
Recorder = Callable[[Site, Tensor, Tensor], float]


class _Setting(NamedTuple):
    """What a forward pass depends on besides its input."""

    keep_ratio: Tensor
    forced: bool
    watched: bool
    thresholds: Mapping[str, float] | None
    network: NetworkThreshold | None

    def lasting(self) -> _Setting:
        """Return it with copies of what is changed in place."""
        keep_ratio = self.keep_ratio.clone()
        network = self.network.frozen(keep_ratio) if self.network is not None else None
        return self._replace(keep_ratio=keep_ratio, network=network)


class GateSample(NamedTuple):
    """What a gate did in some forward passes: calls at a ratio below 1, and the share of them that cut something."""

    calls: int
    bound: float


class TopKGate:
    """The keep ratio that all gated activations of one model share, and the rule by which they select.

    Attributes:
        policy: the ``RegimePolicy`` the model was wrapped with.
        keep_ratio: 0-d float64 tensor on the CPU, in (0, 1]. It stays on the host on purpose: reading it never waits
            for a device, and a compiled graph takes it as an input instead of baking it in. Change it with
            ``set_keep_ratio``. A backward pass keeps to the ratio of its forward pass, also where activation
            checkpointing computes that again; only a checkpoint around compiled code cannot know it, so there change
            the ratio between a backward pass and the next forward pass, as the cycler does.
            A CUDA graph that somebody records by hand keeps the ratio it was recorded at; changing it then warns.
        sites: every gated ``Site``, in the order of the plan.
        thresholds: ``None``, or site names to fixed thresholds that stand in for the selection; see ``set_thresholds``.
        network: the threshold that all sites share in scope "network"; ``None`` in the other scopes.
        observers: called at each site of each forward pass; empty unless somebody watches.
    """

    def __init__(self, policy: PolicyLike | None = None) -> None:
        self.policy = RegimePolicy.of(policy)
        self.keep_ratio = torch.ones((), dtype=torch.float64, device="cpu")
        self.sites: tuple[Site, ...] = ()
        self.thresholds: dict[str, float] | None = None
        self.observers: list[Observer] = []
        self._root: weakref.ref[nn.Module] | None = None
        self._recorder: Recorder | None = None
        # True inside at_keep_ratio: the ratio then holds in eval mode too.
        self._forced = False
        self._blocks = 0  # of at_keep_ratio, one inside the other
        self._forced_in_backward = False
        # False while somebody only looks: what runs meanwhile is no part of a step.
        self._counts = True
        # Somebody recorded a CUDA graph at the ratio as it is now.
        self._in_cuda_graph = False
        # The cycler puts these into force; see set_budget.
        self.dense_rows = torch.zeros(2, dtype=torch.float64, device="cpu")
        self.released = False  # set by unwrap
        self.driver: weakref.ref[Any] | None = None  # the cycler that drives this gate
        rule = self.policy.gate
        self._rule: dict[str, Any] = {
            "scope": rule.scope,
            "score": rule.score,
            "relative_to": rule.relative_to,
            "ties": rule.ties,
            "gradient": rule.gradient,
        }
        self._relu_rule = {name: value for name, value in self._rule.items() if name not in ("score", "gradient")}
        self._masked = rule.gradient == "masked"
        self._min_units = self.policy.sites.min_units
        self._eval_ratio = (
            None
            if rule.eval_keep_ratio == "current"
            else torch.tensor(rule.eval_keep_ratio, dtype=torch.float64, device="cpu")
        )
        self._dense_in_eval = rule.eval_keep_ratio == 1.0
        self.network: NetworkThreshold | None = None
        if rule.scope == "network":
            self.network = NetworkThreshold(self.keep_ratio, self._eval_ratio, rule.relative_to, rule.gradient)

    def set_keep_ratio(self, keep_ratio: float) -> None:
        """Set the share of units kept at every site.

        Args:
            keep_ratio: a fraction in (0, 1]; 1 makes the model bit for bit its dense self.

        Raises:
            PolicyError: the ratio is outside (0, 1] or not a number.
        """
        ratio = require_ratio("keep_ratio", keep_ratio)
        self._budget: float | None = None
        if self._in_cuda_graph and ratio != self.keep_ratio:
            self._in_cuda_graph = False
            warnings.warn(  # first of all: where warnings are errors, nothing has changed
                f"a CUDA graph was recorded at keep ratio {self.keep_ratio:g} and replays that, not {ratio:g}; "
                "record it again after each change, or use torch.compile, which reads the ratio in every run.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.keep_ratio.fill_(ratio)
        if self.network is not None:
            root = self._root() if self._root is not None else None
            self.network.aim({each.device for each in root.parameters()} if root is not None else ())
        notice_hooks()

    def set_budget(self, keep_ratio: float, *, full_share: float = 0.0, update: int = 0) -> None:
        """Set the ratio, the share of each batch at the full budget, and the update that says which rows these are."""
        if getattr(self, "_budget", None) != keep_ratio:
            self.set_keep_ratio(keep_ratio)
        self._budget = keep_ratio
        self.dense_rows[0], self.dense_rows[1] = full_share, update

    def sample_next(self) -> None:
        """Count the operator's calls in the next forward passes in train mode."""
        self._calls = 0

    def take_sample(self) -> GateSample:
        """Return what was counted since ``sample_next``."""
        calls, self._calls = getattr(self, "_calls", 0), -1
        return GateSample(calls + getattr(self, "_compiled", 0), 1.0)

    def set_thresholds(self, thresholds: Mapping[str, float] | None) -> None:
        """Cut at fixed thresholds instead of selecting, in train and eval mode and whatever the keep ratio.

        A unit stays if its score (see ``GatePolicy.score``) is above the site's threshold, or is NaN.

        Args:
            thresholds: site name to threshold; a site without one is left alone. ``None``: select again.

        Raises:
            PolicyError: there is no site of one of these names.
        """
        names = [site.name for site in self.sites]
        for name in thresholds or ():
            if name not in names:
                raise PolicyError(f"no gated site is called {name!r}; sites are {', '.join(names[:8])}.")
        self.thresholds = None if thresholds is None else dict(thresholds)
        notice_hooks()

    def acts(self, training: bool) -> bool:
        """Say whether a site may change anything now, or somebody watches; if not, a fused kernel may bypass it.

        Args:
            training: the mode of the module that owns the site.
        """
        now = self._in_force()
        if now.watched or now.thresholds or torch.compiler.is_compiling():
            return True
        return float(self._ratio(training, now)) < 1.0

    def __call__(self, x: Tensor, site: Site, training: bool) -> Tensor:
        """Gate one activation's output.

        Args:
            x: floating point, any shape; the first dimension counts samples.
            site: where we are.
            training: the mode of the module that owns the site.

        Returns:
            Shape, dtype, device and memory format of ``x``.
        """
        if not isinstance(x, Tensor):
            raise SelectionError(f"{site.name}: an activation returns a tensor; got {type(x).__name__}.")
        y = self._select(x, site, training, self._in_force())
        if self._recorder is not None:
            y = self._cut(x, self._recorder(site, x, y))
        for observe in self.observers:
            observe(site, x, y)
        return y

    def relu(self, function: Callable[[Tensor], Tensor], x: Tensor, site: Site, training: bool) -> Tensor:
        """Return the gated ``function(x)``, a ReLU that makes a new tensor; arguments as for ``__call__``.

        The two are one operation, which saves for backward what the ReLU alone would, unless somebody watches, or the
        gradient or a fixed threshold asks for another.
        """
        now = self._in_force()
        if not self._masked or now.watched or now.thresholds is not None:
            return self(function(x), site, training)
        y = self._select(x, site, training, now, relu_gate)
        if y is x:  # a site that is left alone now
            return function(x)
        return y

    def _select(
        self, x: Tensor, site: Site, training: bool, now: _Setting, select: Callable[..., Tensor] = topk_gate
    ) -> Tensor:
        if now.thresholds is not None:
            return self._cut(x, now.thresholds.get(site.name))
        if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            self._in_cuda_graph = True
        if self._dense_in_eval and not training and not now.forced:
            return x
        if getattr(self, "_calls", -1) >= 0 and training and not torch.compiler.is_compiling():
            self._calls += 1
        if torch.compiler.is_compiling():
            self._compiled = 1
        if self._min_units > 1 and x.dim() > 0 and x.numel() < self._min_units * x.shape[0]:
            return x
        if now.network is not None:
            counted = training and not now.forced and self._counts
            in_eval = not (training or now.forced)
            try:
                return now.network.select(x, in_eval=in_eval, counted=counted, relu=select is relu_gate)
            except SelectionError as error:
                raise SelectionError(f"{site.name}: {error}") from None
        channel_dim = site.channel_dim
        if channel_dim is None:
            if x.dim() > 3 and self._rule["scope"] == "position":
                raise SelectionError(
                    f"{site.name}: nothing tells which dimension of {tuple(x.shape)} holds the channels; set "
                    "gate.channel_dim in the policy (1 for images, -1 for channels last), or exclude the site."
                )
            channel_dim = -1
        try:
            rule = self._rule if select is topk_gate else self._relu_rule
            return select(x, self._ratio(training, now), channel_dim=channel_dim, multiplier=site.multiplier, **rule)
        except SelectionError as error:
            raise SelectionError(f"{site.name}: {error}") from None

    def _cut(self, x: Tensor, threshold: float | None) -> Tensor:
        # One standard operation, which keeps NaN and the memory format, and which every exporter knows.
        if threshold is None:
            return x
        if self._rule["score"] == "magnitude":
            return nn.functional.hardshrink(x, threshold)
        return nn.functional.threshold(x, threshold, 0.0)

    def _ratio(self, training: bool, now: _Setting) -> Tensor:
        if training or now.forced or self._eval_ratio is None:
            return now.keep_ratio
        return self._eval_ratio

    def _in_force(self) -> _Setting:
        """Return what holds now; in a recomputation, what held in the forward pass that it repeats."""
        watched = bool(self.observers) or self._recorder is not None
        now = _Setting(self.keep_ratio, self._forced, watched, self.thresholds, self.network)
        # A compiler puts the recomputation into the graph of the forward pass.
        if torch.compiler.is_compiling() or not recompute.is_likely():
            return now
        running, repeated = recompute.memories()
        depth = self._blocks
        # A block that is itself part of what is repeated forces the ratio again.
        if repeated is not None and self in repeated:
            before, depth = repeated[self]
            now = now._replace(watched=before.watched) if self._forced_in_backward else before
        for memory in running:
            # Of a function with blocks in it, what holds outside of these is to be remembered.
            if self not in memory or memory[self][1] > depth:
                with torch_private.no_dispatch_modes():  # selective checkpointing counts operations
                    memory[self] = now.lasting(), depth
        return now

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Let forward passes in train mode leave no trace in what network scope counts."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def anchor(self, root: nn.Module) -> None:
        """Tell the gate which model it belongs to, so that copies of the whole model get a gate of their own."""
        self._root = weakref.ref(root)

    def __deepcopy__(self, memo: dict[int, Any]) -> TopKGate:
        root = self._root() if self._root is not None else None
        if root is not None and id(root) not in memo:
            # Only a part of the model is being copied (as PEFT does for modules_to_save): it stays under this gate.
            return self
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.keep_ratio = memo[id(self.keep_ratio)] = self.keep_ratio.clone()
        twin.network = copy.deepcopy(self.network, memo)
        twin.observers = []
        if root is not None:
            twin.anchor(memo[id(root)])
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Neither a weak reference nor somebody's observer belongs in a file.
        return {**self.__dict__, "_root": None, "observers": [], "driver": None}

    def __repr__(self) -> str:
        ratio, scope = float(self.keep_ratio), self.policy.gate.scope
        fixed = "" if self.thresholds is None else f", thresholds={len(self.thresholds)}"
        return f"TopKGate(keep_ratio={ratio:g}, scope={scope!r}, sites={len(self.sites)}{fixed})"


class SiteGate:
    """The shared gate as seen from one site: what hooks and rewritten methods call."""

    def __init__(self, gate: TopKGate, site: Site) -> None:
        self.gate = gate
        self.site = site

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """Gate ``x``; see ``TopKGate.__call__``."""
        return self.gate(x, self.site, training)

    def relu(self, function: Callable[..., Tensor], x: Tensor, training: bool) -> Tensor:
        """Return the gated ``function(x)``, a ReLU; see ``TopKGate.relu``."""
        return self.gate.relu(function, x, self.site, training)


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
    attributes = module.__dict__
    holders = [*module._forward_hooks.values(), *attributes.get("gates", ()), *attributes.get(SITES_ATTRIBUTE, ())]
    for holder in holders:
        site_gate = holder if isinstance(holder, SiteGate) else getattr(holder, "gate", None)
        if isinstance(site_gate, SiteGate):
            yield site_gate.gate


def whole_of(part: nn.Module, gate: TopKGate) -> nn.Module | None:
    """Return the wrapped model that ``part`` is a part of; ``None`` if it is that model, a copy, or what is left."""
    root = gate._root() if gate._root is not None else None
    if root is None or root is part or not any(module is part for module in root.modules()):
        return None
    return root


def gate_of(model: nn.Module) -> TopKGate:
    """Return the one gate that a wrapped model's activations share.

    Args:
        model: a wrapped model, or DDP, ``torch.compile`` or any other module around one.

    Raises:
        NotWrappedError: there is no wrapped model in it.
        WrapError: there are several.
    """
    if not isinstance(model, nn.Module):
        raise NotWrappedError(f"expected a wrapped torch.nn.Module; got {type(model).__name__}.")
    gate = find_gate(model)
    if gate is None:
        raise NotWrappedError(
            f"{type(model).__name__} is not wrapped; call regimewrap.wrap(model) first (and keep using that model)."
        )
    return gate


@contextmanager
def at_keep_ratio(model: nn.Module, keep_ratio: float) -> Iterator[TopKGate]:
    """Run a wrapped model at any budget, in train or eval mode, whatever ``eval_keep_ratio`` says.

    Args:
        model: a wrapped model.
        keep_ratio: a fraction in (0, 1].

    Yields:
        The gate. The ratio that was in force comes back on the way out, also after an exception.

    Raises:
        NotWrappedError: the model is not wrapped.
        PolicyError: the ratio is outside (0, 1].
    """
    gate = gate_of(model)
    before = float(gate.keep_ratio), gate._forced, gate._forced_in_backward, gate.thresholds
    gate.set_keep_ratio(keep_ratio)
    gate._forced, gate._forced_in_backward, gate.thresholds = True, torch_private.in_backward(), None
    gate._blocks += 1
    try:
        yield gate
    finally:
        gate._blocks -= 1
        ratio, gate._forced, gate._forced_in_backward, gate.thresholds = before
        gate.set_keep_ratio(ratio)
