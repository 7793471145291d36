from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rest_jax import errors
from rest_jax.objectives import reward

LOGITS = np.array([-3.0, -0.5, 0.0, 2.0, 40.0, -40.0], np.float32)
SCORES = np.array([0.0, 0.3, 0.5, 1.0, 1.0, 0.25], np.float32)
WEIGHTS = np.array([1.0, 1.0, 0.5, 1.0, 1.0, 1.0], np.float32)


def test_hand_worked():
    # sigmoid(0) = 1/2: squared error 1/4, cross entropy log 2
    zero, one = jnp.zeros(1), jnp.ones(1)
    np.testing.assert_allclose(reward.regression_loss(zero, one, one, "mse").loss, 0.25)
    bce = reward.regression_loss(zero, one, one, "bce")
    np.testing.assert_allclose(bce.loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(bce.metrics["bias"][0], -0.5)


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_matches_torch_in_value_and_gradient(kind):
    logits = torch.tensor(LOGITS, requires_grad=True)
    if kind == "bce":
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, torch.tensor(SCORES), reduction="none"
        )
    else:
        losses = (torch.sigmoid(logits) - torch.tensor(SCORES)) ** 2
    expected = (losses * torch.tensor(WEIGHTS)).sum()
    expected.backward()

    def loss(logits):
        return reward.regression_loss(logits, SCORES, WEIGHTS, kind).loss

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(gradient, logits.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_metrics_by_numpy():
    sums = reward.regression_loss(jnp.asarray(LOGITS), jnp.asarray(SCORES), jnp.asarray(WEIGHTS))
    difference = 1 / (1 + np.exp(-LOGITS.astype(np.float64))) - SCORES
    for name, values in (("mse", difference**2), ("mae", abs(difference)), ("bias", difference)):
        total, rows = sums.metrics[name]
        np.testing.assert_allclose(total, (values * WEIGHTS).sum(), rtol=1e-5)
        assert float(rows) == float(sums.weight) == 5.5


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_rows_of_weight_zero_add_nothing(kind):
    weights = WEIGHTS.copy()
    weights[[0, 2]] = 0
    logits, scores = LOGITS.copy(), SCORES.copy()
    logits[0], scores[2] = np.nan, np.nan

    def loss(logits):
        return reward.regression_loss(logits, scores, weights, kind).loss

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    kept = weights > 0
    np.testing.assert_allclose(
        value, reward.regression_loss(LOGITS[kept], SCORES[kept], weights[kept], kind).loss, rtol=1e-6
    )
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~kept].any()


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_least_where_the_reward_is_the_score(kind):
    best = jnp.log(jnp.array([0.3 / 0.7]))
    gradient = jax.grad(lambda x: reward.regression_loss(x, jnp.array([0.3]), jnp.ones(1), kind).loss)(best)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_bce_still_learns_where_the_sigmoid_saturates():
    wrong, score, one = jnp.array([-30.0]), jnp.ones(1), jnp.ones(1)
    slopes = {
        kind: float(jax.grad(lambda x, k=kind: reward.regression_loss(x, score, one, k).loss)(wrong)[0])
        for kind in ("bce", "mse")
    }
    assert slopes["bce"] == pytest.approx(-1.0)
    assert abs(slopes["mse"]) < 1e-10


def test_unknown_kind_is_named():
    with pytest.raises(errors.ConfigError, match="huber"):
        reward.regression_loss(LOGITS, SCORES, WEIGHTS, "huber")
