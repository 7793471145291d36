from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import errors
from rest_jax.objectives.gold import GoldConfig, gold, gold_returns
from tests.objectives.episodes import (
    Layout,
    assert_trees_close,
    central_differences,
    descend,
    drawn,
    lengths,
    softmax,
)

S, P = GoldConfig(), GoldConfig("p", reward_floor=-20.0, baseline=-2.0)


def case(seed: int = 0, vocabulary: int = 5):
    """Two layouts of five pairs and their arrays: logits, targets, log p_MLE, log π_lagged."""
    rng = np.random.default_rng(seed)
    sizes = lengths(rng, 5, 4)
    apart, packed = Layout(sizes), Layout(sizes, [[0, 1], [2], [3, 4]])
    ragged = [
        drawn(rng, sizes, (vocabulary,)),
        [rng.integers(0, vocabulary, size).astype(np.int32) for size in sizes],
        [-np.abs(array) for array in drawn(rng, sizes, scale=2.0)],
        [-np.abs(array) for array in drawn(rng, sizes, scale=2.0)],
    ]
    return apart, packed, ragged


def laid_out(layout: Layout, ragged):
    logits, targets, mle, lagged = (layout.lay(array) for array in ragged)
    return logits, targets, layout.weights, mle, lagged


def oracle(ragged, config: GoldConfig) -> float:
    """The sum over tokens, term by term, as the authors' code defines it."""
    total = 0.0
    for logits, targets, mle, lagged in zip(*ragged, strict=True):
        for t, target in enumerate(targets):
            q = 0.0
            for j in range(config.steps + 1):
                log_p = float(mle[t + j]) if t + j < len(mle) else 0.0
                reward = math.exp(log_p) if config.kind == "s" else log_p - config.baseline
                q += config.discount**j * max(reward, config.reward_floor)
            weight = min(max(math.exp(lagged[t]), config.importance_floor), 1.0)
            log_probs = np.log(softmax(logits[t]))
            smooth = -log_probs.mean()
            loss = -weight * q * log_probs[target]
            total += (1 - config.label_smoothing) * loss + config.label_smoothing * smooth
    return total


def test_worked_by_hand():
    # π = (1/4, 3/4) at both tokens; targets 0, 1; p_MLE = 1/2, 1/5; π_lagged = 1/10, 9/10
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0]]]))
    arrays = (
        logits,
        jnp.array([[0, 1]]),
        jnp.ones((1, 2)),
        jnp.log(jnp.array([[0.5, 0.2]])),
        jnp.log(jnp.array([[0.1, 0.9]])),
    )
    # GOLD-s, k = 2: Q = (1/2 + 1/5 + 1, 1/5 + 1 + 1); w = (0.2, 0.9)
    sums = gold(*arrays, GoldConfig(steps=2))
    np.testing.assert_allclose(sums.loss, 0.2 * 1.7 * math.log(4) + 0.9 * 2.2 * math.log(4 / 3), rtol=1e-6)
    # GOLD-p, k = 1, b = −3: Q = (log 1/2 + log 1/5 + 6, log 1/5 + 3 + 3)
    sums = gold(*arrays, GoldConfig("p", 1, baseline=-3.0))
    first, second = math.log(0.1) + 6, math.log(0.2) + 6
    expected = 0.2 * first * math.log(4) + 0.9 * second * math.log(4 / 3)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)
    assert {name: float(total) for name, (total, _) in sums.metrics.items()} == pytest.approx(
        {
            "nll": math.log(16 / 3),
            "importance": 1.1,
            "importance_at_floor": 1.0,
            "q": first + second,
        },
        rel=1e-6,
    )


def test_rewards_are_bounded_below_past_the_end_too():
    config = GoldConfig("p", 1, baseline=0.0, reward_floor=-0.5)
    found = gold_returns(jnp.log(jnp.array([[0.1, 0.9]])), jnp.ones((1, 2)), config)
    np.testing.assert_allclose(found, [[-0.5 + math.log(0.9), math.log(0.9)]], rtol=1e-6)
    config = GoldConfig("p", 1, baseline=0.0, reward_floor=0.5)
    found = gold_returns(jnp.log(jnp.array([[0.1, 0.9]])), jnp.ones((1, 2)), config)
    np.testing.assert_allclose(found, [[1.0, 1.0]])
    impossible = gold_returns(jnp.array([[-jnp.inf]]), jnp.ones((1, 1)), GoldConfig("p", 0))
    np.testing.assert_allclose(impossible, [[0.1]], rtol=1e-6)


