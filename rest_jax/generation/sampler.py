"""What is sampled from, and how one token is drawn.

Floor 4. A token is drawn by inverting the cumulative distribution at one uniform number, whose address is
(stream, example id, sample index, position). `prefixes.py` draws whole translations.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.errors import ConfigError
from rest_jax.generation.contract import mask_unused, pick

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distributions:
    """R next-token distributions, each ready for any number of draws.

    Attributes:
      logits_RxV: the model's own, float32.
      shaped_RxV: those that are drawn from, of `shape_logits`.
      blocks_RxBxW: unnormalised probabilities, the vocabulary cut into blocks.
      sums_RxB: their sums.
      highest_R: what was subtracted from `shaped_RxV` in their exponents.
    """

    logits_RxV: jax.Array
    shaped_RxV: jax.Array
    blocks_RxBxW: jax.Array
    sums_RxB: jax.Array
    highest_R: jax.Array

    @classmethod
    def of_logits(
        cls, logits_RxV: jax.Array, config: SamplingConfig, allowed_vocab_size: int | None = None
    ) -> Distributions:
        """The distributions that a policy with these logits is sampled from."""
        logits_RxV = logits_RxV.astype(jnp.float32)
        shaped_RxV = shape_logits(logits_RxV, config, allowed_vocab_size)
        highest_R = jnp.max(shaped_RxV, axis=-1)
        blocks = _blocks(jnp.exp(shaped_RxV - highest_R[:, None]))
        return cls(logits_RxV, shaped_RxV, blocks, jnp.sum(blocks, axis=-1), highest_R)

    def draw(self, rows_M: jax.Array, uniforms_M: jax.Array) -> Draws:
        """One token for each uniform in [0, 1), from the distribution of its row."""
        tokens = _invert_blocks(self.blocks_RxBxW, self.sums_RxB, rows_M, uniforms_M)
        tempered_total_R = self.highest_R + jnp.log(jnp.sum(self.sums_RxB, axis=-1))
        raw_total_R = jax.nn.logsumexp(self.logits_RxV, axis=-1)
        return Draws(
            tokens,
            self.logits_RxV[rows_M, tokens] - raw_total_R[rows_M],
            self.shaped_RxV[rows_M, tokens] - tempered_total_R[rows_M],
        )


class Draws(NamedTuple):
    """Tokens that were drawn, int32 [M], with their log-probabilities, float32 [M].

    Attributes:
      tokens_M: what was drawn.
      log_probs_M: under the model itself.
      tempered_log_probs_M: under the distribution that was drawn from.
    """

    tokens_M: jax.Array
    log_probs_M: jax.Array
    tempered_log_probs_M: jax.Array


def _blocks(weights_RxV: jax.Array) -> jax.Array:
    rows, vocab_size = weights_RxV.shape
    return jnp.pad(weights_RxV, ((0, 0), (0, -vocab_size % _BLOCK))).reshape(rows, -1, _BLOCK)


def _invert_blocks(
    blocks_RxBxW: jax.Array, sums_RxB: jax.Array, rows_M: jax.Array, uniforms_M: jax.Array
) -> jax.Array:
    sums_MxB = sums_RxB[rows_M]
    block_M, rest_M = _invert(sums_MxB, uniforms_M * jnp.sum(sums_MxB, axis=-1))
    within_M, _ = _invert(blocks_RxBxW[rows_M, block_M], rest_M)
    return (block_M * _BLOCK + within_M).astype(jnp.int32)


def invert_cdf(weights_RxV: jax.Array, uniforms_R: jax.Array) -> jax.Array:
    """Draws from unnormalised probabilities by inverting their cumulative distribution.

    Args:
      weights_RxV: float32, not negative, at least one positive.
      uniforms_R: float32 in [0, 1).

    Returns:
      int32 [R]: the number of cumulative sums that are <= uniform * total; never one of weight zero.
    """
    blocks = _blocks(weights_RxV)
    return _invert_blocks(blocks, jnp.sum(blocks, axis=-1), jnp.arange(len(weights_RxV)), uniforms_R)
