"""What a decoder asks of a model, and what it gives back.

Floor 4. Greedy and beam search see the model through the three functions of `DecoderFns`, sampling through
those of `PrefixFns`; so any model that can take one step can be decoded, and a table of probabilities can
stand in for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from rest_jax.network.config import T5Config
from rest_jax.network.decoding import (
    DecodeCache,
    EncodedSource,
    LaneSources,
    PrefixPool,
    PrefixRows,
    empty_cache,
    empty_pool,
)
from rest_jax.network.transformer import Transformer
from rest_jax.types import PAD_ID, Params

# What `start` makes and `step` carries on: any pytree.
State = Any


class StartFn(Protocol):
    """Encodes sources [S, L] and makes the state of N rows each, with room for T target tokens."""

    def __call__(
        self, params: Params, source_tokens_SxL: jax.Array, num_rows_N: int, max_length_T: int
    ) -> State:
        """See `DecoderFns`."""


class StepFn(Protocol):
    """Feeds the token at `position` (0 is the start symbol) and gives the logits of the one after it."""

    def __call__(
        self, params: Params, tokens_SxN: jax.Array, position: jax.Array, state: State
    ) -> tuple[jax.Array, State]:
        """See `DecoderFns`."""


class ReorderFn(Protocol):
    """Makes row n of each source go on from what row `parents[s, n]` of the same source has seen."""

    def __call__(self, state: State, parents_SxN: jax.Array) -> State:
        """See `DecoderFns`."""


class DecoderFns(NamedTuple):
    """A model as its decoders see it. Logits are float32 [S, N, V].

    Attributes:
      start: (params, source_tokens_SxL, num_rows_N, max_length_T) -> state.
      step: (params, tokens_SxN, position, state) -> (logits_SxNxV, state).
      reorder: (state, parents_SxN) -> state; only beam search calls it.
    """

    start: StartFn
    step: StepFn
    reorder: ReorderFn


@functools.lru_cache(maxsize=32)
def transformer_decoder(config: T5Config) -> DecoderFns:
    """The decoder contract over the T5 policy: its cache grows by a position a step, its sources are never
    copied for the N rows that look at them.
    """
    model = Transformer(config)

    def start(
        params: Params, source_tokens_SxL: jax.Array, num_rows_N: int, max_length_T: int
    ) -> tuple[DecodeCache, EncodedSource]:
        source: Any = model.apply({"params": params}, source_tokens_SxL, method=Transformer.start_decoding)
        return empty_cache(config, source_tokens_SxL.shape[0], num_rows_N, max_length_T), source

    def step(
        params: Params, tokens_SxN: jax.Array, position: jax.Array, state: tuple[DecodeCache, EncodedSource]
    ) -> tuple[jax.Array, tuple[DecodeCache, EncodedSource]]:
        cache, source = state
        decoded: Any = model.apply(
            {"params": params}, tokens_SxN, position, cache, source, method=Transformer.decode_step
        )
        logits, cache = decoded
        return logits, (cache, source)

    def reorder(
        state: tuple[DecodeCache, EncodedSource], parents_SxN: jax.Array
    ) -> tuple[DecodeCache, EncodedSource]:
        cache, source = state
        return cache.reorder(parents_SxN), source

    return DecoderFns(start, step, reorder)


class PrefixFns(NamedTuple):
    """A model as the sampler sees it: prefixes of any length and source go one position further together.

    Attributes:
      encode: (params, source_tokens_QxL) -> what a step needs of the sources, leaves [Q, ...].
      empty: (P) -> the pool, in which each computed position of each distinct prefix has a place; leaves
        [P, ...].
      step: (params, rows, pool, sources of the lanes with leaves [K, ...]) -> (logits_RxV float32, entries
        for the pool with leaves [R, ...]).
    """

    encode: Callable[[Params, jax.Array], Any]
    empty: Callable[[int], Any]
    step: Callable[[Params, PrefixRows, Any, Any], tuple[jax.Array, Any]]


@functools.lru_cache(maxsize=32)
def transformer_prefixes(config: T5Config) -> PrefixFns:
    """The sampler's contract over the T5 policy."""
    model = Transformer(config)

    def encode(params: Params, source_tokens_QxL: jax.Array) -> LaneSources:
        source: Any = model.apply({"params": params}, source_tokens_QxL, method=Transformer.start_decoding)
        return LaneSources.of(source)

    def step(
        params: Params, rows: PrefixRows, pool: PrefixPool, lanes: LaneSources
    ) -> tuple[jax.Array, PrefixPool]:
        decoded: Any = model.apply({"params": params}, rows, pool, lanes, method=Transformer.decode_rows)
        return decoded

    return PrefixFns(encode, functools.partial(empty_pool, config), step)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """N translations of each source, as all decoders return them.

    Attributes:
      tokens_SxNxT: int32; EOS included, padding after it.
      log_probs_SxNxT: float32; the model's own log-probability of each token (temperature 1, no truncation,
        nothing masked), as teacher forcing gives it; 0 after the end.
      tempered_log_probs_SxNxT: float32; log-probability under the distribution the token was drawn from
        (temperature, top-k, top-p, masked ids); 0 after the end, and 0 for greedy and beam search,
        which leave nothing to chance.
      finished_SxN: bool; False for a translation cut off at T tokens without EOS.
      scores_SxN: float32; what a decoder ranks by: the sum of `log_probs`, in beam search divided by the
        length penalty.
      rows_computed_D: int32, in sampling: how many rows each device put through the decoder to get there; as
        many as there are tokens where no two samples of a source begin alike. None in search.
      slots_computed_D: likewise, with the slots of its tiles that were left empty.
    """

    tokens_SxNxT: jax.Array
    log_probs_SxNxT: jax.Array
    tempered_log_probs_SxNxT: jax.Array
    finished_SxN: jax.Array
    scores_SxN: jax.Array
    rows_computed_D: jax.Array | None = None
    slots_computed_D: jax.Array | None = None


def mask_unused(logits: jax.Array, allowed_vocab_size: int | None = None) -> jax.Array:
    """Rules out the ids that are never a translation's token: padding, and rows that only fill the table.

    Args:
      logits: [..., V].
      allowed_vocab_size: how many ids the tokenizer knows, where the embedding table has more; None is all.

    Returns:
      float32 [..., V] with -inf for those ids.
    """
    ids = jnp.arange(logits.shape[-1])
    unused = ids == PAD_ID
    if allowed_vocab_size is not None:
        unused |= ids >= allowed_vocab_size
    return jnp.where(unused, -jnp.inf, logits.astype(jnp.float32))


def pick(values: jax.Array, indices: jax.Array) -> jax.Array:
    """The entry of the last axis that each index names: [..., V] and [...] -> [...]."""
    return jnp.take_along_axis(values, indices[..., None], axis=-1)[..., 0]
