from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import errors
from rest_jax.objectives.actor_critic import OACConfig, advantage_weighted
from tests.objectives.episodes import (
    Layout,
    assert_trees_close,
    central_differences,
    descend,
    drawn,
    lengths,
    softmax,
)

PLAIN = OACConfig()
FULL = OACConfig(normalise_advantages=True, importance_clip=1.2)


def case(seed: int = 0, vocabulary: int = 5):
    rng = np.random.default_rng(seed)
    sizes = lengths(rng, 5, 4)
    ragged = [
        drawn(rng, sizes, (vocabulary,)),
        [rng.integers(0, vocabulary, size).astype(np.int32) for size in sizes],
        drawn(rng, sizes),
        [-np.abs(array) for array in drawn(rng, sizes, scale=2.0)],
    ]
    return Layout(sizes), Layout(sizes, [[0, 1], [2], [3, 4]]), ragged


def loss_of(layout: Layout, ragged, config):
    logits, targets, advantages, mu = (layout.lay(array) for array in ragged)
    return advantage_weighted(logits, targets, layout.weights, advantages, config, mu, layout.segments)


def oracle(ragged, config: OACConfig) -> float:
    log_probs = [
        np.log(softmax(logits))[np.arange(len(targets)), targets]
        for logits, targets in zip(ragged[0], ragged[1], strict=True)
    ]
    log_probs, advantages, mu = map(np.concatenate, (log_probs, ragged[2], ragged[3]))
    factors = advantages.astype(np.float64)
    if config.normalise_advantages:
        factors = factors / factors.std()
    if config.importance_clip is not None:
        factors = factors * np.minimum(config.importance_clip, np.exp(log_probs - mu))
    return float(-(factors * log_probs).sum())


@pytest.mark.parametrize("config", [PLAIN, FULL, OACConfig(importance_clip=0.5)])
def test_packed_or_not_it_is_the_sum_over_tokens(config):
    apart, packed, ragged = case()
    alone, together = loss_of(apart, ragged, config), loss_of(packed, ragged, config)
    np.testing.assert_allclose(alone.loss, oracle(ragged, config), rtol=1e-5)
    assert_trees_close(together, alone, rtol=1e-5)
    by_pair = loss_of(packed, ragged, OACConfig(normalise="sequence"))
    assert float(by_pair.weight) == 5


