"""How R rows look at what they do not own: keys and values of prefixes in a pool, of sources in lanes.

Floor 2. On a CPU all is summed term by term, each term read where it lies: to gather keys and values first,
so that a batched product can take them, writes and reads them once more and takes twice as long. Elsewhere
products do it. Which of the two is a matter of the platform that a program is compiled for, not of the one
that compiles it. All sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rest_jax.network.decoding import from_bits

_TERMS = 16  # of a sum that are written out; more are taken in a loop


def logits_of_prefix(query_RxHxD: jax.Array, keys_PxHD: jax.Array, ancestors_RxT: jax.Array) -> jax.Array:
    """Products of each row's query with the keys of its ancestors.

    Args:
      query_RxHxD: what asks.
      keys_PxHD: the pool's keys, [P, H * D].
      ancestors_RxT: int32, the places of each row's ancestors.

    Returns:
      float32 [R, H, T].
    """
    return jax.lax.platform_dependent(
        query_RxHxD,
        keys_PxHD,
        ancestors_RxT,
        cpu=_prefix_logits_by_terms,
        default=lambda query, keys, ancestors: _product(
            "rhd,rthd->rht", query, _of_ancestors(keys, ancestors, query.shape[1])
        ),
    )


def sum_of_prefix(weights_RxHxT: jax.Array, values_PxHD: jax.Array, ancestors_RxT: jax.Array) -> jax.Array:
    """The values of each row's ancestors in the pool, [P, H * D], weighted and added: float32 [R, H, D]."""
    return jax.lax.platform_dependent(
        weights_RxHxT,
        values_PxHD,
        ancestors_RxT,
        cpu=_prefix_sum_by_terms,
        default=lambda weights, values, ancestors: _product(
            "rht,rthd->rhd", weights, _of_ancestors(values, ancestors, weights.shape[1])
        ),
    )


def logits_of_source(query_RxHxD: jax.Array, keys_KxDxHxL: jax.Array, lanes_R: jax.Array) -> jax.Array:
    """Products of each row's query with the keys of its source: float32 [R, H, L]."""
    return _sum_of_lane(query_RxHxD, keys_KxDxHxL, lanes_R)  # over D in the place of positions


def sum_of_source(weights_RxHxL: jax.Array, values_KxLxHxD: jax.Array, lanes_R: jax.Array) -> jax.Array:
    """The values of each row's source, weighted and added: float32 [R, H, D]."""
    return _sum_of_lane(weights_RxHxL, values_KxLxHxD, lanes_R)


def _sum_of_lane(weights_RxHxT: jax.Array, table_KxTxHxD: jax.Array, lanes_R: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        weights_RxHxT,
        table_KxTxHxD,
        lanes_R,
        cpu=_lane_sum_by_terms,
        default=lambda weights, table, lanes: _product("rht,rthd->rhd", weights, _take(table, lanes)),
    )


# By products.


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _of_ancestors(pool_PxHD: jax.Array, ancestors_RxT: jax.Array, heads: int) -> jax.Array:
    """The entries of each row's ancestors, [R, T, H, D]."""
    return _entries(pool_PxHD, ancestors_RxT).reshape(*ancestors_RxT.shape, heads, -1)


# By terms.


def _prefix_logits_by_terms(
    query_RxHxD: jax.Array, keys_PxHD: jax.Array, ancestors_RxT: jax.Array
) -> jax.Array:
    rows, heads, dim = query_RxHxD.shape
    ancestors_TxR = ancestors_RxT.T
    query = query_RxHxD.astype(jnp.float32)
    # The two halves of D are added as they are read; what is left is a product with ones, since XLA's CPU
    # compiler adds along the last dimension one number after the other.
    half = dim // 2 if dim % 2 == 0 else dim
    ones = jnp.ones(half, jnp.float32)

    def logits_at(t: jax.Array) -> jax.Array:
        keys = _entries(keys_PxHD, _take(ancestors_TxR, t)).reshape(query.shape)
        products = query * keys.astype(jnp.float32)
        added = products[..., :half] + products[..., half:] if half < dim else products
        return (added.reshape(rows * heads, half) @ ones).reshape(rows, heads)

    return jnp.moveaxis(_each_term(logits_at, len(ancestors_TxR)), 0, -1)


def _prefix_sum_by_terms(
    weights_RxHxT: jax.Array, values_PxHD: jax.Array, ancestors_RxT: jax.Array
) -> jax.Array:
    rows, heads, _ = weights_RxHxT.shape
    ancestors_TxR = ancestors_RxT.T

    def values_at(t: jax.Array) -> jax.Array:
        return _entries(values_PxHD, _take(ancestors_TxR, t)).reshape(rows, heads, -1)

    return _weighted_sum(weights_RxHxT, values_at)


def _lane_sum_by_terms(weights_RxHxT: jax.Array, table_KxTxHxD: jax.Array, lanes_R: jax.Array) -> jax.Array:
    def terms_at(t: jax.Array) -> jax.Array:
        """`table[lanes, t]`, as one step."""
        flat = table_KxTxHxD.reshape(-1, *table_KxTxHxD.shape[2:])
        return _take(flat, lanes_R * table_KxTxHxD.shape[1] + t)

    return _weighted_sum(weights_RxHxT, terms_at)


def _entries(pool_PxHD: jax.Array, places: jax.Array) -> jax.Array:
    """The numbers that stand at some places of a pool, [..., H * D]."""
    return from_bits(_take(pool_PxHD, places))


def _take(table: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take(table, places, axis=0, mode="clip")


def _weighted_sum(weights_RxHxT: jax.Array, values_at: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Sum over t of weight times `values_at(t)`, which is [R, H, D]: float32 [R, H, D]."""
    length = weights_RxHxT.shape[-1]
    weights_RxHxT = weights_RxHxT.astype(jnp.float32)

    def plus_terms(first: jax.Array | int, terms: int, total: jax.Array | float) -> jax.Array:
        weights = jax.lax.dynamic_slice_in_dim(weights_RxHxT, first, terms, axis=2)
        for i in range(terms):
            total += weights[..., i, None] * values_at(jnp.asarray(first + i)).astype(jnp.float32)
        return jnp.asarray(total)

    rest = _rest(length)
    total = plus_terms(0, rest, 0.0)
    if length == rest:
        return total

    def next_terms(block: jax.Array, total: jax.Array) -> jax.Array:
        return plus_terms(rest + block * _TERMS, _TERMS, total)

    return jax.lax.fori_loop(0, (length - rest) // _TERMS, next_terms, total)


def _each_term(term_at: Callable[[jax.Array], jax.Array], length: int) -> jax.Array:
    """`term_at(t)` for each t below `length`, stacked along a new first dimension."""

    def terms(first: jax.Array | int, number: int) -> jax.Array:
        return jnp.stack([term_at(jnp.asarray(first + i)) for i in range(number)])

    rest = _rest(length)
    first = terms(0, rest)
    if length == rest:
        return first
    blocks = jax.lax.map(
        lambda block: terms(rest + block * _TERMS, _TERMS), jnp.arange((length - rest) // _TERMS)
    )
    return jnp.concatenate([first, blocks.reshape(-1, *first.shape[1:])])


def _rest(length: int) -> int:
    """How many terms come before the blocks of the loop; all, where there are few."""
    return length % _TERMS or min(length, _TERMS)
