from __future__ import annotations

import pytest
import torch

from regimewrap.errors import SelectionError
from regimewrap.topk.op import topk_gate
from regimewrap.topk.reference import kept

HALF = torch.tensor(0.5, dtype=torch.float64)
X = torch.ones(2, 3)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
    ],
    ids=["integer", "bool", "complex", "sparse"],
)
def test_only_dense_floating_tensors_are_ranked(x):
    with pytest.raises(SelectionError, match=r"got (a tensor of|layout)"):
        topk_gate(x, HALF)
    with pytest.raises(SelectionError):
        kept(x, 0.5)


@pytest.mark.parametrize("keep_ratio", [0.0, -0.5, float("nan")])
def test_a_keep_ratio_must_be_positive(keep_ratio):
    with pytest.raises(SelectionError, match=r"fraction in \(0, 1\]"):
        topk_gate(X, torch.tensor(keep_ratio, dtype=torch.float64))
    with pytest.raises(SelectionError, match=r"fraction in \(0, 1\]"):
        kept(X, keep_ratio)


@pytest.mark.parametrize(
    "keep_ratio", [0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float64), HALF.to("meta")]
)
def test_the_keep_ratio_is_a_double_on_the_cpu(keep_ratio):
    with pytest.raises(SelectionError, match="0-d float64 tensor on the CPU"):
        topk_gate(X, keep_ratio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "samples"}, "Did you mean 'sample'"),
        ({"score": "abs"}, "score must be one of magnitude, value"),
        ({"relative_to": "alive"}, "relative_to must be one of"),
        ({"ties": "exactly"}, "Did you mean 'exact'"),
        ({"scope": "position", "channel_dim": 2}, "channel_dim must name a dimension"),
        ({"multiplier": 0.0}, "multiplier must be a positive number"),
        ({"multiplier": float("inf")}, "multiplier must be a positive number"),
    ],
)
def test_unknown_settings_name_what_was_expected(settings, message):
    with pytest.raises(SelectionError, match=message):
        topk_gate(X, HALF, **settings)
    with pytest.raises(SelectionError, match=message):
        kept(X, 0.5, **settings)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(SelectionError, match="gradient must be one of"):
        topk_gate(X, HALF, gradient="ste")
