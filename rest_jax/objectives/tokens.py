"""What the losses over target tokens share: softmax pieces, the choice of a token, masks and divisors.

Floor 1. All of it in float32, whatever the dtype of what comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

Normalise = Literal["token", "sequence"]


def real(values: jax.Array) -> jax.Array:
    """As float32, whatever narrower type came in; float64, which only tests use, stays."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def cleared(values: jax.Array, counted_BxT: jax.Array) -> jax.Array:
    """Values [B, T] or [B, T, V], 0 where a token does not count.

    Before the arithmetic, not after it: a NaN times a weight of zero is a NaN, in the gradient too.
    """
    mask = counted_BxT[..., None] if values.ndim > counted_BxT.ndim else counted_BxT
    return jnp.where(mask, values, 0)


def log_sum(logits_BxTxV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits less their maximum, the log of the sum of those exponentials (at least 0), and the maximum.

    The maximum is a constant to the gradient: what it takes from one of the two it adds to the other.
    """
    logits_BxTxV = real(logits_BxTxV)
    peaks_BxT = jax.lax.stop_gradient(jnp.max(logits_BxTxV, axis=-1))
    shifted_BxTxV = logits_BxTxV - peaks_BxT[..., None]
    return shifted_BxTxV, jnp.log(jnp.sum(jnp.exp(shifted_BxTxV), axis=-1)), peaks_BxT


def log_softmax(logits_BxTxV: jax.Array) -> jax.Array:
    """log softmax over the vocabulary, float32 [B, T, V]."""
    shifted_BxTxV, log_sum_BxT, _ = log_sum(logits_BxTxV)
    return shifted_BxTxV - log_sum_BxT[..., None]


def select(scores_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """scores[..., target]. A masked sum, since a gather's gradient is a scatter, and V may be sharded."""
    vocabulary = jax.lax.broadcasted_iota(targets_BxT.dtype, scores_BxTxV.shape, scores_BxTxV.ndim - 1)
    return jnp.sum(jnp.where(vocabulary == targets_BxT[..., None], scores_BxTxV, 0.0), axis=-1)


def entropy(log_probs_BxTxV: jax.Array) -> jax.Array:
    """−sum p log p over the vocabulary [B, T]; a token that is excluded (log 0) adds 0."""
    seen = jnp.isfinite(log_probs_BxTxV)
    finite_BxTxV = jnp.where(seen, log_probs_BxTxV, 0.0)
    return -jnp.sum(jnp.where(seen, jnp.exp(finite_BxTxV) * finite_BxTxV, 0.0), axis=-1)


def divergence(log_p_BxTxV: jax.Array, log_q_BxTxV: jax.Array) -> jax.Array:
    """KL(p || q) over the vocabulary [B, T]; p is a constant to the gradient.

    A token that p excludes adds 0, whatever q says of it; one that q alone excludes makes it infinite.
    """
    p_BxTxV = jax.lax.stop_gradient(jnp.exp(log_p_BxTxV))
    seen = p_BxTxV > 0
    # Cleared before the difference, so that log 0 - log 0 is never formed.
    log_p_BxTxV = jax.lax.stop_gradient(jnp.where(seen, log_p_BxTxV, 0.0))
    log_q_BxTxV = jnp.where(seen, log_q_BxTxV, 0.0)
    return jnp.sum(p_BxTxV * (log_p_BxTxV - log_q_BxTxV), axis=-1)


def divisor(weights_BxT: jax.Array, normalise: str, segment_ids: jax.Array | None) -> jax.Array:
    """What a sum over tokens is divided by: the sum of the weights ("token") or the pairs ("sequence")."""
    if normalise == "token":
        return jnp.sum(weights_BxT)
    return count_pairs(weights_BxT > 0, segment_ids)


def count_pairs(counted_BxT: jax.Array, segment_ids_BxT: jax.Array | None) -> jax.Array:
    """Pairs with at least one counted token, float32 []."""
    if segment_ids_BxT is None:
        return jnp.sum(jnp.any(counted_BxT, axis=-1).astype(jnp.float32))
    # Sorted, each different number above 0 is a step up.
    ids_BxT = jnp.sort(jnp.where(counted_BxT, segment_ids_BxT, 0), axis=-1)
    steps = jnp.diff(ids_BxT, axis=-1, prepend=jnp.zeros_like(ids_BxT[:, :1])) > 0
    return jnp.sum(steps.astype(jnp.float32))


def averages(
    weights_BxT: jax.Array, values: Mapping[str, jax.Array], count: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Metrics of `LossSums`: the weighted sum of each array [B, T], and the count that it is divided by."""
    return {name: (jnp.sum(weights_BxT * array_BxT), count) for name, array_BxT in values.items()}


def moments(values_BxT: jax.Array, weights_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted mean and standard deviation over a batch; 0 and 0 where nothing has a weight."""
    count = jnp.sum(weights_BxT)
    count = jnp.where(count > 0, count, 1.0)
    mean = jnp.sum(weights_BxT * values_BxT) / count
    return mean, jnp.sqrt(jnp.sum(weights_BxT * jnp.square(values_BxT - mean)) / count)
