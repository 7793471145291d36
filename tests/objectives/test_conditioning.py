from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.objectives import statistics
from rest_jax.objectives.conditioning import MISSING, RewardConditionedConfig, bucket_edges, reward_bucket


def test_buckets_worked_by_hand():
    rewards = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    edges = bucket_edges(rewards, 4)
    assert edges == (0.2, 0.4, 0.6)
    np.testing.assert_array_equal(reward_bucket(rewards, edges), [0, 0, 1, 1, 2, 2, 3, 3])
    others = np.array([[-1.0, 0.20001], [np.nan, np.inf], [5.0, 0.6]])
    np.testing.assert_array_equal(reward_bucket(others, edges), [[0, 1], [MISSING, MISSING], [3, 2]])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0, float("nan")]), min_size=2), st.integers(2, 7))
def test_no_bucket_is_empty_and_none_is_too_full(rewards, buckets):
    rewards = np.array(rewards)
    finite = rewards[np.isfinite(rewards)]
    if len(set(finite)) < 2:
        with pytest.raises(errors.DataError):
            bucket_edges(rewards, buckets)
        return
    edges = bucket_edges(rewards, buckets)
    found = reward_bucket(rewards, edges)
    assert len(edges) < buckets
    assert set(found[np.isfinite(rewards)]) == set(range(len(edges) + 1))
    assert (found[~np.isfinite(rewards)] == MISSING).all()
    order = np.argsort(finite, kind="stable")
    assert (np.diff(reward_bucket(finite[order], edges)) >= 0).all()
    # chunks give the same edges as one array
    parts = [rewards[: len(rewards) // 2], rewards[len(rewards) // 2 :]]
    assert bucket_edges(statistics.Chunks(lambda: parts), buckets) == edges


def test_different_rewards_fill_buckets_of_one_size():
    rewards = np.random.default_rng(0).uniform(size=100)
    counts = np.bincount(reward_bucket(rewards, bucket_edges(rewards, 5)))
    np.testing.assert_array_equal(counts, [20] * 5)


def test_ties_at_the_top_leave_the_highest_bucket_with_data():
    rewards = np.array([0.2, 0.4] + [1.0] * 98)
    edges = bucket_edges(rewards, 5)
    assert edges == (0.4,)
    assert (reward_bucket(rewards, edges) == 1).sum() == 98


def test_wrong_settings_are_named():
    for field, value in {"buckets": 1, "normalise": "row", "label_smoothing": 1.0}.items():
        with pytest.raises(errors.ConfigError, match=rf"RewardConditionedConfig\.{field}"):
            RewardConditionedConfig(**{field: value})
    assert RewardConditionedConfig().name == "RCBC"
    with pytest.raises(errors.ConfigError, match="1 reward buckets"):
        bucket_edges(np.array([1.0, 2.0]), 1)
    with pytest.raises(errors.DataError):
        bucket_edges(np.array([np.nan]), 2)
    with pytest.raises(ValueError, match="rise"):
        reward_bucket(np.array([1.0]), (0.5, 0.5))
