"""The rules for the next keep ratio that there are, built in and the user's own, by their kind.

To add a rule, write a ``@final`` subclass of ``Strategy`` with a ``kind`` of its own and decorate it with
``@register``; policies, their files and their schema know it from then on.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_core import CoreSchema, core_schema

from regimewrap.errors import PolicyError
from regimewrap.files import shown
from regimewrap.policy.closed_loop import EmaRelax, EmaReset, PlateauReset
from regimewrap.policy.open_loop import Constant, Dense, Sawtooth, Spread
from regimewrap.policy.strategy import EVENTS, Event, Move, Situation, Strategy

if TYPE_CHECKING:
    from pydantic.json_schema import JsonSchemaValue

__all__ = [
    "EVENTS",
    "ByKind",
    "Constant",
    "Dense",
    "EmaRelax",
    "EmaReset",
    "Event",
    "Move",
    "PlateauReset",
    "Sawtooth",
    "Situation",
    "Spread",
    "Strategy",
    "kinds",
    "register",
]

S = TypeVar("S", bound="Strategy")

_KINDS: dict[str, type[Strategy]] = {
    cls.model_fields["kind"].default: cls
    for cls in (Spread, EmaReset, EmaRelax, PlateauReset, Sawtooth, Constant, Dense)
}


def kinds() -> tuple[str, ...]:
    """Return the names of all strategies, built in and registered."""
    return tuple(_KINDS)


def register(cls: type[S]) -> type[S]:
    """Make a strategy known by its ``kind``, so that policies and their files can name it; usable as a decorator.

    Args:
        cls: a ``@final`` subclass of ``Strategy`` with ``kind: Literal["name"] = "name"``, settings that have a JSON
            schema, and ``next_move``. Registering a class again, or a new definition of it (same module and name, as
            in a notebook), replaces it.

    Returns:
        ``cls``.

    Raises:
        PolicyError: it is not such a class, or another class has its kind.
    """
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise PolicyError(f"register expects a subclass of Strategy; got {shown(cls)}.")
    if inspect.isabstract(cls) or not getattr(cls, "__final__", False):
        raise PolicyError(f"{cls.__name__} must define next_move and be marked @final (from typing) to be registered.")
    kind = cls.model_fields["kind"].default
    try:
        named = cls.model_json_schema()["properties"]["kind"].get("const")
    except PydanticUserError as error:
        reason = str(error).splitlines()[0]
        raise PolicyError(f"{cls.__name__} has a setting that cannot be written to a file: {reason}") from None
    if not isinstance(kind, str) or named != kind:
        raise PolicyError(f'{cls.__name__} needs a name of its own, such as  kind: Literal["mine"] = "mine"')
    known = _KINDS.get(kind, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise PolicyError(f"{cls.__name__} has kind {kind!r}, which {known.__name__} has already; choose another.")
    _KINDS[kind] = cls
    _union.cache_clear()
    return cls


@cache
def _union() -> TypeAdapter[Strategy]:
    every: Any = Union[tuple(_KINDS.values())]  # noqa: UP007 - built from what is registered
    return TypeAdapter(Annotated[every, Field(discriminator="kind")])


class ByKind:
    """Annotation of a ``Strategy`` field: validated, and described, as the union of all kinds known at that moment."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: _union().validate_python(value))

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(_union().core_schema)
