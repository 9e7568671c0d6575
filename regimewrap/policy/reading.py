"""The text of a policy file, JSON or YAML, as plain data. What the data must be is not known here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from regimewrap.errors import PolicyError
from regimewrap.files import shown

if TYPE_CHECKING:
    from pathlib import Path


def is_json(path: Path) -> bool:
    """Return whether a policy file is JSON; if not, it is YAML.

    Raises:
        PolicyError: its suffix is another.
    """
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise PolicyError(f"{path}: a policy file's name ends in .yaml, .yml or .json; got {path.suffix!r}.")
    return path.suffix.lower() == ".json"


def parse_json(text: str) -> object:
    """Return what JSON text holds; a name that stands twice in one mapping is a mistake.

    Raises:
        PolicyError: it is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise PolicyError(f"this is not JSON: {error}.") from None


def parse_yaml(text: str) -> object:
    """Return what plain YAML text holds; a name that stands twice in one mapping is a mistake.

    Raises:
        PolicyError: it is not plain YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader, and stricter
    except yaml.constructor.ConstructorError as error:
        mend = " Settings are plain data: remove the tag." if "tag" in str(error.problem) else ""
        raise PolicyError(f"this YAML cannot be used: {_yaml_reason(error)}.{mend}") from None
    except yaml.YAMLError as error:
        # A bare * or an anchor's name with *, as in include: [*], is an alias to YAML.
        mend = ' Quote a pattern: "*".' if "alias" in f"{error}" else ""
        raise PolicyError(f"this is not YAML: {_yaml_reason(error)}.{mend}") from None
    except ValueError as error:  # an impossible date, an endless number
        raise PolicyError(f"this YAML has a value that cannot be read: {error}.") from None


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(str(error.problem).split())}"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """A safe loader that takes no name twice: of two blocks the first would be dropped in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{shown(key.value)} stands twice in one mapping: merge the two",
                        problem_mark=key.start_mark,
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{shown(name)} stands twice in one mapping: merge the two")
    return dict(pairs)
