"""Bootstrap intervals: against loops, against theory, and their clusters."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.metrics import bootstrap


def test_resampled_sums_are_sums_of_drawn_units():
    statistics = np.random.default_rng(0).integers(0, 9, size=(7, 3)).astype(float)
    drawn = np.random.Generator(np.random.Philox(key=5)).integers(7, size=(20, 7))
    expected = [statistics[rows].sum(axis=0) for rows in drawn]
    np.testing.assert_array_equal(bootstrap.resampled_sums(statistics, seed=5, resamples=20), expected)


def test_cutting_the_resamples_into_blocks_changes_nothing(monkeypatch):
    statistics = np.random.default_rng(0).normal(size=(40, 2))
    whole = bootstrap.resampled_sums(statistics, seed=1, resamples=33)
    monkeypatch.setattr(bootstrap, "_MULTIPLICITIES_IN_MEMORY", 200)
    np.testing.assert_allclose(bootstrap.resampled_sums(statistics, seed=1, resamples=33), whole, rtol=1e-12)


def test_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    low, high = bootstrap.mean_interval(values, seed=0, resamples=2000)["ci95"]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        low, high = bootstrap.mean_interval(generator.normal(size=60), seed=trial, resamples=300)["ci95"]
        hits += low <= 0.0 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_samples_of_one_source_do_not_count_as_independent():
    by_source = np.random.default_rng(2).normal(size=100)
    values, groups = np.repeat(by_source, 8), np.repeat(np.arange(100), 8)
    rows = np.diff(bootstrap.mean_interval(values, seed=0)["ci95"])
    clustered = np.diff(bootstrap.mean_interval(values, seed=0, groups=groups)["ci95"])
    alone = np.diff(bootstrap.mean_interval(by_source, seed=0)["ci95"])
    assert clustered == pytest.approx(alone)
    assert clustered > 2.5 * rows


def test_missing_scores_change_neither_mean_nor_interval():
    values = np.array([0.1, 0.5, 0.4, 0.9, 0.2])
    holed = np.array([0.1, np.nan, 0.5, 0.4, np.nan, 0.9, 0.2])
    assert bootstrap.mean_interval(holed, seed=3) == bootstrap.mean_interval(values, seed=3)


def test_a_group_with_nothing_present_is_no_unit():
    values, groups = np.array([1.0, 2.0, np.nan, np.nan]), ["a", "b", "gone", "gone"]
    result = bootstrap.mean_interval(values, seed=0, groups=groups)
    assert result == bootstrap.mean_interval(values[:2], seed=0, groups=groups[:2])


def test_signature_states_seed_and_resamples_and_the_result_is_json():
    result = bootstrap.mean_interval([0.1, 0.4], seed=7, resamples=50, groups=[1, 2], signature="R|v1")
    assert result["signature"] == "R|v1|bs:50|seed:7|unit:source"
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert bootstrap.mean_interval([0.1, 0.4], seed=7)["signature"] == "bs:1000|seed:7|unit:row"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 2**63))
def test_interval_holds_the_mean_and_depends_on_nothing_but_the_seed(values, seed):
    result = bootstrap.mean_interval(values, seed=seed, resamples=200)
    low, high = result["ci95"]
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert result == bootstrap.mean_interval(values, seed=seed, resamples=200)


@pytest.mark.parametrize(
    ("values", "message"), [([], "no score"), ([np.nan], "no score"), ([1.0, np.inf], "infinite")]
)
def test_no_interval_without_scores(values, message):
    with pytest.raises(errors.DataError, match=message):
        bootstrap.mean_interval(values, seed=0)


def test_labels_must_match_and_resamples_be_positive():
    with pytest.raises(errors.DataError, match="group labels"):
        bootstrap.mean_interval([1.0, 2.0], seed=0, groups=["a"])
    with pytest.raises(errors.ConfigError, match="resamples"):
        bootstrap.mean_interval([1.0, 2.0], seed=0, resamples=0)
    with pytest.raises(errors.DataError, match="no sentences"):
        bootstrap.resampled_sums(np.zeros((0, 3)), seed=0)
