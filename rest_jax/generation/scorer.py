"""Log-probabilities of given translations by teacher forcing: the sampler's twin.

Floor 4. What the sampler stores while it draws, the scorer gives for the same tokens in one pass, from the
same `shape_logits`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from rest_jax.generation.contract import pick
from rest_jax.generation.sampler import SamplingConfig, shape_logits
from rest_jax.network.config import T5Config
from rest_jax.network.transformer import Transformer
from rest_jax.types import PAD_ID, Params


def score_logits(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    sampling: SamplingConfig | None = None,
    allowed_vocab_size: int | None = None,
) -> jax.Array:
    """Log-probability of each target token, given the logits at its position.

    Args:
      logits_BxTxV: the model's logits.
      targets_BxT: int32, padded with 0 after EOS.
      sampling: None gives the model's own log-probabilities (temperature 1, nothing masked); a configuration
        gives those of the distribution it samples from.
      allowed_vocab_size: as in `shape_logits`; only counts with `sampling`.

    Returns:
      float32 [B, T]; 0 on padding; -inf for a token that cannot be drawn under `sampling`.
    """
    logits_BxTxV = logits_BxTxV.astype(jnp.float32)
    if sampling is not None:
        logits_BxTxV = shape_logits(logits_BxTxV, sampling, allowed_vocab_size)
    log_probs = pick(logits_BxTxV, targets_BxT) - jax.nn.logsumexp(logits_BxTxV, axis=-1)
    return jnp.where(targets_BxT == PAD_ID, 0.0, log_probs)


def score_tokens(
    config: T5Config,
    params: Params,
    source_tokens_BxL: jax.Array,
    target_tokens_BxT: jax.Array,
    sampling: SamplingConfig | None = None,
    allowed_vocab_size: int | None = None,
) -> jax.Array:
    """Log-probability of each token of given translations; to be called under jit with `config` static.

    A token that sits on the very border of a top-k or top-p set can fall on its other side here than in the
    sampler, whose logits differ by rounding; without truncation the two agree to rounding everywhere.

    Args:
      config: the network.
      params: its parameters.
      source_tokens_BxL: int32, padded with 0.
      target_tokens_BxT: int32, EOS included, padded with 0.
      sampling: None for the model's own log-probabilities, else those of the sampler of this configuration.
      allowed_vocab_size: as in `shape_logits`; only counts with `sampling`.

    Returns:
      float32 [B, T], as `score_logits`.
    """
    inputs_BxT = jnp.pad(target_tokens_BxT, ((0, 0), (1, 0)), constant_values=PAD_ID)[:, :-1]
    logits: Any = Transformer(config).apply(
        {"params": params}, source_tokens_BxL, inputs_BxT, deterministic=True
    )
    return score_logits(logits, target_tokens_BxT, sampling, allowed_vocab_size)
