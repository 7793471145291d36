from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rest_jax import errors
from rest_jax.objectives import returns
from rest_jax.objectives.values import BVEConfig, ValueConfig, bve_q_loss, explained_variance, value_loss
from tests.objectives.episodes import Layout, assert_trees_close, central_differences, descend, drawn, lengths

KINDS = [("mse", 1.0), ("huber", 0.5)]


def every_pair(vocabulary: int = 3) -> np.ndarray:
    """All sequences of two tokens as rows [V², 2]."""
    return (
        np.stack(np.meshgrid(*[np.arange(vocabulary)] * 2, indexing="ij"), -1).reshape(-1, 2).astype(np.int32)
    )


def test_value_losses_worked_by_hand():
    # errors 1/2, -2; weights 1, 3
    arrays = jnp.array([[1.5, 0.0]]), jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 3.0]])
    sums = value_loss(*arrays)
    np.testing.assert_allclose([sums.loss, sums.weight], [0.25 + 12, 4])
    found = {name: float(total) for name, (total, _) in sums.metrics.items()}
    assert found == {"mse": 12.25, "mae": 6.5, "bias": -5.5, "return": 7.0, "return_square": 13.0}
    # huber, δ = 1: 1/8 and 2 − 1/2
    np.testing.assert_allclose(value_loss(*arrays, "huber").loss, 0.125 + 3 * 1.5)


def test_huber_is_optax_huber():
    rng = np.random.default_rng(0)
    values, goals = rng.normal(scale=3, size=(2, 3, 7)).astype(np.float32)
    found = value_loss(values, goals, np.ones((3, 7), np.float32), "huber", 0.7).loss
    np.testing.assert_allclose(found, optax.losses.huber_loss(values, goals, delta=0.7).sum(), rtol=1e-6)


@pytest.mark.parametrize(("kind", "delta"), KINDS)
def test_value_gradient(kind, delta):
    rng = np.random.default_rng(1)
    values, goals = rng.normal(scale=2, size=(2, 2, 4))
    weights = rng.uniform(size=(2, 4))
    with jax.enable_x64(True):

        def loss(values):
            return value_loss(values, goals, weights, kind, delta).loss

        gradient = jax.grad(loss)(jnp.asarray(values))
        np.testing.assert_allclose(gradient, central_differences(jax.jit(loss), values), atol=1e-6)


def test_values_become_the_mean_return_of_their_state():
    """A table of V for the empty prefix and each first token; the data is all pairs, each so often."""
    rng = np.random.default_rng(2)
    tokens, counts, rewards = every_pair(), rng.uniform(0.1, 1, 9), rng.uniform(size=9)
    weights = np.repeat(counts[:, None], 2, 1).astype(np.float32)
    goals = returns.discounted_returns(np.repeat(rewards[:, None], 2, 1), weights, None, 0.9)

    def mean(table):
        values = jnp.stack([jnp.broadcast_to(table["empty"], 9), table["first"][tokens[:, 0]]], 1)
        sums = value_loss(values, goals, weights)
        return sums.loss / sums.weight

    found = descend(jax.grad(mean), {"empty": jnp.float32(0), "first": jnp.zeros(3)}, 0.5, 2000)
    np.testing.assert_allclose(found["empty"], 0.9 * np.average(rewards, weights=counts), rtol=1e-4)
    by_token = [
        np.average(r, weights=c) for r, c in zip(rewards.reshape(3, 3), counts.reshape(3, 3), strict=True)
    ]
    np.testing.assert_allclose(found["first"], by_token, rtol=1e-4)


def test_explained_variance():
    rng = np.random.default_rng(3)
    goals, noise = rng.normal(size=(2, 4, 50)).astype(np.float32)

    def found(values, goals=goals):
        sums = value_loss(values, goals, np.ones_like(goals))
        return explained_variance({name: float(a / b) for name, (a, b) in sums.metrics.items()})

    assert found(goals) == 1.0
    assert found(np.full_like(goals, goals.mean())) == pytest.approx(0, abs=1e-5)
    expected = 1 - np.mean(noise**2) / np.var(goals)
    assert found(goals + noise) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(found(goals, np.zeros_like(goals)))


def test_no_value_leaks_from_behind_weight_zero():
    values, goals = jnp.array([[1.0, jnp.nan]]), jnp.array([[0.0, jnp.nan]])
    weights = jnp.array([[1.0, 0.0]])
    for kind, delta in KINDS:
        gradients = jax.grad(lambda v, g, k=kind, d=delta: value_loss(v, g, weights, k, d).loss, (0, 1))(
            values, goals
        )
        assert np.isfinite(gradients[0]).all() and gradients[0][0, 1] == 0
        np.testing.assert_array_equal(gradients[1], 0)
        assert np.isfinite(jax.tree.leaves(value_loss(values, goals, weights, kind, delta))).all()


