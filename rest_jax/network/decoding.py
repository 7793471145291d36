"""What decoding one position at a time carries along: the encoded sources and the decoder's memory.

Floor 2. Search keeps a cache for each of S x N sequences, all at the same position (`DecodeCache`). Sampling
keeps keys and values for each distinct prefix, which samples share as long as their tokens agree
(`PrefixPool`, `PrefixRows`). All are plain pytrees, so they pass through `jit`, `while_loop` and `tree.map`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rest_jax.network.config import T5Config


def to_bits(numbers: jax.Array) -> jax.Array:
    """Numbers as they are stored and moved: bfloat16 by its bits, in uint16; others as they are.

    XLA's CPU compiler widens a whole array of bfloat16 to write a few rows of it, or to read them in a loop:
    hundreds of milliseconds for a layer's part of the sampler's pool at each step.
    """
    return jax.lax.bitcast_convert_type(numbers, jnp.uint16) if numbers.dtype == jnp.bfloat16 else numbers


def from_bits(stored: jax.Array) -> jax.Array:
    """The numbers; the inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored


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
class LaneSources:
    """The sources that the rows of a sampler are of, in the order in which `row_attention` reads them.

    Attributes:
      keys: for each decoder layer, [K, D, H, L].
      values: for each decoder layer, [K, L, H, D].
      mask: bool [K, L], True on tokens, False on padding.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array

    @classmethod
    def of(cls, source: EncodedSource) -> LaneSources:
        """The same sources, transposed once rather than at every step."""
        return cls(
            keys=tuple(jnp.transpose(keys_SxHxLxD, (0, 3, 1, 2)) for keys_SxHxLxD in source.keys),
            values=tuple(jnp.transpose(values_SxHxLxD, (0, 2, 1, 3)) for values_SxHxLxD in source.values),
            mask=source.mask,
        )


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
            parents = parents_SxN.reshape(*parents_SxN.shape, 1, 1, 1)
            return from_bits(jnp.take_along_axis(to_bits(leaf), parents, axis=1))

        return jax.tree.map(pick, self)


def empty_cache(config: T5Config, num_sources: int, num_samples: int, max_length: int) -> DecodeCache:
    """A cache of S x N sequences with room for `max_length` positions (T), all zero."""
    shape = (num_sources, num_samples, config.num_heads, max_length, config.head_dim)
    return DecodeCache(keys=_zeros_of_layers(config, shape), values=_zeros_of_layers(config, shape))


def _zeros_of_layers(config: T5Config, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    # An array of its own for every leaf: a buffer that appears twice cannot be donated.
    return tuple(jnp.zeros(shape, config.activation_dtype) for _ in range(config.num_decoder_layers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixPool:
    """Self-attention keys and values of prefixes: one entry for the last position of each.

    Attributes:
      keys: for each decoder layer, [P, H * D] in the type of the activations, as `to_bits` makes them.
      values: likewise.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def empty_pool(config: T5Config, num_prefixes: int) -> PrefixPool:
    """A pool with room for P prefixes, all zero."""
    shape = (num_prefixes, config.joined_kv_dim)
    zeros = PrefixPool(keys=_zeros_of_layers(config, shape), values=_zeros_of_layers(config, shape))
    return jax.tree.map(to_bits, zeros)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixRows:
    """R distinct prefixes that go one position further together, whatever their lengths and sources.

    Attributes:
      tokens_R: int32, the last token of each prefix (PAD, the start symbol, where it is empty).
      positions_R: int32, tokens before that one.
      ancestors_RxT: int32, places in the pool of the positions 0 .. positions - 1; what stands behind them
        names any place of the pool and is not looked at.
      lanes_R: int32, which of the K sources in work each row belongs to.
    """

    tokens_R: jax.Array
    positions_R: jax.Array
    ancestors_RxT: jax.Array
    lanes_R: jax.Array
