"""All that a user may set, as frozen values; no torch here, and no running state."""

from regimewrap.policy.policy import CyclePolicy, GatePolicy, PolicyLike, PresetName, RegimePolicy, SitePolicy
from regimewrap.policy.strategies import Move, Situation, Strategy, register

__all__ = [
    "CyclePolicy",
    "GatePolicy",
    "Move",
    "PolicyLike",
    "PresetName",
    "RegimePolicy",
    "SitePolicy",
    "Situation",
    "Strategy",
    "register",
]
