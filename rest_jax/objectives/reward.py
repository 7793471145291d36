"""Loss of the reward model: regression of a score in [0, 1] (arXiv:2308.08998, section 4: R(x, y) in [0, 1]).

Floor 1.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rest_jax import errors
from rest_jax.types import LossSums

RegressionKind = Literal["bce", "mse"]


def regression_loss(
    score_logits_B: jax.Array, scores_B: jax.Array, row_weights_B: jax.Array, kind: RegressionKind = "bce"
) -> LossSums:
    """How far the rewards sigmoid(score_logits) are from the scores, averaged over rows.

    Args:
      score_logits_B: the reward model's output before the sigmoid.
      scores_B: the ratings, in [0, 1].
      row_weights_B: at least 0; rows of weight 0 add nothing, even where they are NaN.
      kind: "bce", binary cross entropy with the score as a soft label, whose gradient does not vanish where
        the sigmoid saturates; or "mse", squared error of the reward.

    Returns:
      LossSums with the metrics "mse", "mae" and "bias" (mean of reward - score).

    Raises:
      ConfigError: the kind is unknown.
    """
    if kind not in ("bce", "mse"):
        raise errors.ConfigError(
            f"unknown regression loss {kind!r}", where="regression_loss", remedy='Use "bce" or "mse"'
        )
    weights_B = row_weights_B.astype(jnp.float32)
    logits_B = jnp.where(weights_B > 0, score_logits_B.astype(jnp.float32), 0.0)
    scores_B = jnp.where(weights_B > 0, scores_B.astype(jnp.float32), 0.0)
    errors_B = jax.nn.sigmoid(logits_B) - scores_B
    squares_B = jnp.square(errors_B)
    # softplus(x) - xy = -(y log sigmoid(x) + (1 - y) log sigmoid(-x)), without a log of 0
    losses_B = squares_B if kind == "mse" else jax.nn.softplus(logits_B) - logits_B * scores_B
    rows = jnp.sum(weights_B)
    return LossSums(
        loss=jnp.sum(weights_B * losses_B),
        weight=rows,
        metrics={
            "mse": (jnp.sum(weights_B * squares_B), rows),
            "mae": (jnp.sum(weights_B * jnp.abs(errors_B)), rows),
            "bias": (jnp.sum(weights_B * errors_B), rows),
        },
    )
