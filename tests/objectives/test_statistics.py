from __future__ import annotations

import fractions
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.objectives import statistics

_ANY = st.floats(allow_nan=True, allow_infinity=True)
_TIED = st.sampled_from([0.0, -0.0, 0.5, 0.25, 1.0, math.nan, math.inf, -math.inf, 5e-324, -5e-324])
_VALUES = st.lists(st.one_of(_ANY, _TIED, st.floats(0, 1)), min_size=1, max_size=60)


def cut(values: list[float], data: st.DataObject) -> list[np.ndarray]:
    """The values in chunks of any sizes, empty ones among them."""
    places = data.draw(st.lists(st.integers(0, len(values)), max_size=4).map(sorted))
    ends = [0, *places, len(values)]
    return [np.array(values[a:b], np.float64) for a, b in itertools.pairwise(ends)]


@given(_VALUES, st.data())
def test_every_order_statistic_is_that_of_a_sort(values, data):
    ranked = np.sort([v for v in values if math.isfinite(v)])
    chunks = cut(values, data)
    if not ranked.size:
        with pytest.raises(errors.DataError, match=f"0 of {len(values)} rewards are finite"):
            statistics.order_statistics(chunks, lambda count: [1])
        return
    found = statistics.order_statistics(chunks, lambda count: range(1, count + 1))
    np.testing.assert_array_equal(found, ranked)  # -0.0 equals 0.0
    assert not np.signbit([v for v in found if v == 0.0]).any()


@given(_VALUES, st.lists(st.integers(0, 1000), min_size=1, max_size=5), st.data())
def test_quantiles_match_a_sort_and_their_definition(values, mille, data):
    finite = np.array([v for v in values if math.isfinite(v)])
    if not finite.size:
        return
    found = statistics.quantiles(cut(values, data), [m / 1000 for m in mille])
    for share, value in zip(mille, found, strict=True):
        # Integers, so that the definition is checked without rounding.
        assert value in finite
        assert 1000 * (finite <= value).sum() >= share * finite.size
        assert 1000 * (finite < value).sum() <= share * finite.size
        assert value == np.sort(finite)[max(-(-share * finite.size // 1000), 1) - 1]


@given(_VALUES, st.lists(st.floats(0, 1), min_size=1, max_size=5), st.data())
def test_interpolated_quantiles_are_numpys_to_the_bit(values, shares, data):
    finite = np.array([v for v in values if math.isfinite(v) and abs(v) < 1e300])
    if finite.size:
        found = statistics.interpolated_quantiles(cut(finite.tolist(), data), shares)
        np.testing.assert_array_equal(found, np.quantile(finite, shares))


def test_one_element_is_every_quantile():
    assert statistics.quantiles(np.array([math.nan, 0.3]), (0.0, 0.5, 1.0)) == (0.3, 0.3, 0.3)
    assert statistics.interpolated_quantiles(np.array([0.3]), (0.0, 0.5, 1.0)) == (0.3, 0.3, 0.3)


def test_many_numbers_in_many_chunks():
    rng = np.random.default_rng(5)
    values = np.concatenate([rng.random(60_000), rng.integers(0, 50, 40_000) / 50, rng.normal(size=5_000)])
    rng.shuffle(values)
    ranked = np.sort(values)
    wanted = (1, 2, 777, 50_000, 99_999, len(values))
    for size in (311, 4096, len(values)):
        chunks = [values[i : i + size] for i in range(0, len(values), size)]
        assert statistics.order_statistics(chunks, lambda _: wanted) == tuple(ranked[np.array(wanted) - 1])


def test_ranks_and_shares_outside_are_refused():
    for rank in (0, 4):
        with pytest.raises(ValueError, match=rf"ranks \[{rank}\] of 3 numbers"):
            statistics.order_statistics(np.arange(3.0), lambda _, rank=rank: [rank])
    with pytest.raises(errors.ConfigError, match="quantile 90 is not in"):
        statistics.quantiles(np.arange(3.0), (90,))


def test_chunks_can_be_gone_through_again_and_an_iterator_cannot():
    parts = [np.array([3.0, 1.0]), np.array([2.0])]
    assert statistics.quantiles(statistics.Chunks(lambda: iter(parts)), (0.5,)) == (2.0,)
    with pytest.raises(ValueError, match="not an iterator"):
        statistics.quantiles(iter(parts), (0.5,))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=50), st.data())
def test_sums_are_exact_and_do_not_depend_on_the_cut(values, data):
    found = statistics.ExactSum()
    for chunk in cut(values, data):
        found.add(chunk)
    exact = sum((fractions.Fraction(v) for v in values), fractions.Fraction(0))
    try:
        assert found.total == math.fsum(values) == float(exact)
    except OverflowError:
        assert abs(exact) > 1.7e308
    if values:
        assert found.mean == float(exact / len(values))
    else:
        assert math.isnan(found.mean)


def test_a_long_sum_where_adding_in_order_loses_digits():
    values = np.tile([1e16, 0.1, -1e16], 700_000)  # more than are added at once
    found = statistics.ExactSum()
    found.add(values)
    assert found.total == float(700_000 * fractions.Fraction(0.1)) == math.fsum(values)
    assert found.total != values.cumsum()[-1]
    with pytest.raises(ValueError, match="finite"):
        found.add(np.array([1.0, math.nan]))


@given(_VALUES, st.data())
def test_a_summary_is_numpys(values, data):
    values = [v for v in values if not math.isfinite(v) or abs(v) < 1e300]
    found = statistics.Summary()
    for chunk in cut(values, data):
        found.add(chunk)
    finite = np.array([v for v in values if math.isfinite(v)])
    assert (found.total, found.finite) == (len(values), finite.size)
    if finite.size:
        assert (found.minimum, found.maximum) == (finite.min(), finite.max())
        assert found.sum == math.fsum(finite)
        np.testing.assert_allclose(found.mean, finite.mean(), rtol=1e-12, atol=1e285)
