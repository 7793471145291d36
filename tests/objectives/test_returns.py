from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.objectives import returns
from tests.objectives.episodes import Layout, drawn, lengths

# Hand-worked pairs of 3 and 2 tokens, packed into one row with a padding position.
WEIGHTS = jnp.array([[1.0, 1, 1, 1, 1, 0]])
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0]])
NAN = float("nan")
gae = jax.jit(returns.generalised_advantages)
v_trace = jax.jit(returns.v_trace)


def oracle_gae(rewards, values, discount, trace):
    """Eq. 16 of Schulman et al. as the double sum it is."""
    following = np.append(values[1:], 0.0)
    errors = rewards + discount * following - values
    return np.array(
        [
            sum((discount * trace) ** later * error for later, error in enumerate(errors[t:]))
            for t in range(len(errors))
        ]
    )


def oracle_v_trace(log_ratios, values, rewards, discount, rho_bar, c_bar):
    """Eq. 1 of Espeholt et al. as the sum of products it is."""
    ratios = np.exp(log_ratios)
    rhos, cs = np.minimum(rho_bar, ratios), np.minimum(c_bar, ratios)
    errors = rhos * (rewards + discount * np.append(values[1:], 0.0) - values)
    count = len(values)
    targets = np.array(
        [
            values[t] + sum(discount ** (u - t) * np.prod(cs[t:u]) * errors[u] for u in range(t, count))
            for t in range(count)
        ]
    )
    return targets, rhos * (rewards + discount * np.append(targets[1:], 0.0) - values)


def test_a_pair_goes_on_until_its_end():
    found = returns.continues(WEIGHTS, SEGMENTS)
    np.testing.assert_array_equal(found, [[True, True, False, True, False, False]])
    one_pair = returns.continues(WEIGHTS)
    np.testing.assert_array_equal(one_pair, [[True, True, True, True, False, False]])


def test_returns_worked_by_hand():
    rewards = jnp.array([[8.0, 8, 8, 4, 4, NAN]])
    found = returns.discounted_returns(rewards, WEIGHTS, SEGMENTS, 0.5)
    np.testing.assert_allclose(found, [[2, 4, 8, 2, 4, 0]])
    np.testing.assert_allclose(
        returns.discounted_returns(rewards, WEIGHTS, SEGMENTS, 0), [[0, 0, 8, 0, 4, 0]]
    )
    np.testing.assert_allclose(returns.discounted_returns(rewards, WEIGHTS, SEGMENTS), [[8, 8, 8, 4, 4, 0]])


def test_a_terminal_reward_stands_at_the_end_and_pays_what_the_return_says():
    rewards = jnp.array([[8.0, 8, 8, 4, 4, NAN]])
    terminal = returns.terminal_rewards(rewards, WEIGHTS, SEGMENTS)
    np.testing.assert_array_equal(terminal, [[0, 0, 8, 0, 4, 0]])
    # with λ = 1 and no values, GAE is the return
    found = gae(terminal, jnp.zeros((1, 6)), WEIGHTS, SEGMENTS, 0.5, 1.0)
    np.testing.assert_allclose(found, returns.discounted_returns(rewards, WEIGHTS, SEGMENTS, 0.5))


def test_advantages_worked_by_hand():
    # one pair: r = 0, 1; V = 1, 3; γ = λ = 1/2. δ = (0 + 3/2 − 1, 1 − 3) = (1/2, −2), A = (1/2 − 2/4, −2)
    found = gae(jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 3.0]]), jnp.ones((1, 2)), None, 0.5, 0.5)
    np.testing.assert_allclose(found, [[0.0, -2.0]])


