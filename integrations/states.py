"""What the adapters put into their frameworks' checkpoints: the cycler's state, and what it belongs to.

A cycler's own state knows the cycle that made it. A checkpoint can also meet another gate policy or another model, so
these go with it and are compared before anything changes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from regimewrap import RegimeCycler, gate_of
from regimewrap.errors import StateError
from regimewrap.files import differences

VERSION = 1


def saved(cycler: RegimeCycler, model: nn.Module, *, all_ranks: bool = False) -> dict[str, Any]:
    """Return a cycler's state and what it belongs to, as plain JSON types.

    Args:
        cycler: drives ``model``.
        model: the wrapped model, or anything around it.
        all_ranks: as in ``RegimeCycler.state_dict``: all ranks call this, and one file resumes each of them exactly.

    Returns:
        ``version``, ``policy`` (all of it), ``sites`` (names of what is gated), ``keep_ratio`` and ``cycler``.
    """
    gate = gate_of(model)
    return {
        "version": VERSION,
        "policy": gate.policy.replace(cycle=cycler.policy).model_dump(mode="json"),
        "sites": [site.name for site in gate.sites],
        "keep_ratio": cycler.keep_ratio,
        "cycler": cycler.state_dict(all_ranks=all_ranks),
    }


def resume(cycler: RegimeCycler, model: nn.Module, state: object) -> None:
    """Load what ``saved`` returned into a cycler, or refuse it and change nothing.

    Args:
        cycler: drives ``model``.
        model: the wrapped model, or anything around it.
        state: from ``saved``, or the same after a way through JSON.

    Raises:
        StateError: it belongs to another policy, model or version, or is damaged; the message shows both sides.
    """
    here = saved(cycler, model)
    if not isinstance(state, dict) or state.keys() != here.keys():
        names = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise StateError(f"the state is damaged: expected a mapping with {', '.join(sorted(here))}; got {names}.")
    if state["version"] != VERSION:
        raise StateError(f"the state has version {state['version']!r}; this regimewrap reads version {VERSION}.")
    if state["sites"] != here["sites"]:
        raise StateError(
            f"the state belongs to another model: it gates {_listed(state['sites'])}; "
            f"this one gates {_listed(here['sites'])}."
        )
    problems = "; ".join(differences(state["policy"], here["policy"]))
    if problems:
        raise StateError(
            f"the state belongs to another policy: {problems}. "
            "Use the policy the state was saved under, or start without the state."
        )
    cycler.load_state_dict(state["cycler"])


def _listed(sites: object) -> str:
    if not isinstance(sites, list):
        return repr(sites)
    shown = ", ".join(map(str, sites[:4]))
    return f"{len(sites)} activations ({shown}{', ...' if len(sites) > 4 else ''})"
