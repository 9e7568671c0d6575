"""An adapter whose framework is missing or too old says what to install, before it imports anything of it."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
from regimewrap.integrations import requires

from regimewrap.errors import MissingExtraError, UnsupportedVersionError


@pytest.fixture(params=["accelerate", "lightning"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delitem(sys.modules, f"regimewrap.integrations.{request.param}", raising=False)
    return request.param


def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requires, "find_spec", lambda _: None)

    with pytest.raises(MissingExtraError, match=rf"{name} is not installed; run `pip install -e '\.\[{name}\]'`"):
        import_module(f"regimewrap.integrations.{name}")


def test_an_old_package_names_what_is_supported(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requires, "find_spec", lambda _: object())
    monkeypatch.setattr(requires, "version", lambda _: "0.9.1")

    with pytest.raises(UnsupportedVersionError, match=rf"{name} 0.9.1 is installed and regimewrap supports \d.\d or"):
        import_module(f"regimewrap.integrations.{name}")
