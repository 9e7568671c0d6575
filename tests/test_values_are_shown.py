"""What the package returns prints as a table, is one in a notebook, and has a short repr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import regimewrap
from regimewrap import RegimeCycler, RegimePolicy, Sweep
from regimewrap.errors import MissingExtraError
from regimewrap.files import Table

NASTY = "<script>alert('&')</script>"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 2)).eval()


def driven(policy: str) -> RegimeCycler:
    cycler = RegimeCycler(regimewrap.wrap(network().train(), policy), total_steps=200)
    for _ in range(150):
        cycler.fast_forward(cycler.updates + 1)
    return cycler


def everything() -> Iterator[tuple[str, object]]:
    x = torch.randn(8, 4)
    yield "Sequential: 1 of 1", regimewrap.plan(network())
    model = regimewrap.wrap(network())
    yield "Sweep({1.0: 0.5, 0.1: 0.25})", Sweep({1.0: 0.5, 0.1: 0.25})
    yield "Coverage(gated=1, escaped=0, idle=0)", regimewrap.verify(model, x)
    yield (
        "Calibration('Sequential', keep ratios 0.1 to 0.5, sites=1)",
        regimewrap.calibrate(model, [x], keep_ratios=(0.5, 0.1)),
    )
    with regimewrap.at_keep_ratio(model, 0.25), regimewrap.watch(model) as seen:
        model(x)
    yield "Watch(sites=1, density=0.25, bound=1)", seen
    yield "RegimeCycler('sawtooth', keep_ratio=", driven("sawtooth")
    yield "RegimeCycler('spread', keep_ratio=", driven("mixed")


class _Cells(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_repr_is_short_and_a_notebook_shows_what_is_printed():
    for said, value in everything():
        assert repr(value).startswith(said)
        words = " ".join(_Cells(value._repr_html_()).text).split()
        assert words == str(value).split()


def test_a_served_model_says_whether_it_is_closed():
    model = regimewrap.wrap(network())
    with torch.no_grad(), regimewrap.serve(model, 0.5, example_inputs=torch.randn(1, 4)) as served:
        assert repr(served).startswith("Served(Sequential, keep_ratio=0.5, ")
        assert "layers may skip zeros" in repr(served)
        assert "<table>" in served._repr_html_()
    assert "closed" in repr(served)


def test_what_users_wrote_is_text_and_never_markup():
    page = _Cells(Table([(NASTY, "n"), (NASTY, 1)], NASTY).html())
    assert page.tags == {"p", "table", "tr", "th", "td"}
    assert "".join(page.text).count(NASTY) == 3


def test_a_narrow_terminal_gets_a_block_a_row():
    table = Table([("site", "density", "bound"), ("layers.0", 0.25, 1.0)], "one site")
    assert table.text(width=12).splitlines() == ["one site", "layers.0", "  density  0.25", "  bound    1.0"]


def test_a_cycle_is_drawn_with_its_resets():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    cycler = driven("sawtooth")
    ax = cycler.plot(figure.subplots())

    line, resets = ax.lines
    assert line.get_ydata().tolist() == [each.keep_ratio for each in cycler.history]
    assert len(resets.get_xdata()) == sum(each.event == "reset" for each in cycler.history) > 0


def test_a_policy_that_moves_at_each_update_is_drawn_where_it_was():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    cycler = RegimeCycler(regimewrap.wrap(network().train(), RegimePolicy.preset("mixed")))
    visited = [cycler.keep_ratio, *(cycler.fast_forward(update).keep_ratio for update in range(1, 20))]

    assert cycler.plot(figure.subplots()).lines[0].get_ydata().tolist() == visited


def test_a_cycle_cannot_be_drawn_without_matplotlib_and_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib is not installed; run .*\.\[cli\]"):
        driven("sawtooth").plot()
