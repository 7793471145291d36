from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rest_jax import errors
from rest_jax.objectives import policy


def _case(seed: int, shape: tuple[int, int, int] = (3, 5, 7), scale: float = 2.0):
    rng = np.random.default_rng(seed)
    batch, length, vocabulary = shape
    logits = rng.normal(scale=scale, size=shape).astype(np.float32)
    targets = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)
    weights = (np.arange(length) < rng.integers(1, length + 1, (batch, 1))).astype(np.float32)
    return logits, targets, weights


def _oracle_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]


def test_two_equal_logits_make_a_coin():
    found = policy.token_log_probs(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(found, [[-math.log(2)]], rtol=1e-6)


def test_hand_worked_loss():
    # p = softmax(log 1, log 3) = (1/4, 3/4); targets 0 and 1, then padding
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0], [5.0, 1.0]]]))
    sums = policy.behaviour_cloning(logits, jnp.array([[0, 1, 0]]), jnp.array([[1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(sums.loss, math.log(4) + math.log(4 / 3), rtol=1e-6)
    assert float(sums.weight) == 2
    hits, tokens = sums.metrics["accuracy"]
    assert (float(hits), float(tokens)) == (1, 2)


@settings(deadline=None, max_examples=25)
@given(hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-30, 30, width=32)), st.integers(0, 3))
def test_log_probs_match_float64(logits, target):
    targets = np.full((2, 3), target, np.int32)
    np.testing.assert_allclose(
        policy.token_log_probs(jnp.asarray(logits), jnp.asarray(targets)),
        -_oracle_nll(logits, targets),
        rtol=1e-5,
        atol=1e-5,
    )


def test_log_probs_are_stable_for_huge_logits():
    logits = jnp.array([[[1e4, 1e4 + 1.0, -1e30]]])
    found = policy.token_log_probs(jnp.repeat(logits, 3, axis=1), jnp.array([[0, 1, 2]]))
    expected = [-1 - math.log1p(math.exp(-1)), -math.log1p(math.exp(-1)), -1e30]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_log_probs_of_excluded_tokens_are_minus_infinity():
    found = policy.token_log_probs(jnp.array([[[0.0, -jnp.inf, 0.0]]] * 2), jnp.array([[1], [0]]))
    np.testing.assert_allclose(found, [[-np.inf], [-math.log(2)]], rtol=1e-6)


def test_bfloat16_logits_give_a_float32_loss():
    logits, targets, weights = _case(0)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    sums = policy.behaviour_cloning(rounded, targets, weights)
    assert sums.loss.dtype == jnp.float32
    expected = (_oracle_nll(np.asarray(rounded, np.float32), targets) * weights).sum()
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_matches_torch_but_for_the_entropy(smoothing):
    logits, targets, weights = _case(1)
    size = logits.shape[-1]
    # torch spreads over all V tokens, the target included: its epsilon is V / (V - 1) times ours
    torch_losses = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(-1, size),
        torch.tensor(targets).reshape(-1).long(),
        label_smoothing=smoothing * size / (size - 1),
        reduction="none",
    ).reshape(targets.shape)
    soft = np.full(size, smoothing / (size - 1))
    soft[0] = 1 - smoothing
    entropy = -(soft[soft > 0] * np.log(soft[soft > 0])).sum()
    expected = ((torch_losses.numpy() - entropy) * weights).sum()
    sums = policy.behaviour_cloning(logits, targets, weights, label_smoothing=smoothing)
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)


def test_smoothed_loss_is_zero_and_flat_at_its_optimum():
    smoothed = np.array([0.9, 0.05, 0.05], np.float32)
    logits, targets = jnp.log(smoothed)[None, None], jnp.array([[0]])

    def loss(logits):
        return policy.behaviour_cloning(logits, targets, jnp.ones((1, 1)), label_smoothing=0.1).loss

    value, gradient = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_z_loss_is_the_squared_log_normaliser():
    logits, targets, weights = _case(2)
    plain = policy.behaviour_cloning(logits, targets, weights)
    with_z = policy.behaviour_cloning(logits, targets, weights, z_loss=1e-2)
    log_normaliser = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    expected = 1e-2 * (weights * log_normaliser**2).sum()
    np.testing.assert_allclose(with_z.loss - plain.loss, expected, rtol=1e-4)
    np.testing.assert_allclose(with_z.metrics["z_loss"][0], expected, rtol=1e-5)
    np.testing.assert_array_equal(with_z.metrics["nll"][0], plain.loss)


