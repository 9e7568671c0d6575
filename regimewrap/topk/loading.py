"""Compiled kernels: loaded when first needed, and given up with one warning if they are missing or fail."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


@final
class Kernels:
    """One module of kernels.

    Attributes:
        module: the module, once it is loaded.
        usable: False from the first failure to the end of the process.
    """

    def __init__(self, load: Callable[[], ModuleType], compiler: str, install: str, otherwise: str) -> None:
        """Load nothing yet.

        Args:
            load: imports the module.
            compiler: the package that the module needs.
            install: how it is installed, in words.
            otherwise: what is done without these kernels, for the warning.
        """
        self.module: ModuleType | None = None
        self.usable = True
        self._load, self._compiler, self._install, self._otherwise = load, compiler, install, otherwise

    def get(self) -> ModuleType | None:
        """Return the module, or ``None`` if it cannot be used."""
        if self.usable and self.module is None:
            self.survive(self._keep)
        return self.module if self.usable else None

    def _keep(self) -> None:
        self.module = self._load()

    def survive(self, work: Callable[[], object]) -> bool:
        """Do ``work``, and say whether it went well: a broken compiler must not end a training run."""
        try:
            work()
        except Exception as error:  # noqa: BLE001  a broken installation may raise anything
            self.usable = False
            warnings.warn(f"regimewrap {self._otherwise} ({self._why(error)}).", RuntimeWarning, stacklevel=3)
            return False
        return True

    def _why(self, error: Exception) -> str:
        if isinstance(error, ModuleNotFoundError) and error.name == self._compiler:
            return f"{self._compiler} is not installed; {self._install}"
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
