"""Imports run one way, and `import regimewrap` stays light."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import regimewrap

PACKAGE = Path(regimewrap.__file__).parent
ADAPTERS = Path(__file__).parents[1] / "integrations"  # regimewrap.integrations, whose folder stands beside the package

# A room imports from rows above its own, and from itself. "regimewrap" is the front door, __init__.py.
ORDER = [
    {"_command", "errors", "torch_private"},
    {"files"},
    {"policy", "topk"},
    {"gate"},
    {"cycle", "sites"},
    {"rewrite"},
    {"measure"},
    {"wrap"},
    {"serve"},
    {"regimewrap"},
    {"report"},
    {"recipes"},
    {"train"},
    {"cli", "integrations"},
    {"__main__"},
]
RANK = {room: rank for rank, row in enumerate(ORDER) for room in row}
WITHOUT_TORCH = ["errors", "policy", "report"]
# What adapters live on: the front door, whose functions share names with rooms, and the rooms documented beside it.
PUBLIC = {"regimewrap", "wrap", "verify", "sweep", "errors", "files", "policy", "measure", "recipes"}
HEAVY = ["timm", "transformers", "torchvision", "matplotlib", "sklearn", "rich", "typer", "numba", "scipy", "pandas"]


def _sources() -> list[tuple[str, str]]:
    """Every module as its room and its text."""
    ours = [(path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")) for path in PACKAGE.rglob("*.py")]
    adapters = [(path, "integrations") for path in ADAPTERS.rglob("*.py")]
    return [(PACKAGE.name if room == "__init__" else room, path.read_text()) for path, room in sorted(ours + adapters)]


def _imports(source: str) -> set[str]:
    """Every absolute module name that a source imports, also inside functions and for types alone."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _rooms_imported(source: str) -> set[str]:
    """Our rooms among a source's imports; the package itself for its public names."""
    ours = [name.split(".") for name in _imports(source) if name.split(".")[0] == PACKAGE.name]
    return {parts[1] if len(parts) > 1 and parts[1] in RANK else PACKAGE.name for parts in ours}


def _backward(room: str, source: str) -> set[str]:
    """Rooms that ``room`` must not import, and does."""
    return {other for other in _rooms_imported(source) if other != room and RANK[other] >= RANK[room]}


def test_every_room_has_its_place_in_the_order():
    assert {room for room, _ in _sources()} <= RANK.keys()


def test_imports_run_one_way():
    assert {(room, other) for room, source in _sources() for other in _backward(room, source)} == set()


def test_adapters_use_public_names():
    used = {other for room, source in _sources() if room == "integrations" for other in _rooms_imported(source)}
    assert used
    assert used - PUBLIC - {"integrations"} == set()


def test_a_backward_import_would_be_seen():
    assert _backward("gate", "from regimewrap.wrap import wrap") == {"wrap"}
    assert _backward("gate", "def f():\n    import regimewrap.measure.sweep") == {"measure"}
    assert _backward("sites", "from regimewrap import wrap") == {"wrap"}
    assert _backward("measure", "from regimewrap import TopKGate") == {"regimewrap"}
    assert _backward("gate", "from regimewrap.policy.policy import GatePolicy") == set()


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_what_only_decides_or_reports_does_not_import_torch(room):
    imported = {name.split(".")[0] for other, source in _sources() if other == room for name in _imports(source)}
    assert imported
    assert "torch" not in imported


def _in_a_fresh_process(code: str) -> str:
    # Bytecode is kept: to compile all again at each import is what nobody's import costs.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_import_loads_no_optional_package():
    loaded = json.loads(_in_a_fresh_process("import json, sys, regimewrap; print(json.dumps(list(sys.modules)))"))
    assert "torch" in loaded
    assert not set(HEAVY) & set(loaded)


def test_import_costs_at_most_three_tenths_of_a_second_on_top_of_torch():
    code = "import time, torch; start = time.process_time(); import regimewrap; print(time.process_time() - start)"
    # Time on the processor, and three tries: the rest is other processes, or compiling to bytecode once.
    assert any(float(_in_a_fresh_process(code)) <= 0.3 for _ in range(3))
