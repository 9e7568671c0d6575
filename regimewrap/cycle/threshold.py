"""The end of a step in scope "network": what all sites and ranks counted becomes the next step's threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from regimewrap.cycle import ranks
from regimewrap.topk.threshold import BINS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regimewrap.gate.network import NetworkThreshold


def end_step(thresholds: Sequence[NetworkThreshold], update: int, *, meet: bool) -> None:
    """Take what was counted since the last call as the histogram of all these thresholds.

    Args:
        thresholds: one or several that count together; the same number on all ranks, all of which call this.
        update: where we are, for messages.
        meet: whether the ranks make sure first that all have come.

    Raises:
        SyncError: a rank does not come, or ended.
    """
    counts = [each for threshold in thresholds for each in threshold.counts()]
    # The sum is made on an accelerator if there is one: fetching it from there would wait.
    home = next((each.device for each in counts if each.device.type != "cpu"), torch.device("cpu"))
    if counts:
        total = counts[0].to(home, copy=True, non_blocking=True)
    else:
        total = torch.zeros(BINS, dtype=torch.int64, device=home)
    for each in counts[1:]:
        total += each.to(home, non_blocking=True)
    for each in counts:
        each.zero_()
    ranks.add_up(total, update, meet=meet)
    for threshold in thresholds:
        last = threshold.histogram
        if last is None or home.type == "cpu":  # waits for a device, but only until there is something
            if total.sum().item():
                threshold.take(total)
        else:  # a step without a forward pass in train mode changes nothing
            threshold.take(torch.where(total.any(), total, last.to(home)))
