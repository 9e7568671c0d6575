"""The shared gate: one keep ratio for every gated activation of a model.

``TopKGate`` is a handle, not a module: it adds nothing to ``state_dict``, ``named_modules`` or ``parameters``, and it
is found again through the model it belongs to. ``rewrite`` puts it behind activations, ``topk`` says which units
survive. This file is the door of the room: what other rooms use is named here.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regimewrap.errors import PolicyError, SelectionError
from regimewrap.gate.budget import Budget, Setting, at_keep_ratio
from regimewrap.gate.compiled import notice_hooks
from regimewrap.gate.find import find_gate, gate_of, whole_of
from regimewrap.gate.network import NetworkThreshold
from regimewrap.gate.site import GATE_ATTRIBUTE, SITES_ATTRIBUTE, Observer, Recorder, Site, SiteGate, cut
from regimewrap.gate.told import Told
from regimewrap.policy.policy import PolicyLike, RegimePolicy, require_ratio
from regimewrap.topk import sampling
from regimewrap.topk.op import topk_gate
from regimewrap.topk.sampling import GateSample

__all__ = [
    "GATE_ATTRIBUTE",
    "SITES_ATTRIBUTE",
    "GateSample",
    "Site",
    "SiteGate",
    "TopKGate",
    "at_keep_ratio",
    "find_gate",
    "gate_of",
    "whole_of",
]


class TopKGate:
    """The keep ratio that all gated activations of one model share, and the rule by which they select.

    Attributes:
        policy: the ``RegimePolicy`` the model was wrapped with.
        keep_ratio: 0-d float64 tensor on the CPU, in (0, 1]. It stays on the host on purpose: reading it never waits
            for a device, and a compiled graph takes it as an input instead of baking it in. Assign a number to it, or
            call ``set_budget``, after a backward pass and before the next forward pass. A backward pass keeps to the
            ratio of its forward pass; where activation checkpointing computes that again, another ratio raises
            ``BudgetError``. A CUDA graph that is recorded by hand keeps its budget; changing that then warns.
        dense_rows: the share of each batch's rows that run at the full budget in train mode, and the number of updates
            so far, which says which rows these are; float64 tensor of shape (2,) on the CPU. Change it with
            ``set_budget``.
        budget: what both of these are filled from: what was set, and the blocks of ``at_keep_ratio`` that are open.
        sites: every gated ``Site``, in the order of the plan.
        thresholds: ``None``, or site names to fixed thresholds that stand in for the selection; see ``set_thresholds``.
        network: the threshold that all sites share in scope "network"; ``None`` in the other scopes.
        observers: called at each site of each forward pass; empty unless something watches.
        released: whether ``unwrap`` took the gate off its model.
        driver: the ``RegimeCycler`` that drives the gate, as a weak reference; ``None`` without one.
        copies: the gates of deep copies of its model, as far as they live.

    >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 10), nn.GELU()))
    >>> regimewrap.gate_of(model).set_keep_ratio(0.2)
    >>> (model(torch.randn(1, 4)) != 0).sum()
    tensor(2)
    """

    def __init__(self, policy: PolicyLike | None = None) -> None:
        self.policy = RegimePolicy.of(policy)
        self.budget = Budget(Setting(1.0))
        self.keep_ratio, self.dense_rows = self.budget.keep_ratio, self.budget.dense_rows
        self.sites: tuple[Site, ...] = ()
        self.thresholds: dict[str, float] | None = None
        self.observers: list[Observer] = []
        self.released = False
        self.driver: weakref.ref[Any] | None = None
        self.copies: weakref.WeakSet[TopKGate] = weakref.WeakSet()
        self._root: weakref.ref[nn.Module] | None = None
        self._recorder: Recorder | None = None
        self._counts = True  # False while what runs is no part of a step, as in verify
        self._told = Told()
        rule = self.policy.gate
        self._rule: dict[str, Any] = rule.model_dump(exclude={"eval_keep_ratio", "channel_dim"})
        self._masked = rule.gradient == "masked"
        self._min_units = self.policy.sites.min_units
        fixed = None if rule.eval_keep_ratio == "current" else rule.eval_keep_ratio
        self._eval_ratio = None if fixed is None else torch.tensor(fixed, dtype=torch.float64, device="cpu")
        self._dense_in_eval = rule.eval_keep_ratio == 1.0
        self.network: NetworkThreshold | None = None
        if rule.scope == "network":
            self.network = NetworkThreshold(self.keep_ratio, self._eval_ratio, rule.relative_to, rule.gradient)

    def set_budget(self, keep_ratio: float, *, full_share: float = 0.0, update: int = 0) -> None:
        """Set the budget of the next forward passes; a few microseconds.

        Args:
            keep_ratio: the share of units kept at every site; a fraction in (0, 1].
            full_share: the share of rows (entries of a tensor's first dimension) that keep all their units in train
                mode, the same rows at all sites; a fraction in [0, 1). In scopes "sample" and "position" the other
                rows compete as they do without dense rows; in scopes "batch" and "network" the dense ones take no part.
            update: optimizer updates so far, which says which rows: of n rows
                m = floor((update + 1) * n * full_share) - floor(update * n * full_share), the leading ones where
                ``update`` is even, the trailing ones where it is odd. So an even batch at 0.5 has one half dense, and a
                batch of one is dense in every other update.

        Inside ``at_keep_ratio`` it holds from the end of the block on.

        Raises:
            PolicyError: a value is out of range or not a number; the budget is then as it was.

        >>> gate = regimewrap.TopKGate()
        >>> gate.set_budget(0.1, full_share=0.5, update=3)
        >>> gate.keep_ratio, gate.dense_rows
        (tensor(0.1000, dtype=torch.float64), tensor([0.5000, 3.0000], dtype=torch.float64))
        """
        self._settle(Setting.checked(keep_ratio, full_share, update))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "keep_ratio" and value is not self.budget.keep_ratio:
            return self.set_keep_ratio(value)  # the tensor itself stays the one that sites read
        return super().__setattr__(name, value)

    def set_keep_ratio(self, keep_ratio: float) -> None:
        """Set the share of units kept at every site; ``gate.keep_ratio = 0.1`` does the same.

        Args:
            keep_ratio: a fraction in (0, 1]; 1 makes the model bit for bit its dense self. Inside ``at_keep_ratio`` it
                holds from the end of the block on.

        Raises:
            PolicyError: the ratio is outside (0, 1] or not a number.

        >>> gate = regimewrap.TopKGate()
        >>> gate.set_keep_ratio(0.1)
        >>> float(gate.keep_ratio)
        0.1
        """
        self._settle(self.budget.settled._replace(keep_ratio=require_ratio("keep_ratio", keep_ratio)))

    def _settle(self, setting: Setting) -> None:
        self.budget.settle(setting)
        self._aim()

    def _aim(self) -> None:
        if self.network is not None:
            root = self._root() if self._root is not None else None
            self.network.aim({each.device for each in root.parameters()} if root is not None else ())
        notice_hooks()

    @contextmanager
    def forcing(self, keep_ratio: float) -> Iterator[None]:
        """Let all rows run at a ratio; see ``at_keep_ratio``."""
        try:
            with self.budget.forcing(keep_ratio):
                self._aim()
                yield
        finally:
            self._aim()

    def sample_next(self) -> None:
        """Note from now on, in train mode and outside of ``at_keep_ratio``, which calls cut; costs two passes each."""
        sampling.begin(self.keep_ratio)

    def take_sample(self) -> GateSample:
        """Return what was noted since ``sample_next``, and note no more; waits for the device.

        >>> gate = regimewrap.TopKGate()
        >>> gate.sample_next()
        >>> gate.take_sample()
        GateSample(calls=0, bound=0.0)
        """
        return sampling.end(self.keep_ratio)

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
        """Say whether a site may change anything now, or something watches; if not, a fused kernel may bypass it.

        Args:
            training: the mode of the module that owns the site.
        """
        return bool(self.observers or self._recorder is not None or self._fixed()) or self._cuts(training)

    def _cuts(self, training: bool) -> bool:
        return torch.compiler.is_compiling() or float(self._ratio(training)) < 1.0

    def __call__(self, x: Tensor, site: Site, training: bool) -> Tensor:
        """Gate one activation's output.

        Args:
            x: floating point, any shape; the first dimension counts samples. Anything else is returned as it is, with
                one warning a site.
            site: where we are.
            training: the mode of the module that owns the site.

        Returns:
            Shape, dtype, device and memory format of ``x``.
        """
        if not self._told.is_ranked(x, site):
            return x
        y = self._select(x, site, training)
        if self._recorder is not None:
            y = cut(x, self._recorder(site, x, y), self._rule["score"])
        for observe in self.observers:
            observe(site, x, y)
        return y

    def relu(self, function: Callable[[Tensor], Tensor], x: Tensor, site: Site, training: bool) -> Tensor:
        """Return the gated ``function(x)``, a ReLU that makes a new tensor; arguments as for ``__call__``.

        The two are one operation, which saves for backward what the ReLU alone would, unless the gradient or a fixed
        threshold asks for another.
        """
        if not self._masked or self._recorder is not None or self._fixed() is not None:
            return self(function(x), site, training)
        if not self._told.is_ranked(x, site):
            return function(x)
        if self.observers:
            return self._watched_relu(function, x, site, training)
        y = self._select(x, site, training, after_relu=True)
        return function(x) if y is x else y  # where the site is left alone now

    def _watched_relu(self, function: Callable[[Tensor], Tensor], x: Tensor, site: Site, training: bool) -> Tensor:
        # Autograd must save what it does when nothing watches, as a checkpoint may have one pass watched of two.
        y = self._select(x, site, training, after_relu=True) if self._cuts(training) else x
        if y is x:
            before = y = function(x)
        else:
            with torch.no_grad():
                before = function(x)
        for observe in self.observers:
            observe(site, before, y)
        return y

    def _select(self, x: Tensor, site: Site, training: bool, after_relu: bool = False) -> Tensor:
        if not torch.compiler.is_compiling():
            self.budget.look(x)
        fixed = self._fixed()
        if fixed is not None:
            return cut(x, fixed.get(site.name), self._rule["score"])
        forced = self.budget.forced
        if self._dense_in_eval and not training and not forced:
            return x
        if x.dim() == 1 and self._rule["scope"] == "sample" and self._cuts(training):
            self._told.of_single_units(x, site)
        if self._min_units > 1 and x.dim() > 0 and x.numel() < self._min_units * x.shape[0]:
            return x
        dense_rows = self.dense_rows if training else None
        try:
            if self.network is not None:
                counted, in_eval = training and not forced and self._counts, not (training or forced)
                return self.network.select(x, dense_rows, in_eval=in_eval, counted=counted, after_relu=after_relu)
            return topk_gate(
                x,
                self._ratio(training),
                dense_rows=dense_rows,
                channel_dim=site.channels_of(x, self._rule["scope"]),
                multiplier=site.multiplier,
                after_relu=after_relu,
                **self._rule,
            )
        except SelectionError as error:
            raise SelectionError(f"{site.name}: {error}") from None

    def _fixed(self) -> dict[str, float] | None:
        """Return the fixed thresholds in force."""
        return None if self.budget.forced else self.thresholds

    def _ratio(self, training: bool) -> Tensor:
        if training or self._eval_ratio is None or self.budget.forced:
            return self.keep_ratio
        return self._eval_ratio

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Keep the forward passes in the block out of what network scope counts."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def anchor(self, root: nn.Module) -> None:
        """Note the model that the gate belongs to, so that a copy of the whole model gets its own gate."""
        self._root = weakref.ref(root)

    @property
    def root(self) -> nn.Module | None:
        """The model it belongs to; ``None`` if that is gone, or was read from a file and not looked up yet."""
        return self._root() if self._root is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> TopKGate:
        root = self.root
        if root is not None and id(root) not in memo:
            # Only a part of the model is being copied (as PEFT does for modules_to_save): it stays under this gate.
            return self
        twin = self._twin(memo)
        if root is not None:
            twin.anchor(memo[id(root)])
        self.copies.add(twin)
        return twin

    def _twin(self, memo: dict[int, Any]) -> TopKGate:
        """Return a copy without the model, the observers, the driver and the open blocks of this one."""
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.budget = copy.deepcopy(self.budget, memo)
        twin.keep_ratio, twin.dense_rows = twin.budget.keep_ratio, twin.budget.dense_rows
        twin.network = copy.deepcopy(self.network, memo)
        twin.observers, twin.driver, twin._root, twin._told = [], None, None, Told()
        twin.copies = weakref.WeakSet()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = self._twin({}).__dict__
        del state["copies"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, copies=weakref.WeakSet())
        self.keep_ratio, self.dense_rows = self.budget.keep_ratio, self.budget.dense_rows
        if self.network is not None:
            self.network.keep_ratio = self.keep_ratio

    def __repr__(self) -> str:
        ratio, share = float(self.keep_ratio), float(self.dense_rows[0])
        rows = f", full_share={share:g}" if share else ""
        fixed = "" if self.thresholds is None else f", thresholds={len(self.thresholds)}"
        return f"TopKGate(keep_ratio={ratio:g}{rows}, scope={self.policy.gate.scope!r}, sites={len(self.sites)}{fixed})"