@pytest.mark.parametrize("config", [PLAIN, FULL])
def test_gradient_holds_the_factors(config):
    _, packed, ragged = case(1)
    with jax.enable_x64(True):
        logits, targets, advantages, mu = (np.nan_to_num(packed.lay(array)) for array in ragged)
        logits = logits.astype(np.float64)
        log_probs = np.take_along_axis(np.log(softmax(logits)), targets[..., None], -1)[..., 0]
        factors = advantages.astype(np.float64)
        if config is FULL:
            factors = factors / factors[packed.weights > 0].std()
            factors = factors * np.minimum(1.2, np.exp(log_probs - mu))

        def value(logits):
            return advantage_weighted(logits, targets, packed.weights, advantages, config, mu).loss

        def held(logits):
            found = advantage_weighted(logits, targets, packed.weights, factors, PLAIN)
            return found.loss

        gradient = jax.grad(value)(jnp.asarray(logits))
        expected = central_differences(jax.jit(held), logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def bandit(rng: np.random.Generator, vocabulary: int = 5):
    """All answers of one token, how often the behaviour gives each, and their rewards."""
    behaviour = rng.dirichlet(np.ones(vocabulary)).astype(np.float32)
    rewards = rng.uniform(size=vocabulary).astype(np.float32)
    targets = np.arange(vocabulary, dtype=np.int32)[:, None]
    advantages = (rewards - behaviour @ rewards)[:, None]
    return behaviour, rewards, targets, advantages


def test_at_the_behaviour_policy_it_is_the_policy_gradient():
    behaviour, rewards, targets, advantages = bandit(np.random.default_rng(2))

    def loss(logits):
        logits = jnp.broadcast_to(logits, (5, 1, 5))
        return advantage_weighted(logits, targets, behaviour[:, None], advantages).loss

    at = jnp.log(behaviour)
    expected = jax.grad(lambda logits: -jax.nn.softmax(logits) @ rewards)(at)
    np.testing.assert_allclose(jax.grad(loss)(at), expected, atol=1e-6)


def test_with_whole_importance_weights_it_is_the_policy_gradient_anywhere():
    rng = np.random.default_rng(3)
    behaviour, rewards, targets, advantages = bandit(rng)
    config = OACConfig(importance_clip=1e6)

    def loss(logits):
        logits = jnp.broadcast_to(logits, (5, 1, 5))
        mu = jnp.log(behaviour)[:, None]
        return advantage_weighted(logits, targets, behaviour[:, None], advantages, config, mu).loss

    at = jnp.asarray(rng.normal(size=5).astype(np.float32))
    expected = jax.grad(lambda logits: -jax.nn.softmax(logits) @ rewards)(at)
    np.testing.assert_allclose(jax.grad(loss)(at), expected, atol=1e-6)
    # and following it finds the best answer
    best = softmax(descend(jax.grad(loss), jnp.log(behaviour), 2.0, 3000))
    assert best.argmax() == rewards.argmax() and best.max() > 0.95


def test_with_advantages_above_zero_it_is_weighted_imitation():
    """The optimum of −sum n A log π is π ∝ n A where no A is negative."""
    behaviour, rewards, targets, _ = bandit(np.random.default_rng(4))

    def loss(logits):
        logits = jnp.broadcast_to(logits, (5, 1, 5))
        return advantage_weighted(logits, targets, behaviour[:, None], rewards[:, None]).loss

    found = softmax(descend(jax.grad(loss), jnp.zeros(5), 0.5, 3000))
    np.testing.assert_allclose(found, behaviour * rewards / (behaviour @ rewards), atol=1e-3)


def test_a_state_without_advantage_moves_nothing():
    zero, token, one = jnp.zeros((1, 1)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))

    def loss(logits):
        return advantage_weighted(logits, token, one, zero, FULL, zero).loss

    gradient = jax.grad(loss)(jnp.ones((1, 1, 3)))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("config", [PLAIN, FULL])
def test_nothing_leaks_from_behind_weight_zero(config):
    _, packed, ragged = case(5)
    logits, targets, advantages, mu = (packed.lay(array) for array in ragged)
    assert all(np.isnan(array).any() for array in (logits, advantages, mu))

    def value(logits, advantages, mu):
        return advantage_weighted(logits, targets, packed.weights, advantages, config, mu).loss

    loss, gradients = jax.value_and_grad(value, (0, 1, 2))(logits, advantages, mu)
    assert float(loss) == float(value(*map(np.nan_to_num, (logits, advantages, mu))))
    assert all(np.isfinite(np.asarray(gradient)).all() for gradient in gradients)
    assert not np.asarray(gradients[0])[packed.weights == 0].any()
    assert not np.asarray(gradients[1]).any() and not np.asarray(gradients[2]).any()
    empty = advantage_weighted(logits, targets, packed.weights * 0, advantages, config, mu)
    assert all(float(leaf) == 0 for leaf in jax.tree.leaves(empty))


def test_micro_batches_add_up():
    apart, _, ragged = case(6)
    config = OACConfig(importance_clip=2.0)
    arrays = [apart.lay(array) for array in ragged]
    parts = [
        advantage_weighted(arrays[0][p], arrays[1][p], apart.weights[p], arrays[2][p], config, arrays[3][p])
        for p in (slice(0, 2), slice(2, 5))
    ]
    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    assert_trees_close(added, loss_of(apart, ragged, config), rtol=1e-5)


def test_importance_weights_need_the_behaviour_policy():
    with pytest.raises(ValueError, match="behaviour_log_probs"):
        advantage_weighted(
            jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), jnp.ones((1, 1)), FULL
        )


@pytest.mark.parametrize("wrong", [{"discount": -0.1}, {"importance_clip": 0.0}, {"normalise": "row"}])
def test_wrong_settings_are_named(wrong):
    (field,) = wrong
    with pytest.raises(errors.ConfigError, match=rf"OACConfig\.{field}"):
        OACConfig(**wrong)
    assert PLAIN.name == "OAC"
