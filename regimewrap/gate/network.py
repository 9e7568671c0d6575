"""The threshold that all sites of a model share in scope "network", and the counts that it comes from.

During a step every site adds a histogram of its scores. When the step ends, the next step's threshold is the quantile
of their sum. It is filled in on the device; nothing waits for it. ``gate`` decides which tensors pass by, ``cycler``
when a step ends, and ``topk`` how scores are counted and cut.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from regimewrap import torch_private
from regimewrap.topk.selection import Selection, check_selection
from regimewrap.topk.threshold import BINS, count_scores, threshold_at, threshold_gate

if TYPE_CHECKING:
    from collections.abc import Iterable

_AS_IN_SAMPLE_SCOPE = Selection(scope="sample")


class _There(NamedTuple):
    """What sites on one device read and write; only ever filled in place, so that compiled graphs hold no stale one."""

    counts: Tensor  # of the running step; int64, shape (BINS,)
    threshold: Tensor  # at the keep ratio; 0-d float32
    eval_threshold: Tensor  # at the policy's ratio for eval mode


@final
class NetworkThreshold:
    """One threshold for all sites, on every device they are on."""

    def __init__(self, keep_ratio: Tensor, eval_ratio: Tensor | None, relative_to: str, gradient: str) -> None:
        """Begin without a threshold.

        Args:
            keep_ratio: the gate's own 0-d tensor, which it changes in place; call ``aim`` afterwards.
            eval_ratio: the same for eval mode, which never changes; ``None`` if that is ``keep_ratio``.
            relative_to: as in ``GatePolicy``.
            gradient: as in ``GatePolicy``.
        """
        self.keep_ratio = keep_ratio
        self.eval_ratio = eval_ratio
        self.relative_to = relative_to
        self.gradient = gradient
        #: Of the last step in which anything was counted, over all ranks; int64, shape (BINS,). Never changed in place.
        self.histogram: Tensor | None = None
        # On the host, for operators to read without waiting; 0-d boolean.
        self.known = torch.zeros((), dtype=torch.bool, device="cpu")
        self._devices: dict[torch.device, _There] = {}

    def select(self, x: Tensor, dense_rows: Tensor | None, *, in_eval: bool, counted: bool, after_relu: bool) -> Tensor:
        """Gate one tensor at the threshold, or among its samples' units as long as there is none.

        Args:
            x: floating point, any shape and device.
            dense_rows: which entries of the first dimension are neither cut nor counted; as for ``topk_gate``.
            in_eval: whether the ratio for eval mode holds.
            counted: whether this is a part of a training step.
            after_relu: apply a ReLU to ``x`` first.

        Raises:
            SelectionError: ``x`` is not a tensor that can be gated.
        """
        check_selection(x, _AS_IN_SAMPLE_SCOPE, 1.0)
        there = self._on(x.device)
        # Inside a backward pass this is a recomputation of what was counted before.
        if counted and (torch.compiler.is_compiling() or not torch_private.in_backward()):
            count_scores(x, there.counts, dense_rows=dense_rows, after_relu=after_relu)
        ratio, threshold = self.keep_ratio, there.threshold
        if in_eval and self.eval_ratio is not None:
            ratio, threshold = self.eval_ratio, there.eval_threshold
        return threshold_gate(
            x,
            ratio,
            threshold,
            self.known,
            dense_rows=dense_rows,
            relative_to=self.relative_to,
            gradient=self.gradient,
            after_relu=after_relu,
        )

    def aim(self, devices: Iterable[torch.device] = ()) -> None:
        """Fill in the thresholds for the ratios as they are now.

        Args:
            devices: where else thresholds will be needed: known before a model is compiled, they are not made in its
                graph.
        """
        for device in devices:
            self._on(device)
        if self.histogram is None:
            return
        for ratio, name in ((self.keep_ratio, "threshold"), (self.eval_ratio, "eval_threshold")):
            share = 1.0 if ratio is None else ratio.item()
            if share < 1.0:
                threshold = threshold_at(self.histogram, share, self.relative_to)
                for there in self._devices.values():
                    getattr(there, name).copy_(threshold, non_blocking=True)

    def take(self, histogram: Tensor | None) -> None:
        """Use another histogram from now on, or none."""
        self.histogram = histogram
        self.known.fill_(histogram is not None)
        self.aim()

    def counts(self) -> list[Tensor]:
        """Return the counts of the running step, one tensor for each device."""
        return [there.counts for there in self._devices.values()]

    def _on(self, device: torch.device) -> _There:
        there = self._devices.get(device)
        if there is None:
            compiled = torch.compiler.is_compiling()
            with (
                torch.inference_mode(mode=False),  # else nothing could change them outside of it
                # Real tensors, also where a mode would make or count others. Works from its creation on, so not above.
                nullcontext() if compiled else torch_private.no_dispatch_modes(),
            ):
                there = self._made_on(device)
        return there

    def _made_on(self, device: torch.device) -> _There:
        counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        thresholds = (torch.zeros((), dtype=torch.float32, device=device) for _ in range(2))
        there = self._devices[device] = _There(counts, *thresholds)
        self.aim()
        return there

    def __getstate__(self) -> dict[str, Any]:
        # A file may be loaded where there are other devices; between steps nothing is lost with the counts.
        return {**self.__dict__, "_devices": {}}
