"""Rank correlations against pair counting, scipy, and by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rest_jax import errors
from rest_jax.metrics import rank

SCORES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=25)


def _tau_b(x, y):
    """Kendall's tau-b by counting pairs."""
    agree = tied_x = tied_y = 0
    pairs = list(itertools.combinations(range(len(x)), 2))
    for i, j in pairs:
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        agree += a * b
        tied_x += a == 0
        tied_y += b == 0
    return agree / np.sqrt((len(pairs) - tied_x) * (len(pairs) - tied_y))


@given(SCORES)
def test_kendall_equals_pair_counting(pairs):
    x, y = map(list, zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert rank.kendall(x, y) is None
    else:
        assert rank.kendall(x, y) == pytest.approx(_tau_b(x, y), abs=1e-12)


@given(SCORES)
def test_spearman_equals_scipy(pairs):
    x, y = map(list, zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert rank.spearman(x, y) is None
    else:
        assert rank.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_by_hand_with_a_tie():
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert rank.spearman([0, 1, 1, 7], [10, 20, 30, 40]) == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))


@pytest.mark.parametrize("correlation", [rank.spearman, rank.kendall])
def test_any_rising_map_keeps_the_correlation_and_a_falling_one_turns_it(correlation):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 50))
    value = correlation(x, y)
    assert correlation(np.exp(x), y) == pytest.approx(value)
    assert correlation(-x, y) == pytest.approx(-value)
    assert correlation(x, np.exp(x)) == pytest.approx(1.0)


@pytest.mark.parametrize("correlation", [rank.spearman, rank.kendall])
def test_missing_scores_are_left_out(correlation):
    x, y = [1.0, np.nan, 2.0, 3.0, 9.0], [1.0, 5.0, 3.0, 2.0, np.nan]
    assert correlation(x, y) == correlation([1, 2, 3], [1, 3, 2])


@pytest.mark.parametrize("correlation", [rank.spearman, rank.kendall])
@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0], [np.nan, 1.0, np.nan]])
def test_without_an_order_there_is_no_correlation(correlation, values):
    assert correlation(values, list(range(len(values)))) is None


def test_lengths_must_agree():
    with pytest.raises(errors.DataError, match="shapes"):
        rank.spearman([1, 2], [1, 2, 3])
    with pytest.raises(errors.DataError, match="group labels"):
        rank.mean_within([1, 2], [1, 2], ["a"])


def test_mean_within_averages_groups_and_skips_those_without_an_order():
    x = [1, 2, 3, 1, 2, 3, 5, 5, 9]
    y = [1, 2, 3, 3, 2, 1, 1, 2, 0]
    groups = ["a", "a", "a", "b", "b", "b", "tied", "tied", "alone"]
    assert rank.mean_within(x, y, groups) == pytest.approx(0.0)
    assert rank.mean_within(x[:3], y[:3], groups[:3]) == pytest.approx(1.0)
    assert rank.mean_within(x[6:], y[6:], groups[6:]) is None


def test_a_group_without_correlation_counts_as_zero():
    x, y, groups = [1, 2, 3, 4, 1, 2], [2, 4, 1, 3, 1, 2], [0, 0, 0, 0, 1, 1]
    assert rank.kendall(x[:4], y[:4]) == 0.0
    assert rank.mean_within(x, y, groups, rank.kendall) == pytest.approx(0.5)


def test_within_group_order_can_contradict_the_pooled_one():
    x, y = [1, 2, 11, 12], [2, 1, 12, 11]
    assert rank.spearman(x, y) > 0
    assert rank.mean_within(x, y, [0, 0, 1, 1]) == pytest.approx(-1.0)
