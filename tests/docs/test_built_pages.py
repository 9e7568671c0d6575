"""The built pages load nothing from elsewhere, and search works in a page that is opened from disk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "-f", "docs/config/mkdocs.yml", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text()
        foreign = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="(?:https?:)?//[^"]*"', text)
        assert [tag for tag in foreign if 'rel="canonical"' not in tag] == [], page.name


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_search_finds_a_page_from_disk(site: Path) -> None:
    address = (site / "how-to" / "quantise.html").as_uri() + "?q=quantise"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run([str(CHROMIUM), *flags, address], capture_output=True, text=True, check=True, timeout=120)
    assert re.search(r'class="md-search-result__item"[\s\S]*?Quantise a trained model', shown.stdout)
