"""What everything that a user may set has in common: frozen, checked when built, explained when wrong.

A settings class is a pydantic model whose every mistake is a ``PolicyError``, one line a problem: where (the dotted
path), what was expected, what came, and the nearest valid name. The path is read off the class's own JSON schema, so a
strategy that a user registers gets the same messages. No policy and no rule lives here; no torch.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticCustomError

from regimewrap.errors import PolicyError
from regimewrap.files import nearest, shown

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

T = TypeVar("T")


def _not_a_bool(value: object) -> object:
    # Lax mode, which YAML's `1e-3` (text to PyYAML) needs, would also read True as 1.
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number, not a boolean")
    return value


NOT_A_BOOL = BeforeValidator(_not_a_bool)
# The bounds come first: behind a validator, pydantic would no longer put them into the schema.
Ratio = Annotated[float, Field(gt=0, le=1), NOT_A_BOOL]
Weight = Annotated[float, Field(ge=0, lt=1), NOT_A_BOOL]
NonNegative = Annotated[float, Field(ge=0), NOT_A_BOOL]
Positive = Annotated[float, Field(gt=0), NOT_A_BOOL]
Whole = Annotated[int, NOT_A_BOOL]
Natural = Annotated[int, Field(ge=0), NOT_A_BOOL]
Count = Annotated[int, Field(ge=1), NOT_A_BOOL]


def percent_hint(name: str, value: object) -> str:
    """Return what to pass when ``value`` looks like a percentage of a fraction, or nothing."""
    if isinstance(value, int | float) and 1 < value <= 100:
        return f" If you meant {value:g}%, pass {name}={value / 100:g}."
    return ""


#: Python's words in pydantic's messages, and what a reader of a file calls it.
_WORDS = {
    r"a valid tuple": "a list",
    r"a valid dictionary( or (instance of \w+|object to extract fields from))?": "a mapping",
    r"^(Tuple|Dictionary) should have (.*?)( after validation, not \d+)?$": r"Input should have \2",
}
_PYDANTICS = frozenset(dir(BaseModel))


class _Checked(ModelMetaclass):
    """Turns pydantic's error into ours where a user builds settings.

    Nested validation happens inside pydantic-core and does not come through here, so an error still arrives with its
    whole path.
    """

    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **settings: Any) -> Any:  # noqa: N805 - of a metaclass
            if args:
                raise PolicyError(f"{cls.__name__} takes its settings by name; got {shown(args[0])} without one.")
            return _explained(cls, lambda: super(_Checked, cls).__call__(**settings))


class Settings(BaseModel, metaclass=_Checked):
    """Base of all settings: frozen, no unknown names, finite numbers, mistakes reported as ``PolicyError``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, defer_build=True)

    def __dir__(self) -> list[str]:
        """Return our own names, which pydantic's would hide in completions."""
        return [name for name in super().__dir__() if name.startswith("__") or name not in _PYDANTICS]

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, checked like new ones.

        Args:
            **changes: new values by name. For a setting that is itself settings (such as ``gate``), an instance takes
                its place; a mapping changes only the names in it, unless it names another ``kind``.

        Raises:
            PolicyError: a name or a value is not valid.
        """
        return type(self)(**{**dict(self), **{name: self._merged(name, new) for name, new in changes.items()}})

    def _merged(self, name: str, new: object) -> object:
        old = getattr(self, name, None) if name in type(self).model_fields else None
        if not isinstance(old, Settings) or not isinstance(new, Mapping):
            return new
        if new.get("kind", getattr(old, "kind", None)) != getattr(old, "kind", None):
            return new
        return {**dict(old), **{key: old._merged(key, value) for key, value in new.items()}}

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, but ``update`` is validated; pydantic would let anything pass, frozen or not."""
        copied = super().model_copy(deep=deep)
        return copied.replace(**update) if update else copied

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with a ``PolicyError`` for a mistake."""
        return _explained(cls, lambda: super(Settings, cls).model_validate(obj, **options))

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's, with a ``PolicyError`` for a mistake."""
        return _explained(cls, lambda: super(Settings, cls).model_validate_json(json_data, **options))

    @classmethod
    def model_validate_strings(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, with a ``PolicyError`` for a mistake."""
        return _explained(cls, lambda: super(Settings, cls).model_validate_strings(obj, **options))

    def __setattr__(self, name: str, value: object) -> None:
        raise PolicyError(f"{type(self).__name__} is frozen; make a changed copy: .replace({name}={shown(value)}).")

    def __delattr__(self, name: str) -> None:
        raise PolicyError(f"{type(self).__name__} is frozen; {name} cannot be deleted.")

    def __hash__(self) -> int:
        return hash((type(self), json.dumps(self.model_dump(mode="json"), sort_keys=True)))


def _explained(cls: type[BaseModel], build: Callable[[], T]) -> T:
    try:
        return build()
    except ValidationError as error:
        message = explain(error, cls)
    raise PolicyError(message)


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """Return what is wrong, mostly in pydantic's words, one line for each setting.

    Args:
        error: what pydantic raised.
        cls: the settings class that was being built.
    """
    try:
        root = cls.model_json_schema()
    except PydanticUserError:  # a user's strategy with a type that has no schema
        root = {}
    lines: dict[str, tuple[dict[str, None], str]] = {}
    for problem in error.errors(include_url=False):
        name, words, came = _explained_problem(problem, root, cls.__name__)
        expected, before = lines.get(name, ({}, ""))  # each branch of a union reports
        lines[name] = ({**expected, words: None}, max(before, came, key=len))
    return "\n".join(f"{name}{', or'.join(expected)}{came}" for name, (expected, came) in lines.items())


def _explained_problem(problem: Mapping[str, Any], root: dict[str, Any], title: str) -> tuple[str, str, str]:
    """Return where a problem is, what was expected there, and what came, with the remedy if that can be guessed."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    path, node, parent = _locate(root, problem["loc"])
    name, message = ".".join(path) or title, problem["msg"]
    for words, ours in _WORDS.items():
        message = re.sub(words, ours, message)
    if kind == "extra_forbidden":
        known = list(parent.get("properties", {}))
        mend = f"{nearest(path[-1], known)} Settings: {', '.join(known)}."
        return name, " is not a setting", f"; got {shown(value)}.{mend}"
    if kind == "missing":
        return name, " is missing", "."
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        kinds, name = sorted(node.get("discriminator", {}).get("mapping", {})), ".".join([*path, "kind"])
        if "tag" not in context:
            return name, " is missing", f"; expected one of {', '.join(kinds)}."
        tag = context["tag"]
        mend = " Register its class first." if isinstance(value, Settings) else nearest(tag, kinds)
        return name, f" must be one of {', '.join(kinds)}", f"; got {shown(tag)}.{mend}"
    if kind in ("value_error", "assertion_error"):
        return (name, f": {context['error']}", "") if path else ("", str(context["error"]), "")
    is_share = kind in ("less_than", "less_than_equal") and 1 in context.values() and path
    mend = percent_hint(path[-1], value) if is_share and not path[-1].isdigit() else ""
    if kind == "literal_error":
        mend = nearest(value, context["expected"].replace(" or ", ", ").replace("'", "").split(", "))
    words = message.removeprefix("Input")
    return name, words if words != message else f": {message}", f"; got {shown(value)}.{mend}"


def _locate(root: dict[str, Any], where: Iterable[int | str]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Return the path as a user would write it, and the schemas of the last thing on it and of what holds that."""
    path: list[str] = []
    node, parent = _resolved(root, root), root
    for step in where:
        tags = node.get("discriminator", {}).get("mapping", {})
        if step in tags:  # pydantic puts the kind on the path; users do not
            node = _resolved(root, {"$ref": tags[step]})
        elif "anyOf" in node:  # the branch of a union: the whole union says better what was expected
            break
        elif step == "[key]":  # the mistake is in a name, not in what the name stands for
            path[-1], node = "[key]", _resolved(root, parent.get("propertyNames", {}))
        else:
            path.append(str(step))
            inner = node.get("properties", {}).get(step) or node.get("items") or node.get("additionalProperties")
            node, parent = _resolved(root, inner if isinstance(inner, dict) else {}), node
    return path, node, parent


def _resolved(root: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        found: Any = root
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def whole_number(name: str, value: object) -> int:
    """Return ``value`` as an ``int`` of at least 1, or raise a ``PolicyError`` that names it."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if count < 1:
        raise PolicyError(f"{name} must be a whole number ≥ 1; got {shown(value)}.")
    return count
