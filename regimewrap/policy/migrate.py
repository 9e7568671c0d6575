"""Settings and saved states of version 1 in the words of version 2, exactly as they were meant.

Version 1 had no rows at the full budget, no guard and no warm-up, and its numbers were never scaled when a cycler was
built. Its default was the strategy ``ema-reset``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Decisions that a cycler remembers.
HISTORY = 256

_OF_VERSION_1: dict[str, Any] = {"full_share": 0.0, "scaled_to": None, "warmup": 0, "guarded": False}


def migrated_cycle(cycle: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a ``CyclePolicy`` of version 1 in the words of version 2.

    Raises:
        ValueError: they have a setting that version 1 did not know.

    >>> migrated_cycle({"every": 64})["strategy"]
    {'kind': 'ema-reset'}
    """
    newer = [name for name in _OF_VERSION_1 if name in cycle]
    if newer:
        raise ValueError(f"cycle.{newer[0]} is a setting of schema_version 2, and this policy says version 1.")
    return {"strategy": {"kind": "ema-reset"}, **cycle, **_OF_VERSION_1}


def migrated_policy(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a ``RegimePolicy`` of version 1 in the words of version 2.

    Raises:
        ValueError: its cycle has a setting that version 1 did not know.
    """
    cycle = policy.get("cycle", {})
    if isinstance(cycle, Mapping):  # else it is settings of this version already, or a mistake that is reported later
        cycle = migrated_cycle(cycle)
    return {**policy, "schema_version": 2, "cycle": cycle}


def migrated_state(state: Mapping[str, Any], policy: Mapping[str, Any], sites: list[str]) -> dict[str, Any]:
    """Return a cycler's state of version 1, or what an adapter of that version kept, in the words of version 2.

    Args:
        state: as it was saved.
        policy: the settings of the ``RegimePolicy`` here: version 1 of a cycler's own state did not say how it gated.
        sites: names of what is gated here, for the same reason.

    Raises:
        KeyError: a part is missing; or a ``TypeError``, ``ValueError`` or ``AttributeError``: it is damaged.
    """
    if "cycler" in state:  # an adapter's
        own, whole, sites = state["cycler"], migrated_policy(state["policy"]), state["sites"]
    else:
        own, whole = state, {**policy, "cycle": migrated_cycle(state["policy"])}
    last = own["state"]["last_raise"]
    began = 0 if last is None else (last + 1) * whole["cycle"]["every"]
    return {
        **own,
        "version": 2,
        "policy": whole,
        "sites": sites,
        "state": {**own["state"], "bests": [], "began": began},
        "history": own["history"][-HISTORY:],
    }
