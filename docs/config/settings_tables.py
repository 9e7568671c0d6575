"""MkDocs hook: ``{{ settings MODULE.CLASS }}`` becomes a table of that class's settings, from its own schema."""

from __future__ import annotations

import json
import re
from importlib import import_module
from typing import Any

_NOUNS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"^\{\{ settings ([\w.]+)\.(\w+) \}\}$", _table, markdown, flags=re.MULTILINE)


def _table(marker: re.Match[str]) -> str:
    cls = getattr(import_module(marker[1]), marker[2])
    schema = cls.model_json_schema()
    rows = ["| setting | what it takes | default | what it does |", "|---|---|---|---|"]
    for name, field in cls.model_fields.items():
        expected = _expected(schema, schema["properties"][name])
        rows.append(f"| `{name}` | {expected} | {_default(field)} | {field.description or ''} |")
    return "\n".join(rows)


def _expected(root: dict[str, Any], node: dict[str, Any]) -> str:
    """Return a setting's schema in words."""
    if "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    if "anyOf" in node:
        return " or ".join(_expected(root, branch) for branch in node["anyOf"])
    if "discriminator" in node:
        return f"a mapping with a kind ({', '.join(sorted(node['discriminator']['mapping']))})"
    choices = node.get("enum", [node["const"]] if "const" in node else [])
    if choices:
        return ", ".join(repr(choice) for choice in choices)
    if "properties" in node:
        return f"a mapping of settings ({', '.join(node['properties'])})"
    noun = _NOUNS.get(node.get("type", ""), "nothing" if node.get("type") == "null" else "a mapping")
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {node[name]:g}" for name, sign in bounds.items() if name in node]
    return " ".join([noun, " and ".join(limits)]).strip()


def _default(field: Any) -> str:
    if field.is_required():
        return "none: it must be given"
    default = field.get_default(call_default_factory=True)
    if hasattr(default, "kind"):
        return f"`{default.kind}`"
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"
