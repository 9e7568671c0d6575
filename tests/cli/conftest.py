from __future__ import annotations

from typing import NamedTuple

import pytest

from regimewrap import cli


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def regimewrap(capsys, tmp_path, monkeypatch):
    """Run a command line in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        status = cli.run([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run
