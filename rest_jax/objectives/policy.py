"""Losses of the policy: behaviour cloning, the loss that ReST does best with.

Floor 1. Paper: arXiv:2308.08998, section 2, eq. (1). All of it in float32, whatever the logits' dtype.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from rest_jax import errors
from rest_jax.objectives import tokens
from rest_jax.objectives.tokens import Normalise
from rest_jax.types import LossSums


@dataclasses.dataclass(frozen=True)
class BehaviourCloningConfig:
    """The negative log-likelihood, eq. (1) of the paper.

    Attributes:
      normalise: "token" averages over the target tokens of a batch, "sequence" over its pairs.
      label_smoothing: mass moved from the target to the rest of the vocabulary.
      z_loss: weight of the squared log-normaliser, which keeps logits small in bfloat16.
    """

    normalise: Normalise = "token"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def name(self) -> str:
        """The loss's name in tables, as the paper writes it."""
        return "BC"


def token_log_probs(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """log softmax(logits)[target] at every position: float32 [B, T]."""
    shifted_BxTxV, log_sum_BxT, _ = tokens.log_sum(logits_BxTxV)
    return tokens.select(shifted_BxTxV, targets_BxT) - log_sum_BxT


def behaviour_cloning(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    normalise: Normalise = "token",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    segment_ids: jax.Array | None = None,
) -> LossSums:
    """Negative log-likelihood of the targets, eq. (1) of arXiv:2308.08998.

    The sum is the same for both normalisations: over all weighted tokens. What differs is the divisor:
    "token" takes the sum of the weights (machine translation's usual mean), "sequence" the number of pairs,
    so that the loss is the mean over pairs of the sum over a pair's tokens, exactly as eq. (1) is written.
    A pair is a row, or with segment ids one segment of a row; pairs without a token of positive weight do not
    count.

    Label smoothing gives each wrong token label_smoothing / (V - 1) and subtracts the entropy of the smoothed
    target, as T5X does: the loss is 0 when the policy is the smoothed target, and comparable over settings.

    Args:
      logits_BxTxV: of any float dtype.
      targets_BxT: int.
      weights_BxT: at least 0; positions of weight 0 add nothing, even where their logits are NaN.
      normalise: "token" or "sequence".
      label_smoothing: probability taken from the target token, in [0, 1).
      z_loss: factor of (log of the softmax's normaliser)^2, which keeps logits from drifting (T5X: 1e-4).
      segment_ids: int [B, T], numbers of the pairs packed into a row, from 1; only "sequence" reads them.

    Returns:
      LossSums with the metrics "nll" (per token, without smoothing and z-loss) and "accuracy" (argmax is the
      target), and "z_loss" where there is one.

    Raises:
      ConfigError: a setting is out of its range.
    """
    _check(normalise, label_smoothing, z_loss)
    weights_BxT = weights_BxT.astype(jnp.float32)
    logits_BxTxV = tokens.cleared(logits_BxTxV, weights_BxT > 0)
    shifted_BxTxV, log_sum_BxT, peaks_BxT = tokens.log_sum(logits_BxTxV)
    nll_BxT = log_sum_BxT - tokens.select(shifted_BxTxV, targets_BxT)

    losses_BxT = nll_BxT
    if label_smoothing:
        losses_BxT = _smoothed(nll_BxT, shifted_BxTxV, log_sum_BxT, label_smoothing)
    count = jnp.sum(weights_BxT)
    hits_BxT = (jnp.argmax(logits_BxTxV, axis=-1) == targets_BxT).astype(jnp.float32)
    metrics = {
        "nll": (jnp.sum(weights_BxT * nll_BxT), count),
        "accuracy": (jnp.sum(weights_BxT * hits_BxT), count),
    }
    if z_loss:
        z_losses_BxT = z_loss * jnp.square(log_sum_BxT + peaks_BxT)
        losses_BxT = losses_BxT + z_losses_BxT
        metrics["z_loss"] = (jnp.sum(weights_BxT * z_losses_BxT), count)
    weight = tokens.divisor(weights_BxT, normalise, segment_ids)
    return LossSums(loss=jnp.sum(weights_BxT * losses_BxT), weight=weight, metrics=metrics)


def _smoothed(
    nll_BxT: jax.Array, shifted_BxTxV: jax.Array, log_sum_BxT: jax.Array, smoothing: float
) -> jax.Array:
    """Cross entropy against the smoothed target, less that target's entropy."""
    size = shifted_BxTxV.shape[-1]
    kept, spread = 1.0 - smoothing, smoothing / (size - 1)
    entropy = -(kept * math.log(kept) + smoothing * math.log(spread))
    all_nll_BxT = size * log_sum_BxT - jnp.sum(shifted_BxTxV, axis=-1)
    return (kept - spread) * nll_BxT + spread * all_nll_BxT - entropy


def _check(normalise: str, label_smoothing: float, z_loss: float) -> None:
    if normalise not in ("token", "sequence"):
        raise errors.ConfigError(
            f"unknown normalisation {normalise!r}",
            where="behaviour_cloning",
            remedy='Use "token" or "sequence"',
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise errors.ConfigError(
            f"label_smoothing is {label_smoothing}",
            where="behaviour_cloning",
            remedy="Give a value in [0, 1)",
        )
    if not 0.0 <= z_loss < math.inf:
        raise errors.ConfigError(
            f"z_loss is {z_loss}", where="behaviour_cloning", remedy="Give a factor of at least 0"
        )
