from __future__ import annotations

import json
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


def test_nothing_is_fetched(page, tmp_path):
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base", "form", "img"}
    for _, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")}
        assert not {"src", "href", "srcset", "style"} & set(attributes)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(|https?://", html.replace('xmlns="http://www.w3.org/2000/svg"', ""))


def test_the_charts_inside_are_those_beside_it(page, tmp_path):
    beside = [picture.read_text().split("</style>")[1].strip() for picture in sorted(tmp_path.glob("*.svg"))]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(beside) == len(page.all("svg")) == 4
    assert all(drawing in html for drawing in beside)


def test_of_what_is_not_there_nothing_is_said(three_arms, make_experiment, tmp_path):
    write_report(three_arms, tmp_path / "much")
    write_report(make_experiment({"dense": [{"1.0": 0.9, "0.1": 0.5}]}), tmp_path / "little")
    much, little = ((tmp_path / name / "report.html").read_text() for name in ("much", "little"))
    for words in (
        "triangles mark resets",
        "one standard deviation",
        "Arms are paired",
        ">cycles<",
        "How the budget moved",
    ):
        assert words in much
        assert words not in little
    assert "relaxations" not in much


def test_the_slider_knows_every_budget_that_was_evaluated(page, tmp_path):
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    told = json.loads(re.search(r'id="budgets">(.*?)</script>', html)[1])
    assert [each["ratio"] for each in told] == ["0.1", "1.0"]
    assert "loss-reset: accuracy 91.0 ± 0.4 %, density 4.0 ± 0.0 %, 0.60 ± 0.00 ms" in told[0]["words"].splitlines()
    (slider,) = page.all("input")
    assert (slider["min"], slider["max"]) == ("0", "1")


def test_the_first_words_say_what_was_done(page):
    assert (
        "Three ways of training a network (dense, loss-reset and accuracy-relax), tested at two budgets." in page.text
    )
    assert "at keep ratio 0.1 the largest 10 % stay" in page.text.replace("\xa0", " ")


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
    told = [drawing["aria-label"] or "" for drawing in page.all("svg")]
    assert "loss-reset 4.0 ± 0.0 at 0.1" in told[1]
    assert "loss-reset 0.60 ± 0.00 at 0.1" in told[2]
    assert "loss-reset, seed 0: 2 resets, lowest keep ratio 0.29, the gate bound in 60.0 ± 0.0 %" in told[3]
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert all(heading.get("scope") in {"row", "col"} for heading in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_what_users_wrote_is_text_and_never_markup(page):
    assert "Digits & <friends>" in page.text
    assert not page.all("friends")
    assert not page.all("b") or all(not attributes for attributes in page.all("b"))
