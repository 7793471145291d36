"""Filters that judge each source on its own, against plain Python on one source at a time."""

from __future__ import annotations

import fractions
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.objectives import filters, rules, selections

_REWARD = st.one_of(
    st.sampled_from([0.0, -0.0, 0.1, 0.5, 0.5, 0.9, 1.0, math.nan, math.inf, -math.inf]),
    st.floats(-1e6, 1e6),
)
_SOURCE = st.lists(_REWARD, min_size=1, max_size=9)
_SOURCES = st.lists(_SOURCE, max_size=7)
_HUNDREDTHS = st.integers(0, 99)


def flat(sources: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """All rewards [n], and the first row of each source [m]."""
    lengths = [len(source) for source in sources]
    starts = np.cumsum([0, *lengths[:-1]]) if lengths else np.zeros(0, np.int64)
    return np.array(list(itertools.chain.from_iterable(sources)), np.float64), starts.astype(np.int64)


def by_source(mask: np.ndarray, sources: list[list[float]]) -> list[list[bool]]:
    ends = np.cumsum([len(source) for source in sources])
    return [part.tolist() for part in np.split(mask, ends[:-1])] if sources else []


def percentile_by_hand(source: list[float], percent: int) -> list[bool]:
    """Strictly above the smallest r with at least percent/100 of the finite ones at or below it."""
    finite = [r for r in source if math.isfinite(r)]
    if not finite:
        return [False] * len(source)
    tau = min(r for r in finite if 100 * sum(other <= r for other in finite) >= percent * len(finite))
    return [math.isfinite(r) and r > tau for r in source]


def mean_max_by_hand(source: list[float], percent: int) -> list[bool]:
    """In fractions, without rounding."""
    finite = [fractions.Fraction(r) for r in source if math.isfinite(r)]
    if not finite:
        return [False] * len(source)
    gamma = fractions.Fraction(percent, 100)
    tau = gamma * max(finite) + (1 - gamma) * sum(finite) / len(finite)
    return [math.isfinite(r) and fractions.Fraction(r) > tau for r in source]


def top_by_hand(source: list[float], count: int) -> list[bool]:
    ranked = sorted((-r, k) for k, r in enumerate(source) if math.isfinite(r))
    best = {k for _, k in ranked[:count]}
    return [k in best for k in range(len(source))]


@settings(deadline=None)
@given(_SOURCES, _HUNDREDTHS)
def test_percentiles_against_their_definition(sources, percent):
    (rule,) = selections.PercentileSchedule((percent / 100,)).rules(())
    found = by_source(rule.judge(*flat(sources)), sources)
    assert found == [percentile_by_hand(source, percent) for source in sources]


@settings(deadline=None)
@given(_SOURCES, _HUNDREDTHS)
def test_a_percentile_of_a_source_is_the_global_quantile_of_that_source_alone(sources, percent):
    """The same order statistic as the thresholds by quantile, which count bits and do not sort."""
    found = selections.source_percentiles(*flat(sources), percent / 100)
    for source, tau in zip(sources, found, strict=True):
        if np.isfinite(source).any():
            assert filters.quantile_thresholds(np.array(source), (percent / 100,)) == (tau,)
        else:
            assert math.isnan(tau)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-64, 64).map(lambda k: k / 64), min_size=1, max_size=8), max_size=7))
def test_mean_max_against_fractions(sources):
    """Sizes of 1, 2, 4 and 8 and gammas in quarters, so that doubles do not round at all."""
    sources = [source[: 1 << (len(source).bit_length() - 1)] for source in sources]
    for percent in (0, 25, 50, 75):
        (rule,) = selections.MeanMaxSchedule((percent / 100,)).rules(())
        found = by_source(rule.judge(*flat(sources)), sources)
        assert found == [mean_max_by_hand(source, percent) for source in sources]


@settings(deadline=None)
@given(_SOURCES, _HUNDREDTHS)
def test_mean_max_is_right_but_for_rounding(sources, percent):
    """tau within a few units in the last place of the exact one, and between mean and maximum."""
    rewards, starts = flat(sources)
    found = selections.source_mean_max(rewards, starts, percent / 100)
    for source, tau in zip(sources, found, strict=True):
        finite = [fractions.Fraction(r) for r in source if math.isfinite(r)]
        if not finite:
            assert math.isnan(tau)
            continue
        gamma = fractions.Fraction(percent, 100)
        exact = gamma * max(finite) + (1 - gamma) * sum(finite) / len(finite)
        largest = float(max(map(abs, finite)))
        assert abs(float(exact) - tau) <= 16 * np.finfo(np.float64).eps * largest


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.integers(1, 40), _HUNDREDTHS)
def test_equal_rewards_and_single_candidates_pass_no_strict_filter(reward, size, percent):
    """Whatever rounding does to the mean of equal numbers: 0.1 + 0.1 + 0.1 over 3 is below 0.1."""
    rewards, starts = np.full(size, reward), np.zeros(1, np.int64)
    for schedule in (
        selections.PercentileSchedule((percent / 100,)),
        selections.MeanMaxSchedule((percent / 100,)),
    ):
        (rule,) = schedule.rules(())
        assert not rule.judge(rewards, starts).any()
    (rule,) = selections.TopKSchedule((1,)).rules(())
    assert rule.judge(rewards, starts).tolist() == [True] + [False] * (size - 1)


