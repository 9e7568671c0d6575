"""A message that suggests a name writes it as it is."""

from __future__ import annotations

from regimewrap.files import nearest


def test_the_nearest_name_is_suggested_with_its_own_capitals():
    assert nearest("make_Digits", ["make_MNIST", "make_digits"]) == " Did you mean 'make_digits'?"
    assert nearest("convnet", ["ConvNet", "MLP"]) == " Did you mean 'ConvNet'?"


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("sawtooth", ["x", "y"]) == ""
