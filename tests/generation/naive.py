"""The sampler as one would write it first: N rows a source, every row computed to the end of the longest.

What `rest_jax.generation.prefixes` is held against.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax import keys
from rest_jax.generation.contract import Decoded, DecoderFns, State, pick
from rest_jax.generation.sampler import SamplingConfig, invert_cdf, shape_logits
from rest_jax.types import EOS_ID, PAD_ID, Params


class _Draw(NamedTuple):
    tokens_SxN: jax.Array
    log_probs_SxN: jax.Array
    tempered_SxN: jax.Array


def _draw(logits_SxNxV: jax.Array, shaped_SxNxV: jax.Array, uniforms_SxN: jax.Array) -> _Draw:
    highest = jnp.max(shaped_SxNxV, axis=-1)
    weights = jnp.exp(shaped_SxNxV - highest[..., None])
    flat = invert_cdf(weights.reshape(-1, weights.shape[-1]), uniforms_SxN.reshape(-1))
    tokens = flat.reshape(uniforms_SxN.shape)
    tempered = pick(shaped_SxNxV, tokens) - highest - jnp.log(jnp.sum(weights, axis=-1))
    raw = pick(logits_SxNxV, tokens) - jax.nn.logsumexp(logits_SxNxV, axis=-1)
    return _Draw(tokens, raw, tempered)


class _Loop(NamedTuple):
    """What the loop carries. Outputs are time-major, so that a step writes one contiguous piece."""

    position: jax.Array
    last_SxN: jax.Array
    ended_SxN: jax.Array
    tokens_TxSxN: jax.Array
    log_probs_TxSxN: jax.Array
    tempered_TxSxN: jax.Array
    state: State


def naive_sample(
    fns: DecoderFns,
    params: Params,
    source_tokens_SxL: jax.Array,
    keys_SxN: jax.Array,
    config: SamplingConfig,
    *,
    allowed_vocab_size: int | None = None,
    active_SxN: jax.Array | None = None,
) -> Decoded:
    """Draws N translations of each source; one program, to be called under jit.

    Args:
      fns: the model.
      params: its parameters.
      source_tokens_SxL: int32, padded with 0.
      keys_SxN: one addressed key a sample, from `keys.sample_keys`.
      config: temperature, truncation, longest translation T.
      allowed_vocab_size: ids from here on are never drawn; None allows all but padding.
      active_SxN: rows that are False only fill the batch and come back empty; None is all True.

    Returns:
      `Decoded`. The loop stops as soon as every row has ended, which changes nothing in the result.
    """
    num_sources, num_rows = keys_SxN.shape

    def step(loop: _Loop) -> _Loop:
        logits, state = fns.step(params, loop.last_SxN, loop.position, loop.state)
        logits = logits.astype(jnp.float32)
        shaped = shape_logits(logits, config, allowed_vocab_size)
        drawn = _draw(logits, shaped, keys.position_uniforms(keys_SxN, loop.position))
        at, ended = loop.position, loop.ended_SxN
        tokens = jnp.where(ended, PAD_ID, drawn.tokens_SxN)
        return _Loop(
            position=at + 1,
            last_SxN=tokens,
            ended_SxN=ended | (tokens == EOS_ID),
            tokens_TxSxN=loop.tokens_TxSxN.at[at].set(tokens),
            log_probs_TxSxN=loop.log_probs_TxSxN.at[at].set(jnp.where(ended, 0.0, drawn.log_probs_SxN)),
            tempered_TxSxN=loop.tempered_TxSxN.at[at].set(jnp.where(ended, 0.0, drawn.tempered_SxN)),
            state=state,
        )

    def going_on(loop: _Loop) -> jax.Array:
        return (loop.position < config.max_length) & ~jnp.all(loop.ended_SxN)

    shape = (config.max_length, num_sources, num_rows)
    active = jnp.ones(shape[1:], bool) if active_SxN is None else active_SxN
    first = _Loop(
        position=jnp.int32(0),
        last_SxN=jnp.full(shape[1:], PAD_ID, jnp.int32),
        ended_SxN=~active,
        tokens_TxSxN=jnp.full(shape, PAD_ID, jnp.int32),
        log_probs_TxSxN=jnp.zeros(shape, jnp.float32),
        tempered_TxSxN=jnp.zeros(shape, jnp.float32),
        state=fns.start(params, source_tokens_SxL, num_rows, config.max_length),
    )
    last = jax.lax.while_loop(going_on, step, first)
    return Decoded(
        tokens_SxNxT=jnp.moveaxis(last.tokens_TxSxN, 0, -1),
        log_probs_SxNxT=jnp.moveaxis(last.log_probs_TxSxN, 0, -1),
        tempered_log_probs_SxNxT=jnp.moveaxis(last.tempered_TxSxN, 0, -1),
        finished_SxN=last.ended_SxN & active,
        scores_SxN=jnp.sum(last.log_probs_TxSxN, axis=0),
    )
