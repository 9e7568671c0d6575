from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from regimewrap.report import conclusion, write_report

VOID = {"meta", "img", "br", "hr", "input", "link"}


class _Page(HTMLParser):
    """Every element with its attributes, all text, and a check that elements nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(three_arms, tmp_path) -> _Page:
    write_report(three_arms, tmp_path)
    return _Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_nothing_is_fetched_and_no_script_runs(page, tmp_path):
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")}
        for name in ("src", "href", "srcset", "style"):
            assert (attributes.get(name) or "data:").startswith("data:")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|https?://", re.sub(r"base64,[^\"]*", "", html))


def test_the_plots_inside_are_those_beside_it(page, tmp_path):
    inside = [
        base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,")) for image in page.all("img")
    ]
    assert sorted(inside) == sorted(path.read_bytes() for path in tmp_path.glob("*.png"))
    assert len(inside) == 3


def test_it_says_the_conclusion_the_settings_the_versions_and_the_policies(page, three_arms):
    text = page.text.replace("\xa0", " ")
    assert conclusion(three_arms) in text
    for said in (
        "CPU, 2 cores",
        "regimewrap demo --out 'a <b>'",
        "torch 2.14.1",
        "16, 32",
        "kind: ema-reset",
        "2603.03131",
    ):
        assert said in text


def test_the_table_holds_mean_and_spread_of_each_arm_at_each_budget(page):
    for figure in ("93.0 ± 0.4", "93.2 ± 0.4", "92.8 ± 0.4", "88.0 ± 0.4", "91.0 ± 0.4", "88.2 ± 0.4"):
        assert figure in page.text


def test_pictures_are_told_in_words_and_tables_have_captions_and_headings(page):
    told = [image["alt"] or "" for image in page.all("img")]
    assert "loss-reset, seed 0: 2 resets, 0 relaxations, lowest keep ratio 0.29" in told[1]
    assert "loss-reset 60.0 ± 0.0 %" in told[2]
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert all(heading.get("scope") in {"row", "col"} for heading in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_what_users_wrote_is_text_and_never_markup(page):
    assert "Digits & <friends>" in page.text
    assert not page.all("friends")
    assert not page.all("b") or all(not attributes for attributes in page.all("b"))
