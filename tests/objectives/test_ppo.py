from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rest_jax import errors
from rest_jax.objectives.ppo import (
    PPOConfig,
    normalise_by_source,
    penalised_rewards,
    ppo_policy_loss,
    ppo_value_loss,
)
from rest_jax.objectives.values import explained_variance
from tests.objectives.episodes import Layout, assert_trees_close, central_differences, drawn, lengths, softmax

PLAIN = PPOConfig(normalise_advantages=False)
FULL = PPOConfig(entropy_weight=0.1)
by_source = jax.jit(normalise_by_source)


def case(seed: int = 0, vocabulary: int = 5):
    """Two layouts of five pairs, and logits, targets, log π_old, advantages."""
    rng = np.random.default_rng(seed)
    sizes = lengths(rng, 5, 4)
    logits = drawn(rng, sizes, (vocabulary,))
    targets = [rng.integers(0, vocabulary, size).astype(np.int32) for size in sizes]
    old = [
        (np.log(softmax(each))[np.arange(len(t)), t] + rng.normal(scale=0.3, size=len(t))).astype(np.float32)
        for each, t in zip(logits, targets, strict=True)
    ]
    return Layout(sizes), Layout(sizes, [[0, 1], [2], [3, 4]]), [logits, targets, old, drawn(rng, sizes)]


def loss_of(layout: Layout, ragged, config):
    logits, targets, old, advantages = (layout.lay(array) for array in ragged)
    return ppo_policy_loss(logits, targets, layout.weights, old, advantages, config, layout.segments)


def oracle(ragged, config):
    logits, targets, old, advantages = map(np.concatenate, ragged)
    policy = softmax(logits)
    ratios = policy[np.arange(len(targets)), targets] / np.exp(np.float64(old))
    if config.normalise_advantages:
        advantages = (advantages - advantages.mean()) / advantages.std()
    clipped = np.clip(ratios, 1 - config.clip, 1 + config.clip)
    gains = np.minimum(ratios * advantages, clipped * advantages)
    entropy = -(policy * np.log(policy)).sum(-1)
    return -(gains + config.entropy_weight * entropy).sum(), ratios, entropy


@pytest.mark.parametrize("config", [PLAIN, FULL, PPOConfig(clip=0.05, normalise="sequence")])
def test_packed_or_not_it_is_the_formula(config):
    apart, packed, ragged = case()
    alone = loss_of(apart, ragged, config)
    assert_trees_close(loss_of(packed, ragged, config), alone, rtol=1e-5, atol=1e-6)
    expected, ratios, entropy = oracle(ragged, config)
    np.testing.assert_allclose(alone.loss, expected, rtol=1e-4, atol=1e-5)
    assert float(alone.weight) == (5 if config.normalise == "sequence" else sum(apart.sizes))
    found = {name: float(a / b) for name, (a, b) in alone.metrics.items()}
    assert found["clip_fraction"] == pytest.approx(np.mean(np.abs(ratios - 1) > config.clip))
    assert found["approx_kl"] == pytest.approx(np.mean(ratios - 1 - np.log(ratios)), rel=1e-4)
    assert found["entropy"] == pytest.approx(entropy.mean(), rel=1e-5)


def test_worked_by_hand():
    # π = 3/4 against π_old = 1/2, 15/16: ratios 3/2 and 4/5; ε = 0.1; A = 1, −2 and again A = −1, 2
    logits = jnp.log(jnp.array([[[1.0, 3.0]] * 2]))
    fixed = jnp.array([[1, 1]]), jnp.ones((1, 2)), jnp.log(jnp.array([[1 / 2, 15 / 16]]))
    config = PPOConfig(clip=0.1, normalise_advantages=False)

    def loss(logits, advantages):
        return ppo_policy_loss(logits, *fixed, advantages, config).loss

    # too far already where the advantage pulls: held at 1.1 · 1 and 0.9 · −2, without a gradient
    value, gradient = jax.value_and_grad(loss)(logits, jnp.array([[1.0, -2.0]]))
    np.testing.assert_allclose(value, -(1.1 - 1.8), rtol=1e-5)
    np.testing.assert_array_equal(gradient, 0)
    # too far on the wrong side: 1.5 · −1 and 0.8 · 2, with one
    value, gradient = jax.value_and_grad(loss)(logits, jnp.array([[-1.0, 2.0]]))
    np.testing.assert_allclose(value, -(-1.5 + 1.6), rtol=1e-4)
    # d(−r A)/d logit of the target = −r A (1 − π)
    np.testing.assert_allclose(gradient[0, :, 1], [1.5 / 4, -1.6 / 4], rtol=1e-5)


