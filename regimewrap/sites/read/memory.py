"""What one plan has read. All of it is dropped when the plan is made, so no class or data is kept alive."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_MEMORY: ContextVar[dict[Any, Any] | None] = ContextVar("memory", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Let ``remembered`` functions compute each result once, from here until the outermost such block ends."""
    if _MEMORY.get() is not None:
        yield
        return
    token = _MEMORY.set({})
    try:
        yield
    finally:
        _MEMORY.reset(token)


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Cache a function of hashable positional arguments inside ``remembering``, and only there."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        memory = _MEMORY.get()
        if memory is None:
            return function(*args, **kwargs)
        key = (function, *args)
        if key not in memory:
            memory[key] = function(*args, **kwargs)
        result: R = memory[key]
        return result

    return wrapper
