"""T5's relative position bias: what a head adds to an attention logit for the distance between two tokens.

Floor 2. One table for each stack, shared by its layers (arXiv:1910.10683 section 2.1). Small distances have
a bucket each, larger ones share buckets whose width grows with the logarithm of the distance.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.network.config import T5Config
from rest_jax.network.layers import compiled, declare

bias_init = compiled(nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"))


def relative_position_buckets(
    offsets: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """The bucket of each offset (position of the key minus position of the query), int32, same shape.

    Args:
      offsets: integers of any shape.
      bidirectional: give keys after the query the upper half of the buckets; otherwise they fall into
        bucket 0, where a causal mask hides them.
      num_buckets: buckets in all.
      max_distance: distance from which on everything is in the last bucket.
    """
    offsets = np.asarray(offsets)
    first = np.zeros_like(offsets)
    if bidirectional:
        num_buckets //= 2
        first = np.where(offsets > 0, num_buckets, 0)
        distance = np.abs(offsets)
    else:
        distance = np.maximum(-offsets, 0)
    exact = num_buckets // 2
    # The guard keeps distances that lie on a boundary (16, 32, ...) from falling below it by rounding.
    octaves = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact) + 1e-9
    coarse = exact + (octaves * (num_buckets - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(coarse, num_buckets - 1))
    return (first + bucket).astype(np.int32)


class RelativePositionBias(nn.Module):
    """The bias table [H, buckets] of one stack.

    Attributes:
      config: the network.
      bidirectional: True in the encoder, False in the decoder.
    """

    config: T5Config
    bidirectional: bool

    def setup(self) -> None:
        """Declares the table."""
        shape = (self.config.num_heads, self.config.relpos_num_buckets)
        self.rel_embedding = declare(self, "rel_embedding", bias_init, shape, ("heads", "relpos_buckets"))

    def _of_offsets(self, offsets: np.ndarray) -> jax.Array:
        buckets = relative_position_buckets(
            offsets,
            bidirectional=self.bidirectional,
            num_buckets=self.config.relpos_num_buckets,
            max_distance=self.config.relpos_max_distance,
        )
        return jnp.take(self.rel_embedding, buckets, axis=1)

    def __call__(self, length: int) -> jax.Array:
        """The bias of all pairs of `length` positions: float32 [H, queries, keys]."""
        # The bias depends on key - query alone. Rows of a periodic table of 2L offsets, read with a stride of
        # 2L - 1, each start one further back: all pairs by reshaping, where indexing would cost a scatter of
        # L * L numbers in the backward pass.
        offsets = np.concatenate([np.arange(length), np.arange(-length, 0)])
        table_Hx2L = self._of_offsets(offsets)
        heads = table_Hx2L.shape[0]
        rows = jnp.broadcast_to(table_Hx2L[:, None], (heads, length, 2 * length)).reshape(heads, -1)
        skewed = rows[:, : length * (2 * length - 1)].reshape(heads, length, 2 * length - 1)
        return skewed[:, :, :length]

    def of_position(self, position: jax.Array, length: int) -> jax.Array:
        """The bias of one query position to keys 0 .. length-1: float32 [H, length].

        Keys after the position get 0; they are for the caller's causal mask to hide.
        """
        # In the reversed table key j of query p stands at (length - 1 - p) + j: one slice, no gather.
        farthest_first_HxT = self._of_offsets(np.arange(length) - (length - 1))
        padded = jnp.pad(farthest_first_HxT, ((0, 0), (0, length - 1)))
        return jax.lax.dynamic_slice_in_dim(padded, length - 1 - position, length, axis=1)

    def of_prefixes(self, positions_R: jax.Array, length: int) -> jax.Array:
        """The bias of R positions to keys 0 .. length-1 and, last, to themselves: float32 [R, H, length + 1].

        Keys at or after a position get that of a distance of 0; they are for the caller's mask to hide.
        """
        distances_Rx = jnp.maximum(positions_R[:, None] - jnp.arange(length), 0)
        distances_Rx = jnp.pad(distances_Rx, ((0, 0), (0, 1)))
        table_xH = self._of_offsets(-np.arange(length + 1)).T
        return jnp.moveaxis(jnp.take(table_xH, distances_Rx, axis=0), -1, 1)