def test_rlax_agrees():
    rlax = pytest.importorskip("rlax")
    _, _, ragged = case(1)
    logits, targets, old, advantages = map(np.concatenate, ragged)
    ratios = softmax(logits)[np.arange(len(targets)), targets] / np.exp(old)
    expected = rlax.clipped_surrogate_pg_loss(jnp.float32(ratios), jnp.asarray(advantages), 0.2)
    row = [jnp.asarray(array)[None] for array in (logits, targets, np.ones(len(old)), old, advantages)]
    sums = ppo_policy_loss(*row, PLAIN)
    np.testing.assert_allclose(sums.loss / sums.weight, expected, rtol=1e-4)


@pytest.mark.parametrize("config", [PLAIN, FULL])
def test_gradient_against_finite_differences(config):
    _, packed, ragged = case(2)
    with jax.enable_x64(True):
        logits, targets, old, advantages = (np.nan_to_num(packed.lay(array)) for array in ragged)

        def loss(logits):
            return ppo_policy_loss(logits, targets, packed.weights, old, advantages, config).loss

        expected = central_differences(jax.jit(loss), logits)
        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logits, jnp.float64)), expected, atol=1e-6)


def test_the_kl_estimate_is_exact_in_the_mean():
    """Each token as often as π_old samples it: the mean of r − 1 − log r is KL(π_old || π)."""
    old, logits = np.random.default_rng(3).normal(size=(2, 6)).astype(np.float32)
    before, now = softmax(old), softmax(logits)
    sums = ppo_policy_loss(
        jnp.broadcast_to(logits, (6, 1, 6)),
        jnp.arange(6)[:, None],
        jnp.asarray(before, jnp.float32)[:, None],
        jnp.log(before.astype(np.float32))[:, None],
        jnp.zeros((6, 1)),
        PLAIN,
    )
    np.testing.assert_allclose(sums.metrics["approx_kl"][0], (before * np.log(before / now)).sum(), rtol=1e-4)


@pytest.mark.parametrize("kind", ["entropy", "penalty"])
def test_on_policy_steps_find_the_regularised_optimum(kind):
    """One token, all answers weighed by the policy: π ∝ exp(R / c) with the entropy bonus c, and
    π ∝ π_ref exp(R / β) with the penalty β on the rewards."""
    rng = np.random.default_rng(4)
    rewards, reference = rng.uniform(size=5), rng.dirichlet(np.ones(5) * 3)
    rewards, log_reference = jnp.float32(rewards), jnp.log(jnp.float32(reference))
    targets = jnp.arange(5)[:, None]
    bonus = 0.3 if kind == "entropy" else 0.0
    config = PPOConfig(entropy_weight=bonus, normalise_advantages=False)

    def step(_, logits):
        old = jax.nn.log_softmax(logits)
        weights = jnp.exp(old)[:, None]
        beta = 0.3 if kind == "penalty" else 0.0
        paid = penalised_rewards(rewards[:, None], old[:, None], log_reference[:, None], weights, beta)
        advantages = paid - jnp.sum(weights * paid)

        def loss(logits):
            rows = jnp.broadcast_to(logits, (5, 1, 5))
            return ppo_policy_loss(rows, targets, weights, old[:, None], advantages, config).loss

        return logits - 0.5 * jax.grad(loss)(logits)

    found = softmax(jax.jit(lambda x: jax.lax.fori_loop(0, 3000, step, x))(jnp.zeros(5)))
    expected = np.exp(np.asarray(rewards) / 0.3) * (1 if kind == "entropy" else reference)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-4)


def test_normalised_advantages_need_no_scale():
    apart, _, ragged = case(5)
    moved = [*ragged[:3], [7 * array + 3 for array in ragged[3]]]
    config = PPOConfig()
    np.testing.assert_allclose(
        loss_of(apart, ragged, config).loss, loss_of(apart, moved, config).loss, rtol=1e-3
    )


@pytest.mark.parametrize("config", [PLAIN, FULL])
def test_nothing_leaks_from_behind_weight_zero(config):
    _, packed, ragged = case(6)
    logits, targets, old, advantages = (packed.lay(array) for array in ragged)
    assert all(np.isnan(array).any() for array in (logits, old, advantages))

    def value(logits, old, advantages):
        return ppo_policy_loss(logits, targets, packed.weights, old, advantages, config).loss

    loss, gradients = jax.value_and_grad(value, (0, 1, 2))(logits, old, advantages)
    assert float(loss) == float(value(*map(np.nan_to_num, (logits, old, advantages))))
    assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)
    assert not np.asarray(gradients[0])[packed.weights == 0].any()
    assert not np.asarray(gradients[1]).any() and not np.asarray(gradients[2]).any()
    empty = ppo_policy_loss(logits, targets, packed.weights * 0, old, advantages, config)
    assert all(float(leaf) == 0 for leaf in jax.tree.leaves(empty))