@pytest.mark.parametrize(
    "config", [S, P, GoldConfig("s", 3, 0.7, label_smoothing=0.1), GoldConfig("p", 0)], ids=lambda c: c.name
)
def test_packed_or_not_it_is_the_authors_sum(config):
    apart, packed, ragged = case()
    expected = oracle(ragged, config)
    alone = gold(*laid_out(apart, ragged), config)
    together = gold(*laid_out(packed, ragged), config, packed.segments)
    np.testing.assert_allclose(alone.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(together.loss, expected, rtol=1e-5)
    assert_trees_close(together.metrics, alone.metrics, rtol=1e-5)
    assert float(alone.weight) == float(together.weight) == sum(apart.sizes)


def test_sequences_are_counted_as_pairs():
    apart, packed, ragged = case()
    config = GoldConfig(normalise="sequence")
    alone, together = (
        gold(*laid_out(apart, ragged), config),
        gold(*laid_out(packed, ragged), config, packed.segments),
    )
    assert float(alone.weight) == float(together.weight) == 5


@pytest.mark.parametrize("own", [False, True], ids=["lagged", "own"])
@pytest.mark.parametrize("config", [S, P, GoldConfig(label_smoothing=0.2)], ids=lambda c: c.name)
def test_gradient_is_that_of_the_loss_with_weights_held(config, own):
    _, packed, ragged = case(1)
    with jax.enable_x64(True):
        logits, targets, weights, mle, lagged = laid_out(packed, ragged)
        logits = np.nan_to_num(logits).astype(np.float64)
        held = lagged
        if own:  # the same function with the policy's own probabilities given as constants
            held = np.take_along_axis(np.log(softmax(logits)), targets[..., None], -1)[..., 0]
            lagged = None

        def value(logits, lagged):
            return gold(logits, targets, weights, mle, lagged, config, packed.segments).loss

        gradient = jax.grad(value)(jnp.asarray(logits), lagged)
        expected = central_differences(jax.jit(lambda x: value(x, held)), logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_no_gradient_goes_into_the_other_policies():
    _, packed, ragged = case(2)
    logits, targets, weights, mle, lagged = laid_out(packed, ragged)

    def value(mle, lagged):
        return gold(logits, targets, weights, mle, lagged, S, packed.segments).loss

    for gradient in jax.grad(value, (0, 1))(mle, lagged):
        assert not np.asarray(gradient).any()


def test_nothing_leaks_from_behind_weight_zero():
    _, packed, ragged = case(3)
    arrays = laid_out(packed, ragged)
    assert np.isnan(arrays[0]).any() and np.isnan(arrays[3]).any()
    clean = [np.nan_to_num(array) for array in arrays]

    def value(logits, rest):
        return gold(logits, *rest, GoldConfig(label_smoothing=0.1), packed.segments).loss

    loss, gradient = jax.value_and_grad(value)(jnp.asarray(arrays[0]), arrays[1:])
    assert float(loss) == float(value(clean[0], clean[1:]))
    assert np.isfinite(np.asarray(gradient)).all()
    assert not np.asarray(gradient)[packed.weights == 0].any()
    empty = gold(*arrays[:2], packed.weights * 0, *arrays[3:], S, packed.segments)
    assert all(float(leaf) == 0 for leaf in jax.tree.leaves(empty))


def test_micro_batches_add_up():
    apart, _, ragged = case(4)
    arrays = laid_out(apart, ragged)
    whole = gold(*arrays, S)
    parts = [gold(*(array[part] for array in arrays), S) for part in (slice(0, 2), slice(2, 5))]
    assert_trees_close(jax.tree.map(lambda *leaves: sum(leaves), *parts), whole, rtol=1e-6)


def every_pair(vocabulary: int = 4):
    """All sequences of two tokens as rows [V², 2]."""
    return (
        np.stack(np.meshgrid(*[np.arange(vocabulary)] * 2, indexing="ij"), -1).reshape(-1, 2).astype(np.int32)
    )


@pytest.mark.parametrize("config", [S, P], ids=lambda c: c.name)
def test_it_finds_the_reweighted_data_distribution(config):
    """With w and Q held, the optimum of −sum n w Q log π is π ∝ n w Q, token by token."""
    rng = np.random.default_rng(5)
    targets = every_pair()
    counts = rng.uniform(0.1, 1.0, len(targets)).astype(np.float32)
    mle = np.log(rng.uniform(0.05, 0.9, (len(targets), 2))).astype(np.float32)
    lagged = np.log(rng.uniform(0.05, 0.9, (len(targets), 2))).astype(np.float32)
    weights = np.stack([counts, counts], 1)

    def mean(params):
        logits = jnp.stack([jnp.broadcast_to(params["first"], (16, 4)), params["second"][targets[:, 0]]], 1)
        sums = gold(logits, targets, weights, mle, lagged, config)
        return sums.loss / sums.weight

    start = {"first": jnp.zeros(4), "second": jnp.zeros((4, 4))}
    found = descend(jax.grad(mean), start, 0.2, 4000)
    p = np.exp(np.float64(mle))
    q = np.maximum(p if config.kind == "s" else np.log(p) - config.baseline, config.reward_floor)
    end = max(1.0 if config.kind == "s" else -config.baseline, config.reward_floor)
    sums = np.concatenate([q.sum(1, keepdims=True) + 4 * end, q[:, 1:] + 5 * end], 1)
    masses = counts[:, None] * np.clip(np.exp(lagged), config.importance_floor, 1) * sums
    first = masses[:, 0].reshape(4, 4).sum(1)
    second = masses[:, 1].reshape(4, 4)
    np.testing.assert_allclose(softmax(found["first"]), first / first.sum(), atol=2e-3)
    np.testing.assert_allclose(softmax(found["second"]), second / second.sum(1, keepdims=True), atol=2e-3)


def test_its_own_weights_sharpen_the_policy_to_a_fixed_point():
    """One token, w = clip(π, u, 1): at rest π ∝ n clip(π, u, 1) Q, and it is more peaked than the data."""
    counts = np.array([[0.4], [0.3], [0.2], [0.1]], np.float32)
    targets = np.arange(4, dtype=np.int32)[:, None]
    mle = np.log(counts)

    def mean(logits):
        sums = gold(jnp.broadcast_to(logits, (4, 1, 4)), targets, counts, mle, None, S)
        return sums.loss / sums.weight

    policy = softmax(descend(jax.grad(mean), jnp.zeros(4), 0.3, 4000))
    masses = counts[:, 0] * np.clip(policy, 0.2, 1) * (counts[:, 0] + 5)
    np.testing.assert_allclose(policy, masses / masses.sum(), atol=1e-4)
    assert policy[0] > 0.4 + 0.05 and policy[3] < 0.1


def test_without_bounds_and_steps_it_weighs_by_both_probabilities():
    arrays = (
        jnp.zeros((1, 1, 2)),
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones((1, 1)),
        jnp.log(jnp.full((1, 1), 0.3)),
    )
    config = GoldConfig(steps=0, importance_floor=0.0, reward_floor=0.0)
    np.testing.assert_allclose(gold(*arrays, None, config).loss, 0.5 * 0.3 * math.log(2), rtol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "q"},
        {"steps": -1},
        {"steps": 2.5},
        {"discount": 1.5},
        {"importance_floor": math.nan},
        {"reward_floor": math.inf},
        {"label_smoothing": 1.0},
        {"sync_period": 0},
        {"normalise": "batch"},
    ],
)
def test_wrong_settings_are_named(wrong):
    (field,) = wrong
    with pytest.raises(errors.ConfigError, match=rf"GoldConfig\.{field}"):
        GoldConfig(**wrong)


def test_names():
    assert (S.name, P.name) == ("GOLD-s", "GOLD-p")
