"""Checks that an adapter's framework is installed and new enough, and finds the length of its run."""

from __future__ import annotations

import math
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from torch import nn

from regimewrap import gate_of
from regimewrap.errors import MissingExtraError, UnsupportedVersionError


def require(package: str, at_least: str, extra: str) -> None:
    """Check that an optional package is there and not too old; imports nothing.

    Args:
        package: its name on PyPI, which is also the name to import.
        at_least: the oldest version supported, such as ``"4.50"``.
        extra: the extra of regimewrap that installs it.

    Raises:
        MissingExtraError: it is not installed.
        UnsupportedVersionError: it is older.
    """
    if find_spec(package) is None:
        raise MissingExtraError(package, extra)
    try:
        found = version(package)
    except PackageNotFoundError:  # on the path without metadata: a source checkout, for example
        return
    if _numbers(found) < _numbers(at_least):
        raise UnsupportedVersionError(package, found, at_least)


def run_length(model: nn.Module, updates: float) -> int | None:
    """Return a trainer's number of updates for ``RegimeCycler``.

    ``None`` where the trainer's run has no end, and where the policy was scaled to a length by hand: that stands.
    """
    if isinstance(gate_of(model).policy.cycle.scaled_to, int) or not 1 <= updates < math.inf:
        return None
    return int(updates)


def _numbers(text: str) -> tuple[int, ...]:
    """Return a version's leading numbers: (4, 50, 1) for 4.50.1.dev0, which counts as 4.50.1."""
    return tuple(int(number) for number in re.split(r"[^\d.]", text)[0].split(".") if number)
