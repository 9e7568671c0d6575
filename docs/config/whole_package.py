"""A hook for MkDocs: shows it a copy of the package as it is installed, with ``integrations`` inside.

In the repository that folder lies beside the package, where the reference would not find it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_ROOT = Path(__file__).parents[2]
_PLACE = tempfile.TemporaryDirectory()


@event_priority(100)  # before the plugin reads its settings
def on_config(config: Any) -> None:
    """Have the reference read a copy."""
    for source, to in (("regimewrap", "regimewrap"), ("integrations", "regimewrap/integrations")):
        shutil.copytree(_ROOT / source, Path(_PLACE.name, to), dirs_exist_ok=True)
    config["plugins"]["mkdocstrings"].config["handlers"]["python"]["paths"] = [_PLACE.name]
