"""Everything regimewrap raises on purpose.

::

    RegimewrapError
    ├── PolicyError (ValueError)         a policy, its file or a ratio is not valid
    ├── SelectionError (ValueError)      a tensor or k that no top-k selection can work with
    ├── WrapError (RuntimeError)         a model could not be wrapped, unwrapped or planned
    │   ├── NoSitesError                 the policy matched no activation
    │   ├── AlreadyWrappedError          wrap was called twice
    │   ├── NotWrappedError              a wrapped model was needed
    │   └── UnreachableSiteError         the policy selects an activation that no mechanism can gate soundly
    ├── ServeError (RuntimeError)        a model cannot be served, or not in this way
    ├── BudgetError (RuntimeError)       a forward pass would be repeated for backward at another budget
    ├── SignalError (ValueError)         what was passed to RegimeCycler.step cannot steer it
    ├── StateError (ValueError)          a saved state that belongs to something else, or is damaged
    ├── SyncError (RuntimeError)         ranks disagree or do not answer
    ├── DataError (ValueError)           a data path, archive or image that cannot be used
    ├── MissingExtraError (ImportError)  an optional package is needed
    └── UnsupportedVersionError (ImportError)  an optional package is too old

Messages say what came, what was expected and how to mend it, on one line where that is possible.
"""

from __future__ import annotations


def to_install(extra: str) -> str:
    """Say how an extra is installed: from a checkout, as there is no release.

    >>> to_install("fast")
    "run `pip install -e '.[fast]'` in a checkout of regimewrap"
    """
    return f"run `pip install -e '.[{extra}]'` in a checkout of regimewrap"


class RegimewrapError(Exception):
    """Base of every error raised on purpose."""


class PolicyError(RegimewrapError, ValueError):
    """A policy, a policy file or a ratio is not valid."""


class SelectionError(RegimewrapError, ValueError):
    """A tensor or a count that top-k selection cannot work with."""


class WrapError(RegimewrapError, RuntimeError):
    """A model could not be planned, wrapped or unwrapped; the model is as it was."""


class NoSitesError(WrapError):
    """The policy matched no activation of the model."""


class AlreadyWrappedError(WrapError):
    """The model is wrapped already."""


class NotWrappedError(WrapError):
    """A wrapped model was needed and this one is not."""


class UnreachableSiteError(WrapError):
    """The policy selects an activation that no mechanism can gate soundly."""


class ServeError(RegimewrapError, RuntimeError):
    """A model cannot be served, or a served one cannot do this."""


class BudgetError(RegimewrapError, RuntimeError):
    """Activation checkpointing would repeat a forward pass at another budget than it ran at."""

    def __init__(self, then: str, now: str) -> None:
        super().__init__(
            f"a forward pass at {then} would be repeated for this backward pass at {now}, which gives wrong gradients. "
            "Call backward() inside the at_keep_ratio block, and RegimeCycler.step or set_keep_ratio after backward()."
        )


class SignalError(RegimewrapError, ValueError):
    """What was passed to ``RegimeCycler.step`` cannot steer it."""


class StateError(RegimewrapError, ValueError):
    """A saved state that belongs to another policy, model or version, or is damaged."""


class SyncError(RegimewrapError, RuntimeError):
    """Ranks disagree about the keep ratio, or one of them does not answer."""


class DataError(RegimewrapError, ValueError):
    """A data path, archive or image that cannot be used."""


class MissingExtraError(RegimewrapError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; {to_install(extra)}.")


class UnsupportedVersionError(RegimewrapError, ImportError):
    """An optional package is older than what is supported; the message names both versions."""

    def __init__(self, package: str, found: str, at_least: str) -> None:
        super().__init__(
            f"{package} {found} is installed and regimewrap supports {at_least} or newer; "
            f"run `pip install -U '{package}>={at_least}'`."
        )