@settings(deadline=None)
@given(_SOURCES, st.integers(1, 10))
def test_top_k_against_sorting(sources, count):
    (rule,) = selections.TopKSchedule((count,)).rules(())
    found = by_source(rule.judge(*flat(sources)), sources)
    assert found == [top_by_hand(source, count) for source in sources]


@settings(deadline=None)
@given(_SOURCES, _HUNDREDTHS, st.integers(1, 5), st.data())
def test_sources_do_not_see_each_other(sources, percent, count, data):
    """A source's verdict is the same alone, in other company and in another order of sources."""
    order = data.draw(st.permutations(range(len(sources))))
    for schedule in (
        selections.PercentileSchedule((percent / 100,)),
        selections.MeanMaxSchedule((percent / 100,)),
        selections.TopKSchedule((count,)),
    ):
        (rule,) = schedule.rules(())
        together = by_source(rule.judge(*flat(sources)), sources)
        shuffled = by_source(rule.judge(*flat([sources[k] for k in order])), [sources[k] for k in order])
        assert [together[k] for k in order] == shuffled
        assert together == [rule.judge(*flat([source])).tolist() for source in sources]


@settings(deadline=None)
@given(_SOURCE, _HUNDREDTHS, st.data())
def test_the_order_within_a_source_does_not_matter_but_for_ties_of_top_k(source, percent, data):
    order = data.draw(st.permutations(range(len(source))))
    shuffled = [source[k] for k in order]
    (rule,) = selections.PercentileSchedule((percent / 100,)).rules(())
    verdict = rule.judge(*flat([source]))
    assert rule.judge(*flat([shuffled])).tolist() == verdict[order].tolist()
    (rule,) = selections.TopKSchedule((2,)).rules(())
    kept = [np.array(given_)[rule.judge(*flat([given_]))] for given_ in (source, shuffled)]
    np.testing.assert_array_equal(*(np.sort(k) for k in kept))


def test_by_hand():
    """A.7's two filters on rewards 0.1 … 0.5: mean 0.3, maximum 0.5; a missing one does not count."""
    rewards = np.array([0.1, 0.2, 0.3, 0.4, 0.5, math.nan])
    starts = np.zeros(1, np.int64)
    for share, kept in ((0.0, 4), (0.2, 4), (0.21, 3), (0.6, 2), (0.9, 0)):
        (rule,) = selections.PercentileSchedule((share,)).rules(())
        assert rule.judge(rewards, starts).sum() == kept, share
    for gamma, kept in ((0.0, 2), (0.4, 2), (0.6, 1), (0.99, 1)):
        (rule,) = selections.MeanMaxSchedule((gamma,)).rules(())
        assert rule.judge(rewards, starts).sum() == kept, gamma
    np.testing.assert_allclose(selections.source_mean_max(rewards, starts, 0.75), [0.45], rtol=1e-15)


# The cap.


@settings(deadline=None)
@given(_SOURCES, st.integers(1, 6), st.integers(0, 2**63 - 1), st.data())
def test_a_cap_keeps_the_lowest_priorities_of_a_source(sources, most, seed, data):
    rewards, starts = flat(sources)
    kept = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards))), np.bool_
    )
    sizes = np.diff(starts, append=len(rewards))
    ids = np.repeat(10**12 + np.arange(len(sources)), sizes)
    samples = np.arange(len(rewards)) - np.repeat(starts, sizes)
    priorities = selections.cap_priorities(seed, np.ones_like(ids), ids, samples)
    found = selections.capped(kept, priorities, starts, most)
    for first, size in zip(starts, sizes, strict=True):
        rows = [row for row in range(first, first + size) if kept[row]]
        chosen = sorted(rows, key=lambda row: priorities[row])[:most]
        assert np.flatnonzero(found[first : first + size]).tolist() == sorted(k - first for k in chosen)


