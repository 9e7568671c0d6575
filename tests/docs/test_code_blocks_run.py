"""Every Python block of README and docs runs, a page's blocks one after the other, and no name is given to them."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from regimewrap.policy import strategies

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = {
    page.relative_to(ROOT).as_posix(): page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if FENCED.search(page.read_text())
}


def _skip_without_optional_packages(text: str) -> None:
    """Skip what imports a package that not everyone has installed."""
    for name in ("accelerate", "lightning", "peft", "timm", "torchvision", "transformers"):
        if re.search(rf"^(from|import) {name}\b", text, re.MULTILINE) and find_spec(name) is None:
            pytest.skip(f"needs {name}")


def test_the_pages_with_code_are_found():
    assert {"README.md", "docs/index.md", "docs/tutorials/first-run.md"} <= PAGES.keys()


@pytest.mark.filterwarnings("ignore:.*recalibrate_batchnorm:RuntimeWarning")  # the reader's model has BatchNorm
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs_and_prints_what_the_page_shows(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = PAGES[page].read_text()
    _skip_without_optional_packages(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strategies, "_KINDS", dict(strategies._KINDS))  # a page may register one
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    try:
        for block in FENCED.finditer(text):
            if block[1] == "text":
                assert block[2] in capsys.readouterr().out
                continue
            lines_before = text.count("\n", 0, block.start(2))  # so that a traceback shows the page's own line
            code = compile("\n" * lines_before + block[2], PAGES[page], "exec", dont_inherit=True)
            exec(code, vars(module))  # noqa: S102 - our own pages
    finally:
        strategies._union.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_runs_by_itself(path: Path, tmp_path: Path):
    assert len(path.read_text().splitlines()) < 80
    _skip_without_optional_packages(path.read_text())
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not list(tmp_path.iterdir())
