"""What can be read of a cycler: where it is, what it decided, and both as a table and as a curve. Moves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regimewrap.cycle.decide import ratio_after
from regimewrap.files import Table, Tabled, axes_for

if TYPE_CHECKING:
    from collections import deque

    from regimewrap.cycle.state import Decision, Regime, State
    from regimewrap.policy.policy import CyclePolicy

#: How many decisions a table shows, the last ones.
_SHOWN = 8
#: How many updates a curve shows where each one moves, the last ones.
_DRAWN = 1000


class View(Tabled):
    """The readable side of a cycler."""

    policy: CyclePolicy
    total_steps: int | None
    _between: Regime
    _history: deque[Decision]
    _state: State
    _updates: int

    @property
    def keep_ratio(self) -> float:
        """The keep ratio for the next forward pass, in (0, 1]."""
        return self._between.keep_ratio

    @property
    def regime(self) -> Regime:
        """What is in force for the next forward pass; its ``event`` is ``None``."""
        return self._between

    @property
    def history(self) -> list[Decision]:
        """The last 256 decisions, oldest first, in a new list; a strategy that moves at each update makes none."""
        return list(self._history)

    @property
    def updates(self) -> int:
        """Optimizer updates so far."""
        return self._updates

    @property
    def skipped(self) -> int:
        """Values of this rank left out because they were not finite (or beyond ±1e300), as of the last decision."""
        return self._state.skipped

    def plot(self, ax: Any = None) -> Any:
        """Draw the keep ratio over the optimizer updates, as far as ``history`` goes back; triangles mark resets.

        Of a strategy that moves at each update, the last 1,000 are drawn.

        Args:
            ax: matplotlib axes to draw on; new ones if ``None``.

        Returns:
            The axes.

        Raises:
            MissingExtraError: matplotlib is not installed.

        >>> model = regimewrap.wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
        >>> regimewrap.RegimeCycler(model).plot().get_ylabel()
        'keep ratio'
        """
        ax = axes_for(ax)
        if self.policy.strategy.each_update:
            steps = list(range(max(0, self._updates - _DRAWN), self._updates + 1))
            ratios = [ratio_after(self.policy, self.keep_ratio, step) for step in steps]
            ax.plot(steps, ratios, ".", markersize=3)
        else:
            steps, ratios = [each.step for each in self._history], [each.keep_ratio for each in self._history]
            ax.step(steps, ratios, where="post")
            resets = [each for each in self._history if each.event == "reset"]
            ax.plot([each.step for each in resets], [each.keep_ratio for each in resets], "^", label="reset")
        ax.set_ylim(0, 1.05)
        ax.set_xlabel("optimizer updates")
        ax.set_ylabel("keep ratio")
        return ax

    def __repr__(self) -> str:
        state, name = self._between, self.policy.strategy.kind
        if self.policy.strategy.each_update:
            ahead = "moves at each update"
        else:
            ahead = f"next decision at update {self._updates + self.policy.every - self._updates % self.policy.every}"
        of = "" if self.total_steps is None else f" of {self.total_steps}"
        return (
            f"RegimeCycler({name!r}, keep_ratio={state.keep_ratio:.4g}, cycle={state.cycle}, phase={state.phase!r}, "
            f"updates={self._updates}{of}, {ahead})"
        )

    def _table(self) -> Table:
        last = self.history[-_SHOWN:]
        rows = [
            (each.step, each.event, f"{each.keep_ratio:.4g}", "-" if each.signal is None else f"{each.signal:.4g}")
            for each in last
        ]
        return Table([("update", "decided", "keep ratio", "signal"), *rows] if rows else [], repr(self), left=(0, 1))
