"""The meaning of a gate, by hand-made rows. Every other test compares with the reference; this one does not."""

from __future__ import annotations

import math

import pytest
import torch

from regimewrap.topk.reference import kept

nan, inf = math.nan, math.inf


def kept_units(row: list[float], keep_ratio: float, **settings: object) -> list[int]:
    mask = kept(torch.tensor([row]), keep_ratio, **settings)
    return mask[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("row", "keep_ratio", "expected"),
    [
        ([1.0, -3.0, 2.0, 0.5], 0.5, [1, 2]),
        ([1.0, -3.0, 2.0, 0.5], 0.74, [1, 2]),  # int(4 * 0.74) = 2
        ([1.0, -3.0, 2.0, 0.5], 0.01, [1]),  # at least one
        ([1.0, 2.0, 2.0, 2.0], 0.5, [1, 2, 3]),  # ties are kept
        ([0.0, 5.0, 0.0, 0.0], 0.25, [1]),
        ([0.0, 5.0, 0.0, -0.0], 0.5, [0, 1, 2, 3]),  # the second largest is a zero, and so are its ties
        ([0.0, 0.0], 0.5, [0, 1]),
        ([7.0], 0.01, [0]),
        ([inf, 1.0, -inf, 2.0], 0.5, [0, 2]),
        ([inf, 1.0, inf, 2.0], 0.25, [0, 2]),
        ([nan, 1.0, 3.0, 2.0], 0.5, [0, 2]),  # NaN takes one of the two places
        ([nan, 1.0, nan, 2.0], 0.25, [0, 2]),  # NaN is never hidden
        ([nan, inf, 1.0, 2.0], 0.25, [0]),  # and ranks above infinity
    ],
)
def test_the_largest_magnitudes_are_kept(row, keep_ratio, expected):
    assert kept_units(row, keep_ratio) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1.0, 2.0, 2.0, 2.0], [1, 2]),
        ([0.0, 5.0, 0.0, -0.0], [0, 1]),
        ([0.0, 0.0, 0.0, 0.0], [0, 1]),
        ([3.0, 3.0, nan, 3.0], [0, 2]),
        ([nan, nan, 1.0, nan], [0, 1, 3]),
    ],
)
def test_exact_ties_keep_k_and_the_lowest_index_first(row, expected):
    assert kept_units(row, 0.5, ties="exact") == expected


def test_score_value_ranks_by_sign():
    assert kept_units([1.0, -3.0, 2.0, -0.5], 0.5, score="value") == [0, 2]
    assert kept_units([-0.0, 0.0, -1.0, -inf], 0.25, score="value") == [0, 1]


def test_relative_to_active_counts_non_zero_units():
    assert kept_units([0.0, 4.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0], 0.5, relative_to="active") == [1, 5]
    assert kept_units([0.0, nan, 0.0, 1.0], 0.5, relative_to="active") == [1]
    assert kept_units([0.0, 0.0], 0.5, relative_to="active") == [0, 1]


def test_full_budget_keeps_everything_whatever_the_multiplier():
    assert kept_units([0.0, 1.0, 2.0], 1.0, multiplier=0.1) == [0, 1, 2]
    assert kept_units([0.0, 1.0, 2.0], 0.9, multiplier=2.0, relative_to="active", score="value") == [0, 1, 2]


def test_the_multiplier_scales_the_ratio():
    assert kept_units([4.0, 3.0, 2.0, 1.0], 0.25, multiplier=2.0) == [0, 1]


def test_k_is_counted_in_double_precision():
    n = 1000
    row = torch.arange(n, dtype=torch.float32)[None]
    for keep_ratio in (0.001, 0.29, 0.57, 0.999):
        assert int(kept(row, keep_ratio).sum()) == max(1, int(n * keep_ratio))


def test_scopes_rank_samples_positions_and_the_batch():
    x = torch.tensor([[[1.0, 8.0], [2.0, 7.0]], [[3.0, 6.0], [4.0, 5.0]]])  # sample, channel, position

    assert kept(x, 0.25, scope="sample").tolist() == [[[False, True], [False, False]], [[False, True], [False, False]]]
    assert kept(x, 0.5, scope="position", channel_dim=1).tolist() == [
        [[False, True], [True, False]],
        [[False, True], [True, False]],
    ]
    assert torch.equal(kept(x, 0.5, scope="position", channel_dim=-2), kept(x, 0.5, scope="position", channel_dim=1))
    assert kept(x, 0.25, scope="batch").tolist() == [[[False, True], [False, True]], [[False, False], [False, False]]]


def test_a_tensor_without_units_beyond_its_samples_is_kept():
    assert kept(torch.tensor([1.0, 2.0, 3.0]), 0.1).all()
    assert kept(torch.tensor(1.0), 0.1).item()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_an_empty_tensor_has_an_empty_mask(shape, scope):
    assert kept(torch.empty(shape), 0.5, scope=scope).shape == shape
