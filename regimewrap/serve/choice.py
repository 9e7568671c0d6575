"""Dense or sparse: one layer's choice, measured where it runs.

A layer is timed in the calls that are made anyway, with caches as the model leaves them: dense and sparse in turn, and
then the faster one. What it learns holds for one number of rows and one keep ratio. Knows nothing of models.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import final

from torch import Tensor

#: How many inputs are not zero; where a GPU has counted them for each row, a tensor there.
Found = int | Tensor
#: Calls of each kind from which a choice is made.
ROUNDS = 5
#: Sparse must take at most this share of the dense time: what is not clearly faster stays dense.
MARGIN = 0.97
#: Sparse calls this many times slower than dense ones settle it at once.
_HOPELESS = 3.0


@final
class Choice:
    """What is known of one layer at one number of rows and one keep ratio.

    Attributes:
        units: inputs of a call.
        most: inputs other than zero up to which sparse is faster; ``None`` while that is being measured, 0 for dense.
    """

    def __init__(self, units: int) -> None:
        self.units = units
        self.most: float | None = None
        self._dense: list[float] = []
        self._sparse: list[tuple[float, int]] = []

    @property
    def dense_ms(self) -> float:
        """Least milliseconds of the dense calls that were timed (what else runs only adds); NaN before the first."""
        return 1e3 * min(self._dense) if self._dense else math.nan

    @property
    def sparse_ms(self) -> float:
        """The same of the sparse calls."""
        return 1e3 * min(seconds for seconds, _ in self._sparse) if self._sparse else math.nan

    @property
    def density(self) -> float:
        """Share of the inputs of the sparse calls that were not zero."""
        return statistics.mean(found for _, found in self._sparse) / max(self.units, 1) if self._sparse else math.nan

    def call(
        self,
        dense: Callable[[], Tensor],
        sparse: Callable[[float], tuple[Tensor | None, Found]],
        kind: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Tensor:
        """Return what one of the two returns, and learn from how long it took while that is not settled.

        Args:
            dense: the layer itself.
            sparse: takes the number of inputs above which it is to give up, and returns ``None`` in that case; and how
                many it found.
            kind: "dense" or "sparse" to have that one, whatever is faster.
            clock: tells seconds, after the device has done its work.
        """
        if self.most is not None:
            most = self.most if kind is None else math.inf if kind == "sparse" else 0.0
            y, _ = sparse(most) if most > 0 else (None, 0)
            return dense() if y is None else y
        if kind is None:
            kind = "dense" if len(self._dense) <= len(self._sparse) else "sparse"
        began = clock()
        if kind == "sparse":
            y, found = sparse(math.inf)
            if y is not None:
                seconds = clock() - began
                self._sparse.append((seconds, int(found.sum() if isinstance(found, Tensor) else found)))
                self._settle()
                return y
        y = dense()
        self._dense.append(clock() - began)
        self._settle()
        return y

    def forget(self) -> None:
        """Measure again."""
        self.most, self._dense, self._sparse = None, [], []

    def _settle(self) -> None:
        tries = min(len(self._dense), len(self._sparse))
        if tries < 2:
            return
        hopeless = min(seconds for seconds, _ in self._sparse) > _HOPELESS * max(self._dense)
        if tries >= ROUNDS or hopeless:
            faster = MARGIN * self.dense_ms / max(self.sparse_ms, 1e-9)
            # Time is taken to be in proportion to what was found. It grows less than that, so this errs towards dense.
            self.most = faster * max(self.density * self.units, 1.0) if faster > 1.0 else 0.0
