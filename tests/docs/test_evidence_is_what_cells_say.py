"""The table of docs/explanation/evidence.md is the one that the committed cells make."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DRAW = Path(__file__).parents[2] / "docs" / "evidence" / "draw.py"


@pytest.mark.slow
def test_the_table_is_the_one_that_the_cells_make():
    pytest.importorskip("scipy", reason="scipy is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    spec = importlib.util.spec_from_file_location("draw", DRAW)
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)

    found = draw.TABLE.search(draw.PAGE.read_text(encoding="utf-8"))

    assert found is not None
    assert found[0] == draw.table()
