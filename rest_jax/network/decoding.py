"""What decoding one position at a time carries along: the encoded sources and the decoder's cache.

Floor 2. Both are plain pytrees, so they pass through `jit`, `while_loop` and `tree.map` as they are.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rest_jax.network.config import T5Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedSource:
    """Sources as every decoder layer looks at them: once each, however many samples are drawn.

    Attributes:
      keys: for each decoder layer, [S, H, L, D].
      values: likewise.
      mask: bool [S, L], True on tokens, False on padding.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeCache:
    """Self-attention keys and values of the positions decoded so far.

    Attributes:
      keys: for each decoder layer, [S, N, H, T, D] in the type of the activations.
      values: likewise.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    def reorder(self, parents_SxN: jax.Array) -> DecodeCache:
        """The cache whose sample n of source s continues sample `parents_SxN[s, n]` of that source."""

        def pick(leaf: jax.Array) -> jax.Array:
            return jnp.take_along_axis(leaf, parents_SxN.reshape(*parents_SxN.shape, 1, 1, 1), axis=1)

        return jax.tree.map(pick, self)


def empty_cache(config: T5Config, num_sources: int, num_samples: int, max_length: int) -> DecodeCache:
    """A cache of S x N sequences with room for `max_length` positions (T), all zero."""
    shape = (num_sources, num_samples, config.num_heads, max_length, config.head_dim)

    def zeros() -> tuple[jax.Array, ...]:
        # An array of its own for every leaf: a buffer that appears twice cannot be donated.
        return tuple(jnp.zeros(shape, config.activation_dtype) for _ in range(config.num_decoder_layers))

    return DecodeCache(keys=zeros(), values=zeros())
