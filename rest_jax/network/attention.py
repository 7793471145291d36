"""Multi-head attention of T5: over whole sequences, and one position at a time with a memory.

Floor 2. The logits are not divided by sqrt(D); the initialiser of the query kernel is, as in T5X. Logits
and softmax are float32. Masks use a finite value, so a row that may look at nothing yields numbers (the mean
of its values), not NaN.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rest_jax.network import row_attention
from rest_jax.network.config import T5Config
from rest_jax.network.decoding import from_bits, to_bits
from rest_jax.network.layers import Dense, Initializer, attention_init, compiled, constrain, dropout

MASKED_LOGIT = -1e10


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
        query_RxHxD, own_key, own_value = (self._heads(x) for x in (query, *own))
        itself_RxH = jnp.einsum("rhd,rhd->rh", query_RxHxD, own_key, preferred_element_type=jnp.float32)
        logits_RxHxT = row_attention.logits_of_prefix(query_RxHxD, pool[0], ancestors_RxT)
        logits_RxHxT1 = jnp.concatenate([logits_RxHxT, itself_RxH[..., None]], axis=-1)
        weights = jax.nn.softmax(logits_RxHxT1 + bias_RxHxT1, axis=-1).astype(query.dtype)
        attended = row_attention.sum_of_prefix(weights[..., :-1], pool[1], ancestors_RxT)
        attended = attended.astype(query.dtype) + weights[..., -1:] * own_value
        return self.out(attended.reshape(query.shape)), own

    def cross_rows(
        self, x_RxE: jax.Array, source: tuple[jax.Array, jax.Array, jax.Array], lanes_R: jax.Array
    ) -> jax.Array:
        """Lets R prefixes look at the sources of their lanes: [R, E].

        Args:
          x_RxE: their inputs.
          source: keys [K, D, H, L], values [K, L, H, D] and mask, bool [K, L], of the K sources in work.
          lanes_R: int32, which of them each row looks at.
        """
        keys_KxDxHxL, values_KxLxHxD, mask_KxL = source
        query = self.query(x_RxE)
        logits_RxHxL = row_attention.logits_of_source(self._heads(query), keys_KxDxHxL, lanes_R)
        weights = attention_weights(logits_RxHxL, mask_KxL[lanes_R][:, None]).astype(query.dtype)
        attended = row_attention.sum_of_source(weights, values_KxLxHxD, lanes_R)
        return self.out(attended.astype(query.dtype).reshape(query.shape))

    def _rows(self, dense: nn.Module, x_SxNxE: jax.Array) -> jax.Array:
        sources, samples, width = x_SxNxE.shape
        return dense(x_SxNxE.reshape(sources * samples, width)).reshape(sources, samples, -1)


def _write(cache_SxNxHxTxD: jax.Array, new_SxNxHxD: jax.Array, position: jax.Array) -> jax.Array:
    cache, new = to_bits(cache_SxNxHxTxD), to_bits(new_SxNxHxD[:, :, :, None])
    return from_bits(jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=3))