def q_case(seed: int = 4):
    rng = np.random.default_rng(seed)
    sizes = lengths(rng, 5, 4)
    ragged = [
        drawn(rng, sizes, (4,)),
        [rng.integers(0, 4, size).astype(np.int32) for size in sizes],
        drawn(rng, sizes, (4,)),
        [np.full(size, rng.uniform(), np.float32) for size in sizes],
    ]
    return Layout(sizes), Layout(sizes, [[0, 1], [2], [3, 4]]), ragged


def q_loss(layout: Layout, ragged, config):
    q, targets, target_q, rewards = (layout.lay(array) for array in ragged)
    return bve_q_loss(q, targets, layout.weights, target_q, rewards, config, layout.segments)


@pytest.mark.parametrize("config", [BVEConfig(), BVEConfig(0.8, "huber", 0.5)])
def test_q_targets_pair_by_pair(config):
    apart, packed, ragged = q_case()
    expected = 0.0
    for q, targets, target_q, rewards in zip(*ragged, strict=True):
        for t, token in enumerate(targets):
            last = t + 1 == len(targets)
            goal = rewards[t] if last else config.discount * target_q[t + 1, targets[t + 1]]
            error = q[t, token] - goal
            huber = optax.losses.huber_loss(error, delta=config.delta)
            expected += float(error**2 if config.kind == "mse" else huber)
    found = q_loss(packed, ragged, config)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    assert_trees_close(q_loss(apart, ragged, config), found, rtol=1e-5)
    gaps = [(q.max(-1) - q[np.arange(len(t)), t]).sum() for q, t in zip(*ragged[:2], strict=True)]
    np.testing.assert_allclose(found.metrics["q_gap"][0], sum(gaps), rtol=1e-5)


def test_q_learning_finds_the_behaviour_policys_q():
    """Q of the second token is its mean reward; of the first, γ times the mean over the data's next token."""
    rng = np.random.default_rng(5)
    data, counts, rewards = every_pair(), rng.uniform(0.1, 1, 9), rng.uniform(size=9)
    weights = np.repeat(counts[:, None], 2, 1).astype(np.float32)
    paid = np.repeat(rewards[:, None], 2, 1).astype(np.float32)
    config = BVEConfig(discount=0.9)

    def q_of(table):
        return jnp.stack([jnp.broadcast_to(table["first"], (9, 3)), table["second"][data[:, 0]]], 1)

    def gradient(table):
        def mean(now):
            sums = bve_q_loss(q_of(now), data, weights, q_of(table), paid, config)
            return sums.loss / sums.weight

        return jax.grad(mean)(table)  # the target network is a copy of this step's

    found = descend(gradient, {"first": jnp.zeros(3), "second": jnp.zeros((3, 3))}, 1.0, 4000)
    np.testing.assert_allclose(found["second"], rewards.reshape(3, 3), atol=1e-4)
    means = [
        np.average(r, weights=c) for r, c in zip(rewards.reshape(3, 3), counts.reshape(3, 3), strict=True)
    ]
    np.testing.assert_allclose(found["first"], 0.9 * np.array(means), atol=1e-4)


def test_q_gradient_and_what_is_behind_weight_zero():
    _, packed, ragged = q_case(6)
    q, targets, target_q, rewards = (packed.lay(array) for array in ragged)

    def loss(q, target_q, rewards):
        return bve_q_loss(q, targets, packed.weights, target_q, rewards, BVEConfig(), packed.segments).loss

    assert np.isnan(q).any() and np.isnan(target_q).any() and np.isnan(rewards).any()
    gradients = jax.grad(loss, (0, 1, 2))(q, target_q, rewards)
    assert all(np.isfinite(np.asarray(each)).all() for each in gradients)
    assert not np.asarray(gradients[1]).any() and not np.asarray(gradients[2]).any()
    with jax.enable_x64(True):
        clean = np.nan_to_num(q).astype(np.float64)
        expected = central_differences(jax.jit(lambda q: loss(q, target_q, rewards)), clean)
    np.testing.assert_allclose(gradients[0], expected, atol=1e-5)


def test_micro_batches_add_up():
    apart, _, ragged = q_case(7)
    q, targets, target_q, rewards = (apart.lay(array) for array in ragged)
    parts = [
        bve_q_loss(q[p], targets[p], apart.weights[p], target_q[p], rewards[p])
        for p in (slice(0, 2), slice(2, 5))
    ]
    added = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    assert_trees_close(added, q_loss(apart, ragged, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [ValueConfig, BVEConfig])
@pytest.mark.parametrize("wrong", [{"discount": 2.0}, {"kind": "mae"}, {"delta": 0.0}])
def test_wrong_settings_are_named(cls, wrong):
    (field,) = wrong
    with pytest.raises(errors.ConfigError, match=rf"{cls.__name__}\.{field}"):
        cls(**wrong)


def test_other_wrong_settings_are_named():
    with pytest.raises(errors.ConfigError, match="sync_period"):
        BVEConfig(sync_period=0)
    with pytest.raises(errors.ConfigError, match="mae"):
        value_loss(jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1)), "mae")
    assert (ValueConfig().name, BVEConfig().name) == ("value", "BVE")
