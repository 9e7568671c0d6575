"""Thresholds from histograms: what a site saw, and the one that keeps as much of it as the selection did."""

from __future__ import annotations

import torch
from torch import Tensor

from regimewrap.errors import DataError
from regimewrap.gate.gate import Site

_ZERO_BIN = 0x8000


class Recorder:
    """What each site saw, at one budget, and how much of it the selection kept."""

    def __init__(self, score: str) -> None:
        self.batch = 0
        self.seen: dict[str, Histogram] = {}
        self._magnitude = score == "magnitude"

    def __call__(self, site: Site, before: Tensor, after: Tensor) -> float:
        """Count what a site saw; return the threshold to cut at meanwhile."""
        if before.is_meta:
            raise DataError(f"{site.name}: the model has no values to calibrate with (it is on the meta device).")
        score = (before.abs() if self._magnitude else before).float()
        if not bool(score.isfinite().all()):
            raise DataError(
                f"{site.name}: an activation was NaN or infinite in batch {self.batch} (counted from 0). "
                "Leave that batch out, or look for the cause in the bare model."
            )
        histogram = self.seen.setdefault(site.name, Histogram())
        histogram.add(score, int(after.count_nonzero()))
        return self.threshold(site.name)

    def threshold(self, site: str) -> float:
        """Return a site's threshold as far as is known."""
        histogram = self.seen[site]
        # A magnitude that is left alone must not be cut where it is smaller than it ever was here.
        return 0.0 if self._magnitude and not histogram.binds else histogram.threshold


class Histogram:
    """Counts of scores that are not zero, by the upper 16 bits of their float32 pattern.

    Floats order like integers if the patterns of negative ones are turned round. A bin is narrower than 0.8 % of its
    values, and includes its upper edge: bfloat16 values are edges. Empty bins take no memory.
    """

    def __init__(self) -> None:
        self._bins = torch.empty(0, dtype=torch.int64)  # ascending
        self._counts = torch.empty(0, dtype=torch.int64)
        self._kept = 0

    def add(self, score: Tensor, kept: int) -> None:
        """Count the scores of one call, and how many of those that are not zero the selection kept."""
        bits = score.contiguous().view(torch.int32).flatten()
        order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        counts = torch.bincount(((order + 0xFFFF) >> 16) + _ZERO_BIN, minlength=_ZERO_BIN + 1).cpu()
        counts[_ZERO_BIN] = 0
        bins = counts.nonzero().squeeze(1)
        self._bins, place = torch.unique(torch.cat((self._bins, bins)), return_inverse=True)
        merged = torch.zeros_like(self._bins)
        self._counts = merged.index_add_(0, place, torch.cat((self._counts, counts[bins])))
        self._kept += kept

    @property
    def binds(self) -> bool:
        """Whether the selection cut anything that was not zero already."""
        return self._kept < int(self._counts.sum())

    @property
    def threshold(self) -> float:
        """The bin edge above which there are as many scores, as nearly as edges allow, as the selection kept."""
        if not len(self._bins):
            return 0.0
        if self._kept == 0:  # as it may be in network scope
            return _edge(int(self._bins[-1]) + 1)
        above = self._counts.flip(0).cumsum(0).flip(0)  # scores in each bin and those above it
        first = max(int((above >= self._kept).sum()) - 1, 0)
        if first + 1 < len(above) and self._kept - above[first + 1] < above[first] - self._kept:
            first += 1
        return _edge(int(self._bins[first]))


def _edge(place: int) -> float:
    """Return the lower edge of a bin."""
    order = (place - _ZERO_BIN - 1) << 16
    bits = order if order >= 0 else order ^ 0x7FFFFFFF
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
