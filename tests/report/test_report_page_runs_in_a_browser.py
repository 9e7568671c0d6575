"""What only a browser can show: the script runs without an error, and every chart gets its cursor."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from regimewrap.report import write_report

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def opened(page: Path, home: Path) -> tuple[str, list[str]]:
    """Return the page's elements after its script has run, and what it wrote to the console."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_the_script_runs_and_every_chart_draws(three_arms, tmp_path):
    write_report(three_arms, tmp_path)

    dom, console = opened(tmp_path / "report.html", tmp_path / "home")

    assert console == []
    drawings = [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", dom, re.DOTALL)]  # noqa: S314 - our own
    assert len(drawings) == 4
    for drawing in drawings:
        assert any("curve" in (each.get("class") or "") or "trace" in (each.get("class") or "") for each in drawing)
        for cursor in (each for each in drawing if each.get("class") == "cursor"):
            assert cursor.get("visibility") == "visible"
            assert re.fullmatch(r"translate\(\d+(\.\d+)? 0\)", cursor.get("transform") or "")
    assert sum("data-x" in drawing.attrib for drawing in drawings) == 3
    assert re.search(r"<output>full budget\ndense: accuracy 93\.0 ± 0\.4 %", dom)
    assert '<div id="budget">' in dom


def test_the_slider_moves_every_cursor_and_says_the_figures_there(three_arms, tmp_path):
    write_report(three_arms, tmp_path)
    page = tmp_path / "report.html"
    moved = "<script>slider.value = 0; slider.dispatchEvent(new Event('input'));</script>"
    page.write_text(page.read_text().replace("</body>", f"{moved}</body>"))

    dom, console = opened(page, tmp_path / "home")

    assert console == []
    assert re.search(r"<output>keep ratio 0\.1\ndense: accuracy 88\.0 ± 0\.4 %, density 4\.0", dom)
    places = [json.loads(html.unescape(each))["0.1"] for each in re.findall(r'data-x="(.*?)"', dom)]
    moved_to = [float(each) for each in re.findall(r'class="cursor".*?transform="translate\((.*?) 0\)"', dom)]
    assert len(places) == 3
    assert places == moved_to


def test_an_error_on_the_console_would_be_seen(three_arms, tmp_path):
    write_report(three_arms, tmp_path)
    page = tmp_path / "report.html"
    page.write_text(page.read_text().replace("slider.addEventListener", "slider.listen"))

    assert "TypeError" in opened(page, tmp_path / "home")[1][0]
