from __future__ import annotations

import io
import os
import signal

import pytest
from rich.console import Console

from regimewrap.recipes import live
from regimewrap.recipes.live import CountBar, RunsBar, describe, stopping_on_interrupt
from regimewrap.recipes.training import Status

STATUS = Status(3, 10, 1, False, 0.5, 0.25, "compress")


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=150, highlight=False)


def test_a_terminal_shows_loss_keep_ratio_and_phase_of_each_run():
    screen = console(terminal=True)

    with RunsBar(screen, runs=2) as bar:
        bar.update("dense, seed 0", STATUS)
        bar._progress.refresh()
        bar.finish("dense, seed 0", "  1/2  dense [bold] done")

    shown = screen.file.getvalue()
    assert "dense, seed 0" in shown
    assert "loss 0.5000  keep ratio 0.250  compress" in shown
    assert "dense [bold] done" in shown


def test_without_a_terminal_there_are_plain_lines_and_no_bars():
    screen = console(terminal=False)

    with RunsBar(screen) as bar:
        bar.update("dense", STATUS)
        bar.evaluated(1, 2)
        bar.say("epoch 1/2")

    assert screen.file.getvalue() == "epoch 1/2\n"


def test_a_loss_that_is_not_known_yet_is_a_dash():
    unknown = Status(1, 10, 1, False, float("nan"), 1.0, "dense")

    assert describe(unknown) == "loss   –     keep ratio 1.000  dense   "
    assert len(describe(unknown)) == len(describe(STATUS))


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_count_is_shown_only_after_a_while(monkeypatch, patience, shown):
    monkeypatch.setattr(live, "_PATIENCE_SECONDS", patience)
    screen = console(terminal=True)

    with CountBar(screen, "reading images") as bar:
        for done in range(1, 4):
            bar(done, 3)
        bar._progress.refresh()

    assert ("reading images" in screen.file.getvalue()) == shown


def test_the_first_interrupt_asks_and_the_second_interrupts():
    said = []

    with stopping_on_interrupt(lambda: said.append("stopping")) as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        assert said == ["stopping"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
