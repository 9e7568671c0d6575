"""Tells ``torch.compile`` of hooks and new code, so that compiled code misses no gate; knows no gate and no model.

All models of a class share their compiled code. By default that code does not look at hooks, so a wrapped
model would run the code of a bare one that was compiled first (pytorch #117758). Importing the compiler takes seconds;
where it is not loaded yet, its setting is changed once the user loads it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from regimewrap.torch_private import COMPILER_CONFIG, has_compiled_code


def notice_hooks() -> None:
    """Have compiled code look at hooks, now or once there is a compiler; what was compiled before is forgotten."""
    config: Any = sys.modules.get(COMPILER_CONFIG)
    if config is None:
        if not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _OnImport())
        return
    if torch.compiler.is_compiling() or not config.skip_nnmodule_hook_guards:
        return
    config.skip_nnmodule_hook_guards = False
    _CHANGED.append("skip_nnmodule_hook_guards")
    if has_compiled_code():
        torch.compiler.reset()


def forget_hooks() -> None:
    """Take ``notice_hooks`` back: compiled code may run without a look at hooks again, as it was found."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _OnImport)]
    config: Any = sys.modules.get(COMPILER_CONFIG)
    if config is not None and _CHANGED:
        config.skip_nnmodule_hook_guards = True
    _CHANGED.clear()


def forget_compiled() -> None:
    """Forget all compiled code, if there is any: the code that it was made from has changed."""
    if COMPILER_CONFIG in sys.modules and not torch.compiler.is_compiling() and has_compiled_code():
        torch.compiler.reset()


#: Names of the compiler's settings that are changed now.
_CHANGED: list[str] = []


class _OnImport:
    """Finds the compiler's settings as Python does, and changes one of them as soon as they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != COMPILER_CONFIG:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            load = loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                if module.skip_nnmodule_hook_guards:
                    module.skip_nnmodule_hook_guards = False
                    _CHANGED.append("skip_nnmodule_hook_guards")

            loader.exec_module = exec_module
        return spec
