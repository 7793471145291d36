"""A language model that is a table: the next token depends on the source's id and the token before it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax import keys
from rest_jax.generation.contract import DecoderFns, PrefixFns
from rest_jax.types import EOS_ID, PAD_ID


def make_table(num_sources: int, vocab_size: int, seed: int = 0, scale: float = 1.5) -> np.ndarray:
    """Logits [source, previous token, next token]."""
    rng = np.random.default_rng(seed)
    return rng.normal(scale=scale, size=(num_sources, vocab_size, vocab_size)).astype(np.float32)


def tabular_decoder() -> DecoderFns:
    """The decoder contract over a table given as params; the state remembers the tokens each row has seen.

    The source's id is its first token. A step reads the previous token from the state's own memory, so that
    beam search is wrong wherever it forgets to reorder the state.
    """

    def start(params, source_tokens_SxL, num_rows_N, max_length_T):
        num_sources = source_tokens_SxL.shape[0]
        return source_tokens_SxL[:, 0], jnp.full((num_sources, num_rows_N, max_length_T), -1, jnp.int32)

    def step(params, tokens_SxN, position, state):
        source_S, seen_SxNxT = state
        seen_SxNxT = seen_SxNxT.at[:, :, position].set(tokens_SxN)
        before = seen_SxNxT[:, :, jnp.maximum(position - 1, 0)]
        table = jnp.asarray(params)
        logits = table[source_S[:, None], tokens_SxN]
        # A second-order term: the token before the previous one matters a little too.
        logits = logits + 0.3 * jnp.where(position > 0, table[source_S[:, None], before], 0.0)
        return logits.astype(jnp.float32), (source_S, seen_SxNxT)

    def reorder(state, parents_SxN):
        source_S, seen_SxNxT = state
        return source_S, jnp.take_along_axis(seen_SxNxT, parents_SxN[..., None], axis=1)

    return DecoderFns(start, step, reorder)


def tabular_prefixes() -> PrefixFns:
    """The same model for the sampler: the pool remembers the token of each position of each prefix.

    The token before the last is looked up through the row's ancestors, so that drawing is wrong wherever a
    place of the pool is given to two prefixes or a row is led to the wrong ones.
    """

    def encode(params, source_tokens_QxL):
        return source_tokens_QxL[:, 0]

    def empty(num_prefixes):
        return jnp.full(num_prefixes, -1, jnp.int32)

    def step(params, rows, pool, source_K):
        table, positions = jnp.asarray(params), rows.positions_R
        parents = jnp.take_along_axis(rows.ancestors_RxT, jnp.maximum(positions - 1, 0)[:, None], axis=1)
        before = pool[parents[:, 0]]
        source_R = source_K[rows.lanes_R]
        logits = table[source_R, rows.tokens_R]
        logits = logits + 0.3 * jnp.where((positions > 0)[:, None], table[source_R, before], 0.0)
        return logits.astype(jnp.float32), rows.tokens_R

    return PrefixFns(encode, empty, step)


def next_logits(table: np.ndarray, source: int, prefix: tuple[int, ...]) -> np.ndarray:
    """The same model, written independently in NumPy: logits after a prefix without the start symbol."""
    history = (PAD_ID, *prefix)
    logits = table[source, history[-1]].astype(np.float64)
    if len(history) > 1:
        logits = logits + 0.3 * table[source, history[-2]]
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    highest = logits.max()
    return logits - highest - np.log(np.exp(logits - highest).sum())


def all_sequences(vocab_size: int, max_length: int) -> list[tuple[int, ...]]:
    """Every finished sequence of up to `max_length` tokens and every cut-off one of exactly that many."""
    inner = [t for t in range(vocab_size) if t not in (PAD_ID, EOS_ID)]
    finished = [(*body, EOS_ID) for n in range(max_length) for body in itertools.product(inner, repeat=n)]
    return finished + list(itertools.product(inner, repeat=max_length))


def source_rows(sources: list[int]) -> jax.Array:
    return jnp.asarray(sources, jnp.int32)[:, None]


def keys_for(ids: list[int], samples: range, seed: int = 0) -> jax.Array:
    key = keys.stream_key(seed, keys.Stream.GROW, 1)
    high, low = keys.split_ids(np.asarray(ids))
    return keys.sample_keys(key, high, low, np.asarray(samples, np.uint32))
