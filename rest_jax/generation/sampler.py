"""Ancestral sampling with addressed random numbers.

Floor 4. A token is drawn by inverting the cumulative distribution at one uniform number, whose address is
(stream, example id, sample index, position): sample 7 of a source is the same whether 8 or 64 are asked for,
and whatever else is in the batch.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax import keys
from rest_jax.errors import ConfigError
from rest_jax.generation.contract import Decoded, DecoderFns, State, mask_unused, pick
from rest_jax.types import EOS_ID, PAD_ID, Params

# Width of the blocks of the two-level cumulative sum. On CPU one cumulative sum over 4,096 (32,128) ids takes
# 10 (30) times as long as a sum over blocks and then one over the ids of the block that was hit.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How Grow and evaluation sample. The paper samples at temperature 0.8 (§4) and truncates nothing.

    Attributes:
      temperature: logits are divided by it; above 0. Greedy search is a decoder of its own.
      top_k: draw from the k likeliest tokens only, and from all that tie with the last of them; 0 is off.
      top_p: draw from the smallest set of likeliest tokens whose mass, after temperature and top-k, is at
        least p, and from all that tie with the last of them; 1 is off.
      max_length: tokens of a translation at most, EOS included; a longer one is cut off and flagged.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    max_length: int = 128

    def __post_init__(self) -> None:
        where = "SamplingConfig"
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature is {self.temperature}, must be above 0",
                where=where,
                remedy="Use the greedy decoder for the likeliest token",
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}, must be 0 (off) or more", where=where)
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}, must be above 0 and at most 1 (off)", where=where)
        if self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}, must be 1 or more", where=where)


def shape_logits(
    logits: jax.Array, config: SamplingConfig, allowed_vocab_size: int | None = None
) -> jax.Array:
    """Turns a model's logits into those of the distribution that is sampled from.

    The one place of temperature, top-k and top-p, in this order; the scorer calls it too.

    Args:
      logits: [..., V].
      config: temperature and truncation.
      allowed_vocab_size: ids from here on are never drawn; None allows all but padding.

    Returns:
      float32 [..., V], unnormalised; -inf for tokens that cannot be drawn.
    """
    shaped = mask_unused(logits, allowed_vocab_size) / config.temperature
    if config.top_k:
        shaped = _keep_likeliest(shaped, jnp.ones_like(shaped), config.top_k)
    if config.top_p < 1.0:
        shaped = _keep_likeliest(shaped, jax.nn.softmax(shaped, axis=-1), config.top_p)
    return shaped


def _keep_likeliest(logits: jax.Array, masses: jax.Array, enough: float) -> jax.Array:
    """Keeps the logits >= t, for the largest t at which what is kept has a mass of at least `enough`.

    t is found by bisection on the bits of the logits, exact after 32 halvings: no sort of the vocabulary, and
    on CPU a small part of the price of `jax.lax.top_k` within the sampling loop.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    ranks = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats, negative ones too

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough at low, too little at high
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        kept = jnp.sum(jnp.where(ranks >= middle, masses, 0.0), axis=-1, keepdims=True)
        return jnp.where(kept >= enough, middle, low), jnp.where(kept >= enough, high, middle)

    everything = jnp.full_like(ranks[..., :1], jnp.iinfo(jnp.int32).min)
    nothing = jnp.full_like(everything, jnp.iinfo(jnp.int32).max)
    threshold, _ = jax.lax.fori_loop(0, 32, halve, (everything, nothing))
    return jnp.where(ranks >= threshold, logits, -jnp.inf)


def _invert(weights: jax.Array, mass: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the entry in which a cumulative sum passes `mass`, and how far into it that is.

    The second count is the last entry of positive weight; it takes over where rounding put `mass` at or
    beyond the whole sum, so an entry of weight zero is never found.
    """
    sums = jnp.cumsum(weights, axis=-1)
    passed = jnp.sum(sums <= mass[..., None], axis=-1)
    last = jnp.sum(sums < sums[..., -1:], axis=-1)
    index = jnp.minimum(passed, last)
    before = jnp.where(index > 0, pick(sums, jnp.maximum(index - 1, 0)), 0.0)
    return index, mass - before


def invert_cdf(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draws from unnormalised probabilities by inverting their cumulative distribution.

    Args:
      weights: float32 [..., V], not negative, at least one positive.
      uniforms: float32 [...] in [0, 1).

    Returns:
      int32 [...]: the number of cumulative sums that are <= uniform * total; never one of weight zero.
    """
    vocab_size = weights.shape[-1]
    lead = weights.shape[:-1]
    padding = [(0, 0)] * len(lead) + [(0, -vocab_size % _BLOCK)]
    blocks = jnp.pad(weights, padding).reshape(*lead, -1, _BLOCK)
    block_sums = jnp.sum(blocks, axis=-1)
    block, rest = _invert(block_sums, uniforms * jnp.sum(block_sums, axis=-1))
    hit = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    within, _ = _invert(hit, rest)
    return (block * _BLOCK + within).astype(jnp.int32)


class _Draw(NamedTuple):
    tokens_SxN: jax.Array
    log_probs_SxN: jax.Array
    tempered_SxN: jax.Array


def _draw(logits_SxNxV: jax.Array, shaped_SxNxV: jax.Array, uniforms_SxN: jax.Array) -> _Draw:
    highest = jnp.max(shaped_SxNxV, axis=-1)
    weights = jnp.exp(shaped_SxNxV - highest[..., None])
    tokens = invert_cdf(weights, uniforms_SxN)
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


def sample(
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