@pytest.mark.parametrize(
    "settings_", [{}, {"label_smoothing": 0.2}, {"z_loss": 1e-2}, {"normalise": "sequence"}]
)
def test_gradient_against_finite_differences(settings_):
    logits, targets, weights = _case(3, (2, 3, 4), scale=1.0)

    def loss(logits):
        return policy.behaviour_cloning(logits, targets, weights, **settings_).loss

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(logits)))
    step = 1e-2
    for index in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += step
        down[index] -= step
        slope = (float(loss(jnp.asarray(up))) - float(loss(jnp.asarray(down)))) / (2 * step)
        assert slope == pytest.approx(float(gradient[index]), abs=2e-3)


def test_gradient_is_probability_less_target():
    logits, targets, weights = _case(4)
    gradient = jax.grad(lambda x: policy.behaviour_cloning(x, targets, weights).loss)(jnp.asarray(logits))
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(targets, logits.shape[-1])) * weights[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_masked_positions_add_zero_even_when_not_finite():
    logits, targets, weights = _case(5)
    weights[:, -1] = 0
    poisoned = logits.copy()
    poisoned[:, -1] = np.nan
    poisoned[0, -1] = -np.inf
    everything = {"label_smoothing": 0.1, "z_loss": 1e-3}

    def loss(logits):
        return policy.behaviour_cloning(logits, targets, weights, **everything).loss

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(poisoned))
    assert float(value) == float(loss(jnp.asarray(logits)))
    assert np.isfinite(np.asarray(gradient)).all()
    assert not np.asarray(gradient)[:, -1].any()


def test_all_masked_is_zero_over_zero_not_nan():
    logits, targets, weights = _case(6)
    sums = policy.behaviour_cloning(logits, targets, weights * 0, normalise="sequence", z_loss=1e-3)
    assert all(float(leaf) == 0 for leaf in jax.tree.leaves(sums))


def test_sequence_normalisation_counts_rows():
    logits, targets, weights = _case(7)
    weights[1] = 0
    by_token = policy.behaviour_cloning(logits, targets, weights)
    by_row = policy.behaviour_cloning(logits, targets, weights, normalise="sequence")
    assert float(by_row.loss) == float(by_token.loss)
    assert float(by_row.weight) == 2


def test_sequence_normalisation_is_the_same_packed_or_not():
    logits, targets, _ = _case(8, (2, 3, 5))
    weights = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
    apart = policy.behaviour_cloning(logits, targets, weights, normalise="sequence")
    packed = policy.behaviour_cloning(
        logits.reshape(1, 6, 5),
        targets.reshape(1, 6),
        weights.reshape(1, 6),
        normalise="sequence",
        segment_ids=jnp.array([[1, 1, 1, 2, 2, 0]]),
    )
    np.testing.assert_allclose(packed.loss, apart.loss, rtol=1e-6)
    assert float(packed.weight) == float(apart.weight) == 2


@settings(deadline=None, max_examples=25)
@given(
    hnp.arrays(np.int32, (3, 6), elements=st.integers(0, 4)),
    hnp.arrays(np.float32, (3, 6), elements=st.sampled_from([0.0, 0.5, 1.0])),
)
def test_pairs_counted_as_sets_count_them(segments, weights):
    expected = sum(
        len({int(s) for s, w in zip(row, row_weights, strict=True) if w > 0 and s > 0})
        for row, row_weights in zip(segments, weights, strict=True)
    )
    sums = policy.behaviour_cloning(
        jnp.zeros((3, 6, 2)),
        jnp.zeros((3, 6), jnp.int32),
        jnp.asarray(weights),
        normalise="sequence",
        segment_ids=jnp.asarray(segments),
    )
    assert float(sums.weight) == expected


def test_micro_batches_add_up():
    logits, targets, weights = _case(9, (4, 5, 6))
    whole = policy.behaviour_cloning(logits, targets, weights, label_smoothing=0.1)
    halves = [
        policy.behaviour_cloning(logits[part], targets[part], weights[part], label_smoothing=0.1)
        for part in (slice(0, 1), slice(1, 4))
    ]
    added = jax.tree.map(lambda *leaves: sum(leaves), *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), added, whole)


@pytest.mark.parametrize(
    "wrong",
    [{"normalise": "batch"}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": math.nan}],
)
def test_wrong_settings_are_named(wrong):
    logits, targets, weights = _case(10)
    with pytest.raises(errors.ConfigError, match=str(next(iter(wrong.values())))):
        policy.behaviour_cloning(logits, targets, weights, **wrong)
