"""Every example in a docstring prints what it shows, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import regimewrap

PACKAGE = Path(regimewrap.__file__).parent
MODULES = [
    ".".join(("regimewrap", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]
PUBLIC = sorted(set(regimewrap.__all__) - {"__version__", "RegimewrapError"})


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module_print_what_they_show(name):
    module = importlib.import_module(name)
    names = {"torch": torch, "nn": nn, "regimewrap": regimewrap}
    runner = doctest.DocTestRunner()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no layer of .* is faster sparse")  # what `serve` finds for so small a model
        for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names):
            runner.run(test)
    assert runner.tries
    assert runner.failures == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_shows_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(regimewrap, name))
