"""MkDocs hook: ``{{ settings MODULE.CLASS }}`` becomes a table of that class's settings, from its own schema."""

from __future__ import annotations

import json
import re
from importlib import import_module
from typing import Any

from regimewrap.policy.settings import _expected


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


def _default(field: Any) -> str:
    if field.is_required():
        return "none: it must be given"
    default = field.get_default(call_default_factory=True)
    if hasattr(default, "kind"):
        return f"`{default.kind}`"
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"
