"""Train one PyTorch network across many activation budgets."""

from regimewrap._version import __version__

__all__ = ["__version__"]