def test_a_cap_chooses_evenly_and_differently_by_seed_source_and_grow_step():
    """10 of 40 in 4,000 sources: each sample index is chosen 1,000 times, give or take five deviations."""
    sources, size, most = 4000, 40, 10
    ids = np.repeat(977 * np.arange(sources), size)
    samples, starts = np.tile(np.arange(size), sources), np.arange(0, sources * size, size)
    everything = np.ones(len(ids), bool)

    def chosen(seed: int, grow: int) -> np.ndarray:
        priorities = selections.cap_priorities(seed, np.full(len(ids), grow), ids, samples)
        return selections.capped(everything, priorities, starts, most).reshape(sources, size)

    found = chosen(0, 1)
    assert (found.sum(axis=1) == most).all()
    deviation = math.sqrt(sources * 0.25 * 0.75)
    assert np.abs(found.sum(axis=0) - sources * most / size).max() < 5 * deviation
    assert len({row.tobytes() for row in found}) > 0.99 * sources
    for other in (chosen(1, 1), chosen(0, 2)):  # unrelated choices agree on a quarter of a quarter
        assert 0.05 < (found & other).mean() < 0.075


def test_a_stricter_filter_keeps_the_choice_of_the_cap():
    """Of what two filters both keep, the cap prefers the same: it goes by address and not by reward."""
    rng = np.random.default_rng(0)
    rewards, starts = rng.random(50), np.zeros(1, np.int64)
    priorities = selections.cap_priorities(5, np.ones(50, np.int64), np.full(50, 3), rng.permutation(50))
    loose = selections.capped(rewards > 0.2, priorities, starts, 10)
    strict = selections.capped(rewards > 0.6, priorities, starts, 10)
    assert set(np.flatnonzero(loose & (rewards > 0.6))) <= set(np.flatnonzero(strict))


# Schedules.


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: selections.PercentileSchedule((0.9, 0.5)), r"percentile list falls: 0\.9 then 0\.5"),
        (lambda: selections.PercentileSchedule((0.9, 1.0)), r"percentile 1\.0 is not in \[0, 1\)"),
        (
            lambda: selections.PercentileSchedule((75, 90)),
            r"75\.0 is not in \[0, 1\).*Write 0\.9 for the 90th",
        ),
        (lambda: selections.PercentileSchedule(()), "empty"),
        (lambda: selections.MeanMaxSchedule((0.5, 0.5)), r"does not rise: 0\.5 then 0\.5 \[MeanMaxSchedule"),
        (lambda: selections.MeanMaxSchedule((1,)), r"gamma 1\.0 is not in \[0, 1\)"),
        (lambda: selections.MeanMaxSchedule((math.nan,)), "gamma nan is not in"),
        (lambda: selections.MeanMaxSchedule(0.5), "not a list of numbers"),
        (lambda: selections.TopKSchedule((1, 4)), r"count list rises: 1 then 4 \[TopKSchedule\.counts\]"),
        (lambda: selections.TopKSchedule((4, 4)), "does not fall: 4 then 4"),
        (lambda: selections.TopKSchedule((2, 0)), "count 0 keeps nothing"),
        (lambda: selections.TopKSchedule(()), "empty"),
        (lambda: selections.TopKSchedule((1.5,)), "not a list of whole numbers"),
        (lambda: selections.TopKSchedule(4), "not a list of whole numbers"),
        (lambda: selections.TopKSchedule((True,)), "not a list of whole numbers"),
    ],
)
def test_wrong_schedules_are_named(make, message):
    with pytest.raises(errors.ConfigError, match=message):
        make()


def test_schedules_have_a_rule_a_step_and_say_what_it_is():
    for schedule, kind, values in (
        (selections.PercentileSchedule([0, 0.75]), "percentile", [0.0, 0.75]),
        (selections.MeanMaxSchedule((0.25, 0.5, 0.75)), "mean_max", [0.25, 0.5, 0.75]),
        (selections.TopKSchedule([8, 4, 1]), "top_k", [8, 4, 1]),
    ):
        made = schedule.rules(())
        assert len(made) == len(schedule) == len(values)
        assert [rule.value for rule in made] == values
        assert {rule.kind for rule in made} == {kind}
        assert {rule.threshold for rule in made} == {None}
        hash(schedule)


def test_nothing_kept_says_which_filter_and_the_quantiles():
    (rule,) = selections.PercentileSchedule((0.9,)).rules(())
    line = str(filters.nothing_kept(np.array([0.5, 0.25]), rule))
    assert "percentile 0.9 of each source keeps 0 of 2 (max reward 0.5; quantiles 0.5: 0.25" in line
    assert "Lower PercentileSchedule.percentiles" in line


def test_rows_by_source():
    ids = np.array([7, 7, 9, 12, 12, 12])
    starts = rules.source_starts(ids)
    assert starts.tolist() == [0, 2, 3]
    assert rules.rows_by_source(starts, 6).tolist() == [0, 0, 1, 2, 2, 2]
    assert rules.ranks_in_source(starts, np.array([5, 4, 1, 3, 1, 3])).tolist() == [1, 0, 0, 1, 0, 2]
    assert rules.source_starts(np.zeros(0, np.int64)).tolist() == []
