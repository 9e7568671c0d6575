"""Without transformers, or with an old one, the adapter says what to install."""

from __future__ import annotations

import importlib
import sys

import pytest
from regimewrap.integrations import requires

from regimewrap.errors import MissingExtraError, UnsupportedVersionError

ADAPTER = "regimewrap.integrations.transformers"


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requires, "find_spec", lambda name: None if name == package else name)
    monkeypatch.setattr(requires, "version", lambda _: "99")
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)

    with pytest.raises(MissingExtraError, match=rf"{package} is not installed; .*'\.\[transformers\]'"):
        importlib.import_module(ADAPTER)


def test_an_old_version_says_which_are_supported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requires, "find_spec", lambda name: name)
    monkeypatch.setattr(requires, "version", lambda _: "4.49.0")
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)

    with pytest.raises(UnsupportedVersionError, match=r"transformers 4\.49\.0 is installed and .* supports 4\.50 or"):
        importlib.import_module(ADAPTER)
