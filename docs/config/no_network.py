"""Pages load nothing from elsewhere: the script that lets search run from disk is ours, not one from a server."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_FOREIGN = re.compile(r'<script src="https://[^"]*iframe-worker[^"]*"></script>')


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Put our script in the place of the foreign one."""
    ours = posixpath.relpath("assets/worker.js", posixpath.dirname(page.url) or ".")
    return _FOREIGN.sub(f'<script src="{ours}"></script>', output)


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for the page of a missing address."""
    return _FOREIGN.sub('<script src="/assets/worker.js"></script>', output_content)
