"""Multi-head attention of T5: over whole sequences, and one position at a time with a memory.

Floor 2. The logits are not divided by sqrt(D); the initialiser of the query kernel is, as in T5X. Logits
and softmax are float32. Masks use a finite value, so a row that may look at nothing yields numbers (the mean
of its values), not NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from rest_jax.network.config import T5Config
from rest_jax.network.layers import Dense, Initializer, attention_init, compiled, constrain, dropout

MASKED_LOGIT = -1e10
# On a CPU: rows of a tile that look at their keys at a time, and keys that they look at, at the most; so many
# stay in its cache.
_ROWS_AT_A_TIME = 32
_KEYS_AT_A_TIME = 1024
_TERMS = 16  # of a weighted sum that are written out


@functools.cache
def query_init(head_dim: int) -> Initializer:
    """Initialiser of the query kernel, which takes the place of dividing the logits by sqrt(D)."""

    def init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
        return attention_init(key, shape, dtype) / math.sqrt(head_dim)

    return compiled(init)


def attention_weights(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis of float32 logits where `mask` (bool, broadcastable) is True."""
    return jax.nn.softmax(jnp.where(mask, logits, MASKED_LOGIT), axis=-1)


class Attention(nn.Module):
    """Queries of one sequence looking at keys and values of the same or another one."""

    config: T5Config

    def setup(self) -> None:
        """Declares the four projections."""
        config = self.config
        width, inwards, dtype = config.joined_kv_dim, ("embed", "joined_kv"), config.activation_dtype
        self.query = Dense(width, inwards, dtype, kernel_init=query_init(config.head_dim))
        self.key = Dense(width, inwards, dtype, kernel_init=attention_init)
        self.value = Dense(width, inwards, dtype, kernel_init=attention_init)
        self.out = Dense(config.emb_dim, ("joined_kv", "embed"), dtype, kernel_init=attention_init)
        self.weights_dropout = dropout(config.dropout_rate)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)

    def __call__(
        self,
        queries_BxQxE: jax.Array,
        keys_BxKxE: jax.Array,
        mask_Bx1xQxK: jax.Array,
        bias_HxQxK: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Attends over whole sequences.

        Args:
          queries_BxQxE: what asks.
          keys_BxKxE: what is looked at.
          mask_Bx1xQxK: bool, broadcastable; True where a query may look at a key.
          bias_HxQxK: added to the logits, float32.
          deterministic: no dropout.

        Returns:
          [B, Q, E].
        """
        axes = ("batch", "length", "heads", "kv")
        query = constrain(self._heads(self.query(queries_BxQxE)), *axes)
        key = constrain(self._heads(self.key(keys_BxKxE)), *axes)
        value = constrain(self._heads(self.value(keys_BxKxE)), *axes)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        if bias_HxQxK is not None:
            logits = logits + bias_HxQxK
        weights = attention_weights(logits, mask_Bx1xQxK).astype(value.dtype)
        weights = self.weights_dropout(weights, deterministic=deterministic)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.out(attended.reshape(*attended.shape[:2], -1))

    def project_source(self, encoded_SxLxE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the sources for `cross_step`, each [S, H, L, D]."""
        axes = ("batch", "heads", "length", "kv")
        key = jnp.swapaxes(self._heads(self.key(encoded_SxLxE)), 1, 2)
        value = jnp.swapaxes(self._heads(self.value(encoded_SxLxE)), 1, 2)
        return constrain(key, *axes), constrain(value, *axes)

    def cross_step(
        self, x_SxNxE: jax.Array, key_SxHxLxD: jax.Array, value_SxHxLxD: jax.Array, mask_SxL: jax.Array
    ) -> jax.Array:
        """Lets the N samples of each source look at that source, which they share: [S, N, E]."""
        query = constrain(self._heads(self._rows(self.query, x_SxNxE)), "batch", "samples", "heads", "kv")
        logits = jnp.einsum("snhd,shld->shnl", query, key_SxHxLxD, preferred_element_type=jnp.float32)
        weights = attention_weights(logits, mask_SxL[:, None, None, :]).astype(value_SxHxLxD.dtype)
        attended = jnp.einsum("shnl,shld->snhd", weights, value_SxHxLxD)
        return self._rows(self.out, attended.reshape(*x_SxNxE.shape[:2], -1))

    def self_step(
        self,
        x_SxNxE: jax.Array,
        cached: tuple[jax.Array, jax.Array],
        position: jax.Array,
        bias_HxT: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Lets one position look at itself and those before it.

        Args:
          x_SxNxE: the position's input.
          cached: keys and values [S, N, H, T, D] of the positions before.
          position: int32 [], where to write this one.
          bias_HxT: relative position bias of this position, float32.

        Returns:
          [S, N, E], and the cache with this position written.
        """
        axes = ("batch", "samples", "heads", "kv")
        query = constrain(self._heads(self._rows(self.query, x_SxNxE)), *axes)
        key, value = cached
        key = _write(key, constrain(self._heads(self._rows(self.key, x_SxNxE)), *axes), position)
        value = _write(value, constrain(self._heads(self._rows(self.value, x_SxNxE)), *axes), position)
        logits = jnp.einsum("snhd,snhtd->snht", query, key, preferred_element_type=jnp.float32)
        mask_T = jnp.arange(key.shape[3]) <= position
        weights = attention_weights(logits + bias_HxT, mask_T).astype(value.dtype)
        attended = jnp.einsum("snht,snhtd->snhd", weights, value)
        return self._rows(self.out, attended.reshape(*x_SxNxE.shape[:2], -1)), (key, value)

    def self_rows(
        self,
        x_RxE: jax.Array,
        pool: tuple[jax.Array, jax.Array],
        ancestors_RxT: jax.Array,
        bias_RxHxT1: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Lets the last position of R prefixes look at itself and at the positions before it.

        Args:
          x_RxE: its input.
          pool: keys and values [P, H * D] of the layer.
          ancestors_RxT: places in the pool of the positions before.
          bias_RxHxT1: relative position bias of the T ancestors and, last, of the position itself, float32;
            `MASKED_LOGIT` for what is no ancestor.

        Returns:
          [R, E], and the position's own key and value, each [R, H * D].
        """
        query, own = self.query(x_RxE), (self.key(x_RxE), self.value(x_RxE))
        keys_PxHxD, values_PxHxD = (self._heads(leaf) for leaf in pool)
        query_RxHxD, own_key, own_value = (self._heads(x) for x in (query, *own))
        itself_RxH = jnp.einsum("rhd,rhd->rh", query_RxHxD, own_key, preferred_element_type=jnp.float32)
        bias_RxHxT1 = bias_RxHxT1.at[..., -1].add(itself_RxH)
        weigh = functools.partial(_weights_of_prefix, keys_PxHxD)
        weights = _in_parts(weigh, (query_RxHxD, ancestors_RxT, bias_RxHxT1), ancestors_RxT.shape[1])
        weights = weights.astype(query.dtype)
        attended = _weighted_sum(weights[..., :-1], lambda t: _take(values_PxHxD, _take(ancestors_RxT.T, t)))
        attended = attended.astype(query.dtype) + weights[..., -1:] * own_value
        return self.out(attended.reshape(query.shape)), own

    def cross_rows(
        self, x_RxE: jax.Array, source: tuple[jax.Array, jax.Array, jax.Array], lanes_R: jax.Array
    ) -> jax.Array:
        """Lets R prefixes look at the sources of their lanes: [R, E].

        Args:
          x_RxE: their inputs.
          source: keys and values [K, H, L, D] and mask, bool [K, L], of the K sources in work.
          lanes_R: int32, which of them each row looks at.
        """
        keys_KxHxLxD, values_KxHxLxD, mask_KxL = source
        query = self.query(x_RxE)
        weigh = functools.partial(_weights_of_source, keys_KxHxLxD, mask_KxL)
        weights = _in_parts(weigh, (self._heads(query), lanes_R), mask_KxL.shape[1]).astype(query.dtype)
        values_LxKxHxD = jnp.moveaxis(values_KxHxLxD, 2, 0)
        attended = _weighted_sum(weights, lambda t: _take(_take(values_LxKxHxD, t), lanes_R))
        return self.out(attended.astype(query.dtype).reshape(query.shape))

    def _rows(self, dense: nn.Module, x_SxNxE: jax.Array) -> jax.Array:
        sources, samples, width = x_SxNxE.shape
        return dense(x_SxNxE.reshape(sources * samples, width)).reshape(sources, samples, -1)


def _weights_of_prefix(
    keys_PxHxD: jax.Array, query_RxHxD: jax.Array, ancestors_RxT: jax.Array, bias_RxHxT1: jax.Array
) -> jax.Array:
    """How much R positions look at their ancestors in the pool and, last, at themselves: [R, H, T + 1]."""
    # Head by head, so that keys come in the order of the product and XLA's CPU compiler need not transpose.
    heads = keys_PxHxD.shape[1]
    places_RxHxT = ancestors_RxT[:, None] * heads + jnp.arange(heads)[:, None]
    keys_RxHxTxD = _take(keys_PxHxD.reshape(-1, keys_PxHxD.shape[2]), places_RxHxT)
    logits = jnp.einsum("rhd,rhtd->rht", query_RxHxD, keys_RxHxTxD, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.pad(logits, ((0, 0), (0, 0), (0, 1))) + bias_RxHxT1, axis=-1)


def _weights_of_source(
    keys_KxHxLxD: jax.Array, mask_KxL: jax.Array, query_RxHxD: jax.Array, lanes_R: jax.Array
) -> jax.Array:
    """How much R positions look at those of their sources: [R, H, L]."""
    keys, mask = _take(keys_KxHxLxD, lanes_R), _take(mask_KxL, lanes_R)
    logits = jnp.einsum("rhd,rhld->rhl", query_RxHxD, keys, preferred_element_type=jnp.float32)
    return attention_weights(logits, mask[:, None, :])


def _take(table: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take(table, places, axis=0, mode="clip")


def _weighted_sum(weights_RxHxT: jax.Array, values_at: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Sum over t of weight times `values_at(t)`, which is [R, H, D]: float32 [R, H, D].

    Written out some terms at a time, so that XLA's CPU compiler reads the values where they are. A sum over
    gathered values [R, T, H, D] would write these out and read them again, on one core.
    """
    length = weights_RxHxT.shape[-1]

    def plus_terms(first: jax.Array | int, terms: int, total: jax.Array | float) -> jax.Array:
        weights = jax.lax.dynamic_slice_in_dim(weights_RxHxT, first, terms, axis=2)
        for i in range(terms):
            total += (weights[..., i, None] * values_at(jnp.asarray(first + i))).astype(jnp.float32)
        return jnp.asarray(total)

    rest = length % _TERMS or min(length, _TERMS)
    total = plus_terms(0, rest, 0.0)
    if length == rest:
        return total

    def next_terms(block: jax.Array, total: jax.Array) -> jax.Array:
        return plus_terms(rest + block * _TERMS, _TERMS, total)

    return jax.lax.fori_loop(0, (length - rest) // _TERMS, next_terms, total)


def _in_parts(work: Callable[..., jax.Array], operands: tuple[jax.Array, ...], num_keys: int) -> jax.Array:
    """Rows of operands, with so many keys each, through `work`; on a CPU a few at a time, for its cache.

    All at once takes several times as long there: XLA gives each layer a piece of memory of its own.
    """
    rows = len(operands[0])
    # A power of two, as tiles mostly are.
    part = 1 << max(0, (min(_ROWS_AT_A_TIME, _KEYS_AT_A_TIME // num_keys)).bit_length() - 1)
    if jax.default_backend() != "cpu" or rows <= part or rows % part:
        return work(*operands)
    parts = jax.tree.map(lambda x: x.reshape(-1, part, *x.shape[1:]), operands)
    done = jax.lax.map(lambda operands: work(*operands), parts)
    return done.reshape(rows, *done.shape[2:])


def _write(cache_SxNxHxTxD: jax.Array, new_SxNxHxD: jax.Array, position: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache_SxNxHxTxD, new_SxNxHxD[:, :, :, None], position, axis=3)
