"""The best-of-n estimator against all subsets, against sampling, and its properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.metrics.best_of_n import best_of_first, expected_value, rank_weights, selection_weights

NAN = float("nan")


def over_all_subsets(rewards, values, n, eligible=None) -> float:
    """The mean value of the best of each n-subset, ties at random; subsets without a value are left out."""
    may = [not math.isnan(r) and (eligible is None or eligible[k]) for k, r in enumerate(rewards)]
    total = mass = 0.0
    for subset in itertools.combinations(range(len(rewards)), n):
        usable = [k for k in subset if may[k]]
        best = [k for k in usable if rewards[k] == max(rewards[j] for j in usable)] if usable else subset
        for k in best:
            if not math.isnan(values[k]):
                total, mass = total + values[k] / len(best), mass + 1 / len(best)
    return total / mass if mass else NAN


def estimated(rewards, values, n, eligible=None) -> float:
    eligible = None if eligible is None else np.array(eligible)
    weights = selection_weights(np.array(rewards, float), [n], eligible)
    return float(expected_value(weights, np.array(values, float))[0])


CASES = {
    "distinct": ([0.3, 0.9, 0.1, 0.5, 0.7], [1, 2, 3, 4, 5], None),
    "ties": ([0.5, 0.9, 0.5, 0.9, 0.5, 0.1], [1, 2, 3, 4, 5, 6], None),
    "all equal": ([0.5] * 5, [1, 2, 3, 4, 5], None),
    "missing rewards": ([NAN, 0.4, NAN, 0.8, 0.2, NAN], [1, 2, 3, 4, 5, 6], None),
    "missing values": ([0.1, 0.4, 0.6, 0.8, 0.2], [1, NAN, 3, NAN, 5], None),
    "none at all": ([NAN] * 4, [1, 2, 3, 4], None),
    "truncated": ([0.1, 0.9, 0.6, 0.8, 0.2], [1, 2, 3, 4, 5], [True, False, True, False, True]),
    "one sample": ([0.25], [3], None),
    "one missing": ([NAN], [3], None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_mean_over_all_subsets(case):
    rewards, values, eligible = CASES[case]
    for n in range(1, len(rewards) + 1):
        for reported in (values, rewards):
            found, true = (
                estimated(rewards, reported, n, eligible),
                over_all_subsets(rewards, reported, n, eligible),
            )
            assert found == pytest.approx(true, abs=1e-12, nan_ok=True)


def test_by_hand():
    # Best of 2 of {1, 2, 4}: the subsets give 2, 4, 4.
    assert estimated([1, 4, 2], [1, 4, 2], 2) == pytest.approx(10 / 3)
    # Equal rewards share: the subsets {a, b}, {a, c}, {b, c} choose a or b, a, b; so a and b have 1/2 each.
    assert selection_weights(np.array([1.0, 1.0, 0.0]), [2])[0] == pytest.approx([0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    "total,n", [(5, 2), (200, 1), (200, 10), (200, 100), (200, 199), (200, 200), (1000, 500)]
)
def test_weights_are_the_binomials_exactly(total, n):
    exact = [math.comb(total - 1 - k, n - 1) / math.comb(total, n) for k in range(total)]
    np.testing.assert_allclose(rank_weights(total, n), exact, rtol=1e-11, atol=0)
    assert rank_weights(total, n).sum() == pytest.approx(1, abs=1e-12)


def test_against_sampling_subsets():
    draw = np.random.Generator(np.random.Philox(key=3))
    rewards, values = np.round(draw.random(40), 1), draw.random(40)  # one digit: many ties
    weights = selection_weights(rewards, [7])
    chosen = []
    for _ in range(20_000):
        subset = draw.permutation(40)[:7]  # in random order, so the first maximum is a tie broken at random
        chosen.append(values[subset[rewards[subset].argmax()]])
    error = np.std(chosen) / math.sqrt(len(chosen))
    assert abs(expected_value(weights, values)[0] - np.mean(chosen)) < 4 * error


some_rewards = st.lists(
    st.one_of(st.integers(0, 6).map(lambda k: k / 6), st.just(NAN)), min_size=1, max_size=60
)


@settings(max_examples=60, deadline=None)
@given(some_rewards)
def test_properties_of_the_selecting_reward(given_rewards):
    rewards = np.array(given_rewards)
    numbers = list(range(1, len(rewards) + 1))
    weights = selection_weights(rewards, numbers)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-12)
    found = expected_value(weights, rewards)
    present = rewards[~np.isnan(rewards)]
    if not len(present):
        assert np.isnan(found).all()
        np.testing.assert_allclose(weights, 1 / len(rewards))  # nothing to go by: any sample
        return
    assert found[0] == pytest.approx(present.mean())
    assert found[-1] == pytest.approx(present.max())
    assert (np.diff(found) >= -1e-12).all()
    assert not weights[-1][np.isnan(rewards)].any()  # never chosen where there is another


@settings(max_examples=40, deadline=None)
@given(some_rewards, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_says_nothing(given_rewards, random):
    order = list(range(len(given_rewards)))
    random.shuffle(order)
    rewards = np.array(given_rewards)
    numbers = [1, len(order) // 2 + 1, len(order)]
    np.testing.assert_allclose(
        selection_weights(rewards[order], numbers), selection_weights(rewards, numbers)[:, order], atol=1e-12
    )


def test_the_best_of_the_first():
    rewards = np.array([NAN, 0.5, 0.7, 0.7, 0.9])
    assert [best_of_first(rewards, n) for n in range(1, 6)] == [0, 1, 2, 2, 4]
    eligible = np.array([True, True, False, True, False])
    assert [best_of_first(rewards, n, eligible) for n in range(1, 6)] == [0, 1, 1, 3, 3]
    assert best_of_first(np.array([NAN, NAN]), 2) == 0


def test_the_first_of_random_orders_has_the_estimators_mean():
    draw = np.random.Generator(np.random.Philox(key=5))
    rewards = draw.random(12)
    first = [
        rewards[order][best_of_first(rewards[order], 4)]
        for order in (draw.permutation(12) for _ in range(4000))
    ]
    error = np.std(first) / math.sqrt(len(first))
    assert abs(np.mean(first) - estimated(rewards, rewards, 4)) < 4 * error


@pytest.mark.parametrize("n", [0, 4])
def test_an_n_that_cannot_be_had_is_refused(n):
    for call in (
        lambda: rank_weights(3, n),
        lambda: selection_weights(np.zeros(3), [n]),
        lambda: best_of_first(np.zeros(3), n),
    ):
        with pytest.raises(errors.ConfigError, match=str(n)):
            call()


def test_bad_rewards_are_refused():
    with pytest.raises(errors.DataError, match="infinite"):
        selection_weights(np.array([1.0, np.inf]), [1])
    with pytest.raises(errors.DataError, match="without samples"):
        selection_weights(np.zeros(0), [1])