def test_micro_batches_add_up():
    apart, _, ragged = case(7)
    arrays = [apart.lay(array) for array in ragged]
    parts = [
        ppo_policy_loss(arrays[0][p], arrays[1][p], apart.weights[p], arrays[2][p], arrays[3][p], PLAIN)
        for p in (slice(0, 2), slice(2, 5))
    ]
    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    assert_trees_close(added, loss_of(apart, ragged, PLAIN), rtol=1e-5, atol=1e-6)


def test_value_loss_worked_by_hand():
    # V_old = 0, clip 1, so V = 3 is clipped to 1. G = 2: both errors are 1.
    # G = 5: 2² < 4², without a gradient. G = 0: 3² > 1².
    values, goals = jnp.array([[3.0, 3.0, 3.0, jnp.nan]]), jnp.array([[2.0, 5.0, 0.0, jnp.nan]])
    old, weights = jnp.array([[0.0, 0, 0, jnp.nan]]), jnp.array([[1.0, 1, 1, 0]])

    def loss(values):
        return ppo_value_loss(values, old, goals, weights, 1.0).loss

    value, gradient = jax.value_and_grad(loss)(values)
    np.testing.assert_allclose(value, 0.5 * (1 + 16 + 9))
    np.testing.assert_allclose(gradient[0, 1:], [0, 3, 0])
    sums = ppo_value_loss(values, old, goals, weights, 1.0)
    assert [float(each) for each in sums.metrics["value_clip_fraction"]] == [3, 3]
    plain = ppo_value_loss(values, old, goals, weights, None)
    np.testing.assert_allclose(plain.loss, 0.5 * (1 + 4 + 9))
    averages = {name: float(a / b) for name, (a, b) in plain.metrics.items()}
    assert explained_variance(averages) == pytest.approx(1 - (14 / 3) / np.var([2, 5, 0]), rel=1e-5)


def test_value_gradient_against_finite_differences():
    rng = np.random.default_rng(8)
    values, old, goals = rng.normal(size=(3, 2, 5))
    weights = rng.uniform(size=(2, 5))
    with jax.enable_x64(True):

        def loss(values):
            return ppo_value_loss(values, old, goals, weights, 0.4).loss

        gradient = jax.grad(loss)(jnp.asarray(values))
        np.testing.assert_allclose(gradient, central_differences(jax.jit(loss), values), atol=1e-6)


def test_penalised_rewards_worked_by_hand():
    weights, segments = jnp.array([[1.0, 1, 1, 0]]), jnp.array([[1, 1, 2, 0]])
    old, reference = jnp.array([[-1.0, -2, -3, jnp.nan]]), jnp.array([[-2.0, -1, -3.5, -1]])
    rewards = jnp.array([[8.0, 8, 4, jnp.nan]])
    found = penalised_rewards(rewards, old, reference, weights, 0.5, segments)
    np.testing.assert_allclose(found, [[-0.5, 8 + 0.5, 4 - 0.25, 0]])


NUMBERS = st.one_of(st.floats(-5, 5, width=32), st.just(float("nan")))


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float32, (3, 4), elements=NUMBERS))
def test_rewards_by_source(rewards):
    found = np.asarray(by_source(rewards))
    for row, normal in zip(np.float64(rewards), found, strict=True):
        there = np.isfinite(row)
        np.testing.assert_array_equal(np.isnan(normal), ~there)
        if there.any():
            seen = row[there]
            expected = (seen - seen.mean()) / (seen.std() + 1e-6)
            # near-equal rewards are ill-conditioned; those that are equal are exact
            if seen.std() > 1e-3 or seen.std() == 0:
                np.testing.assert_allclose(normal[there], expected, atol=2e-3)


def test_one_candidate_or_equal_ones_are_neither_good_nor_bad():
    np.testing.assert_array_equal(normalise_by_source(np.array([[0.3], [5.0]])), [[0], [0]])
    same = np.full((1, 7), 0.1, np.float32)
    same[0, 3] = np.nan
    np.testing.assert_array_equal(normalise_by_source(same), [[0, 0, 0, np.nan, 0, 0, 0]])
    np.testing.assert_allclose(normalise_by_source(np.array([[1.0, 3.0]])), [[-1, 1]], rtol=1e-5)
    assert np.isnan(normalise_by_source(np.full((1, 2), np.nan))).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": 0.0},
        {"value_clip": -1.0},
        {"kl_weight": math.inf},
        {"entropy_weight": -0.1},
        {"discount": 1.5},
        {"trace": -0.5},
        {"normalise": "row"},
    ],
)
def test_wrong_settings_are_named(wrong):
    (field,) = wrong
    with pytest.raises(errors.ConfigError, match=rf"PPOConfig\.{field}"):
        PPOConfig(**wrong)
    assert PLAIN.name == "PPO"