def test_v_trace_worked_by_hand():
    # π/μ = 2, 1/2; bars 1; V = 1, 3; r = 0, 1; γ = 1. errors: 1 (0 + 3 − 1) = 2; 1/2 (1 − 3) = −1
    # v = (1 + 2 + 1 · −1, 3 − 1) = (2, 2); A = (1 (0 + 2 − 1), 1/2 (1 − 3)) = (1, −1)
    found = v_trace(
        jnp.log(jnp.array([[2.0, 0.5]])), jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]]), jnp.ones((1, 2))
    )
    np.testing.assert_allclose(found.targets_BxT, [[2.0, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(found.advantages_BxT, [[1.0, -1.0]], rtol=1e-6)


def test_on_policy_v_trace_is_the_return():
    rewards = jnp.array([[0.0, 0, 8, 0, 4, NAN]])
    values = jnp.array([[3.0, -1, 2, 5, 7, NAN]])
    found = v_trace(jnp.zeros((1, 6)), values, rewards, WEIGHTS, SEGMENTS, 0.5)
    np.testing.assert_allclose(found.targets_BxT, [[2, 4, 8, 2, 4, 0]], rtol=1e-6)


def test_v_trace_takes_ratios_that_overflow_and_has_no_gradient():
    values, rewards, weights = jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.ones((1, 3))

    def total(log_ratios, values):
        found = v_trace(log_ratios, values, rewards, weights)
        return jnp.sum(found.targets_BxT + found.advantages_BxT)

    huge = jnp.array([[200.0, -200.0, 1000.0]])
    value, gradients = jax.value_and_grad(total, (0, 1))(huge, values)
    assert np.isfinite(value)
    assert not any(np.asarray(gradient).any() for gradient in gradients)
    unclipped = v_trace(huge[:, 1:2], values[:, :1], rewards[:, :1], weights[:, :1], rho_bar=np.inf)
    np.testing.assert_allclose(unclipped.targets_BxT, 1.0)


def test_sums_of_steps_worked_by_hand():
    q = jnp.array([[1.0, 2, 3, 10, 20, NAN]])
    found = returns.unrolled_sums(q, WEIGHTS, SEGMENTS, steps=2, past_end=1.0)
    np.testing.assert_allclose(found, [[1 + 2 + 3, 2 + 3 + 1, 3 + 1 + 1, 10 + 20 + 1, 20 + 1 + 1, 0]])
    found = returns.unrolled_sums(q, WEIGHTS, SEGMENTS, steps=2, discount=0.5, past_end=-8.0)
    np.testing.assert_allclose(found, [[2.75, 1.5, -3, 18, 14, 0]])
    np.testing.assert_allclose(returns.unrolled_sums(q, WEIGHTS, SEGMENTS, steps=0), [[1, 2, 3, 10, 20, 0]])


def test_more_steps_than_positions():
    found = returns.unrolled_sums(jnp.array([[5.0, 7.0]]), jnp.ones((1, 2)), None, steps=6, past_end=1.0)
    np.testing.assert_allclose(found, [[5 + 7 + 5, 7 + 6]])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.5, 1.0, 3.0]))
def test_packed_rows_match_the_formulas_pair_by_pair(seed, discount, trace, bar):
    rng = np.random.default_rng(seed)
    sizes = lengths(rng, 5, 6)
    packed = Layout(sizes, [[0, 1], [2], [3, 4]], width=13)
    rewards, values, log_ratios = (drawn(rng, sizes) for _ in range(3))
    laid = [packed.lay(each) for each in (log_ratios, values, rewards)]
    advantages = gae(laid[2], laid[1], packed.weights, packed.segments, discount, trace)
    traced = v_trace(*laid, packed.weights, packed.segments, discount, bar, 1.0)
    for pair, found in enumerate(packed.take(advantages)):
        expected = oracle_gae(rewards[pair], values[pair], discount, trace)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for pair, found in enumerate(zip(*map(packed.take, traced), strict=True)):
        expected = oracle_v_trace(log_ratios[pair], values[pair], rewards[pair], discount, bar, 1.0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for laid_out in (advantages, *traced):
        np.testing.assert_array_equal(np.asarray(laid_out)[packed.weights == 0], 0)


def test_long_rows_match_the_formulas():
    rng = np.random.default_rng(0)
    packed = Layout([256, 200, 56], [[0], [1, 2]])
    rewards, values = drawn(rng, packed.sizes), drawn(rng, packed.sizes)
    found = gae(packed.lay(rewards), packed.lay(values), packed.weights, packed.segments, 0.99, 0.95)
    for pair, advantages in enumerate(packed.take(found)):
        expected = oracle_gae(rewards[pair], values[pair], 0.99, 0.95)
        np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_rlax_agrees(discount):
    rlax = pytest.importorskip("rlax")
    rng = np.random.default_rng(1)
    rewards, log_ratios = rng.normal(size=(2, 9)).astype(np.float32)
    values = rng.normal(size=9).astype(np.float32)
    row = [jnp.asarray(array)[None] for array in (log_ratios, values, rewards, np.ones(9, np.float32))]
    discounts = jnp.full(9, discount).at[-1].set(0)
    closed = jnp.append(values, 0.0)
    expected = rlax.truncated_generalized_advantage_estimation(jnp.asarray(rewards), discounts, 0.8, closed)
    found = gae(row[2], row[1], row[3], None, discount, 0.8)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    traced = rlax.vtrace_td_error_and_advantage(
        jnp.asarray(values), closed[1:], jnp.asarray(rewards), discounts, jnp.exp(log_ratios), 1.0, 1.5, 1.5
    )
    found = v_trace(*row, None, discount, 1.5, 1.0)
    np.testing.assert_allclose(found.targets_BxT[0] - values, traced.errors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.advantages_BxT[0], traced.pg_advantage, rtol=1e-5, atol=1e-6)
