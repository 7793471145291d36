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
_ROWS_IN_CACHE = 32


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
        mask_RxT: jax.Array,
        bias_RxHxT1: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Lets the last position of R prefixes look at itself and at the positions before it.

        Args:
          x_RxE: its input.
          pool: keys and values [P, H * D] of the layer.
          ancestors_RxT: places in the pool of the positions before.
          mask_RxT: bool, True on ancestors.
          bias_RxHxT1: relative position bias of the T ancestors and, last, of the position itself, float32.

        Returns:
          [R, E], and the position's own key and value, each [R, H * D].
        """
        query, own = self.query(x_RxE), (self.key(x_RxE), self.value(x_RxE))
        attend = functools.partial(_attend_to_prefix, pool, self.config.num_heads)
        operands = (query, *own, ancestors_RxT, mask_RxT, bias_RxHxT1)
        return self.out(_in_parts(attend, operands)), own

    def cross_rows(
        self, x_RxE: jax.Array, source: tuple[jax.Array, jax.Array, jax.Array], lanes_R: jax.Array
    ) -> jax.Array:
        """Lets R prefixes look at the sources of their lanes: [R, E].

        Args:
          x_RxE: their inputs.
          source: keys and values [K, H, L, D] and mask, bool [K, L], of the K sources in work.
          lanes_R: int32, which of them each row looks at.
        """
        attend = functools.partial(_attend_to_source, source)
        return self.out(_in_parts(attend, (self.query(x_RxE), lanes_R)))

    def _rows(self, dense: nn.Module, x_SxNxE: jax.Array) -> jax.Array:
        sources, samples, width = x_SxNxE.shape
        return dense(x_SxNxE.reshape(sources * samples, width)).reshape(sources, samples, -1)


def _attend_to_prefix(
    pool: tuple[jax.Array, jax.Array],
    heads: int,
    query_RxJ: jax.Array,
    key_RxJ: jax.Array,
    value_RxJ: jax.Array,
    ancestors_RxT: jax.Array,
    mask_RxT: jax.Array,
    bias_RxHxT1: jax.Array,
) -> jax.Array:
    """What R positions see of themselves and of their ancestors in the pool: [R, J], J = H * D."""
    rows, length = ancestors_RxT.shape

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], heads, -1)

    query, own_key, own_value = split(query_RxJ), split(key_RxJ), split(value_RxJ)
    keys, values = (split(jnp.take(leaf, ancestors_RxT, axis=0, mode="clip")) for leaf in pool)
    before = jnp.einsum("rhd,rthd->rht", query, keys, preferred_element_type=jnp.float32)
    itself = jnp.einsum("rhd,rhd->rh", query, own_key, preferred_element_type=jnp.float32)
    logits = jnp.concatenate([before, itself[..., None]], axis=-1) + bias_RxHxT1
    mask = jnp.concatenate([mask_RxT, jnp.ones((rows, 1), bool)], axis=-1)[:, None]
    weights = attention_weights(logits, mask).astype(query.dtype)
    # A sum and not a product of matrices, for which XLA's CPU compiler would transpose the values first.
    weights_RxTxH = jnp.swapaxes(weights[..., :length], 1, 2)
    attended = jnp.sum(weights_RxTxH[..., None] * values, axis=1, dtype=jnp.float32).astype(query.dtype)
    return (attended + weights[..., length:] * own_value).reshape(rows, -1)


def _attend_to_source(
    source: tuple[jax.Array, jax.Array, jax.Array], query_RxJ: jax.Array, lanes_R: jax.Array
) -> jax.Array:
    """What R positions see of the sources of their lanes: [R, J], J = H * D."""
    keys, values, mask = (jnp.take(of_lanes, lanes_R, axis=0, mode="clip") for of_lanes in source)
    query = query_RxJ.reshape(len(lanes_R), keys.shape[1], -1)
    logits = jnp.einsum("rhd,rhld->rhl", query, keys, preferred_element_type=jnp.float32)
    weights = attention_weights(logits, mask[:, None, :]).astype(values.dtype)
    return jnp.einsum("rhl,rhld->rhd", weights, values).reshape(query_RxJ.shape)


def _in_parts(work: Callable[..., jax.Array], operands: tuple[jax.Array, ...]) -> jax.Array:
    """Rows of operands through `work`; on a CPU a few at a time, whose keys and values stay in its cache.

    All at once takes three times as long there: XLA gives each layer a piece of memory of its own.
    """
    rows = len(operands[0])
    if jax.default_backend() != "cpu" or rows <= _ROWS_IN_CACHE or rows % _ROWS_IN_CACHE:
        return work(*operands)
    parts = jax.tree.map(lambda x: x.reshape(-1, _ROWS_IN_CACHE, *x.shape[1:]), operands)
    return jax.lax.map(lambda part: work(*part), parts).reshape(rows, -1)


def _write(cache_SxNxHxTxD: jax.Array, new_SxNxHxD: jax.Array, position: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(cache_SxNxHxTxD, new_SxNxHxD[:, :, :, None], position, axis=3)
