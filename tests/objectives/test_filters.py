from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.objectives import filters

_REWARD = st.one_of(
    st.floats(0, 1), st.sampled_from([0.0, -0.0, 0.5, 1.0, math.nan, math.inf, -math.inf, 1e38])
)
_QUANTILE = st.integers(0, 100).map(lambda percent: percent / 100)


def test_the_filter_is_strict():
    rewards = np.array([0.7, np.nextafter(0.7, 1), np.nextafter(0.7, 0), 0.71])
    np.testing.assert_array_equal(filters.above_threshold(rewards, 0.7), [False, True, False, True])


def test_missing_infinite_and_negative_zero_do_not_pass():
    rewards = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 5e-324])
    np.testing.assert_array_equal(filters.above_threshold(rewards, 0.0), [False] * 5 + [True])
    assert not filters.above_threshold(np.array([0.0]), -0.0).any()


def test_float32_rewards_are_compared_in_float64():
    stored = np.array([0.7], np.float32)  # a little below 0.7
    assert float(stored[0]) < 0.7
    assert not filters.above_threshold(stored, 0.7)[0]
    assert filters.above_threshold(stored, float(stored[0]) - 1e-12)[0]


def test_quantiles_by_hand():
    rewards = np.array([0.3, 0.1, 0.2, 0.4, np.nan])
    found = filters.quantile_thresholds(rewards, (0.0, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0))
    assert found == (0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.4)


def test_quantiles_mean_the_decimal_that_was_written():
    rewards = np.arange(1, 101) / 100
    assert 0.07 * 100 > 7  # why binary arithmetic would take the eighth
    assert filters.quantile_thresholds(rewards, (0.07,)) == (0.07,)
    for percent in range(1, 101):
        assert filters.quantile_thresholds(rewards, (percent / 100,)) == (percent / 100,)


@given(st.lists(_REWARD, min_size=1), _QUANTILE)
def test_quantiles_match_numpy_and_their_definition(rewards, quantile):
    rewards = np.array(rewards)
    finite = rewards[np.isfinite(rewards)]
    if not finite.size:
        with pytest.raises(errors.DataError, match=f"0 of {len(rewards)} rewards"):
            filters.quantile_thresholds(rewards, (quantile,))
        return
    (tau,) = filters.quantile_thresholds(rewards, (quantile,))
    percent = round(100 * quantile)  # integers, so that the definition is checked without rounding
    assert tau in finite
    assert 100 * (finite <= tau).sum() >= percent * finite.size
    assert 100 * (finite < tau).sum() <= percent * finite.size
    assert 100 * filters.above_threshold(rewards, tau).sum() <= (100 - percent) * finite.size


@given(st.lists(_REWARD, min_size=1), st.randoms(use_true_random=False))
def test_quantiles_do_not_depend_on_order(rewards, random):
    shuffled = rewards.copy()
    random.shuffle(shuffled)
    if np.isfinite(rewards).any():
        points = (0.1, 0.5, 0.9)
        assert filters.quantile_thresholds(np.array(rewards), points) == filters.quantile_thresholds(
            np.array(shuffled), points
        )


def test_nothing_kept_is_an_error_with_the_largest_reward():
    rule = filters.threshold_rule(0.95)
    found = str(filters.nothing_kept(np.linspace(0, 0.93, 1000), rule))
    assert "threshold 0.95 keeps 0 of 1000 (max reward 0.93; quantiles 0.5: 0.4645, 0.75: 0.6973" in found
    assert found == str(filters.nothing_kept(np.array_split(np.linspace(0, 0.93, 1000), 7), rule))
    found = str(filters.nothing_kept(np.full(2, np.nan), rule))
    assert "keeps 0 of 2 (no reward is a finite number)" in found


def test_constant_rewards_keep_all_or_nothing():
    rewards = np.full(8, 0.5)
    assert filters.above_threshold(rewards, np.nextafter(0.5, 0)).all()
    (tau,) = filters.quantile_thresholds(rewards, (0.1,))
    assert not filters.above_threshold(rewards, tau).any()


def test_a_threshold_that_is_nan_is_refused():
    with pytest.raises(errors.ConfigError, match="NaN"):
        filters.threshold_rule(math.nan)


def test_the_rules_of_a_schedule_are_its_thresholds():
    rewards = np.array([0.15, 0.25, 0.35, 0.45])
    for schedule, quantiles in (
        (filters.ThresholdSchedule(values=(0.25, 0.35)), (None, None)),
        (filters.ThresholdSchedule(quantiles=(0.5, 0.75)), (0.5, 0.75)),
    ):
        rules = schedule.rules(rewards)
        assert [rule.threshold for rule in rules] == [rule.value for rule in rules] == [0.25, 0.35]
        assert tuple(rule.quantile for rule in rules) == quantiles
        assert [rule.judge(rewards, np.array([0])).sum() for rule in rules] == [2, 1]


def test_schedule_of_values_is_returned_as_it_is():
    schedule = filters.ThresholdSchedule(values=[0, 0.7, 0.8])  # gin gives lists
    assert schedule.values == (0.0, 0.7, 0.8)
    assert schedule.absolute(np.full(3, np.nan)) == (0.0, 0.7, 0.8)
    assert len(schedule) == 3
    assert hash(schedule) == hash(filters.ThresholdSchedule(values=(0.0, 0.7, 0.8)))


def test_schedule_of_quantiles_becomes_rewards():
    rewards = np.array([0.15, 0.25, 0.35, 0.45])
    schedule = filters.ThresholdSchedule(quantiles=(0.5, 0.75))
    assert schedule.absolute(rewards) == (0.25, 0.35)
    assert len(schedule) == 2


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"values": (0.7, 0.9, 0.7)}, r"threshold list falls: 0\.9 then 0\.7 \[ThresholdSchedule\.values\]"),
        ({"quantiles": (0.5, 0.5)}, r"does not rise: 0\.5 then 0\.5 \[ThresholdSchedule\.quantiles\]"),
        ({"values": (0.7, 1.1)}, r"1\.1 is not in \[0, 1\]"),
        ({"values": (-0.1,)}, r"-0\.1 is not in \[0, 1\]"),
        ({"values": (70, 80)}, r"70\.0 is not in \[0, 1\]"),
        ({"values": (0.7, math.nan)}, r"nan is not in \[0, 1\]"),
        ({"values": ()}, "empty"),
        ({"values": 0.7}, "not a list of numbers"),
        ({"values": ("high",)}, "not a list of numbers"),
        ({}, "neither values nor quantiles"),
        ({"values": (0.7,), "quantiles": (0.5,)}, "both values and quantiles"),
    ],
)
def test_wrong_schedules_are_named(given_, message):
    with pytest.raises(errors.ConfigError, match=message):
        filters.ThresholdSchedule(**given_)


@given(st.lists(st.floats(allow_nan=True), max_size=4))
def test_a_schedule_is_accepted_exactly_when_it_rises_within_range(values):
    rises = all(b > a for a, b in zip(values, values[1:], strict=False))
    good = bool(values) and rises and all(0 <= v <= 1 for v in values)
    if good:
        assert filters.ThresholdSchedule(values=tuple(values)).values == tuple(values)
    else:
        with pytest.raises(errors.ConfigError):
            filters.ThresholdSchedule(values=tuple(values))


def test_first_threshold_must_exceed_the_mean():
    filters.check_above_mean(0.7, 0.69)
    for mean in (0.7, 0.71, math.nan):
        with pytest.raises(errors.ConfigError, match=f"0.7 is not above the mean reward {mean}"):
            filters.check_above_mean(0.7, mean)
