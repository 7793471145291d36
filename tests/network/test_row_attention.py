"""Rows that look at a pool and at lanes, against sums written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.network import row_attention
from rest_jax.network.decoding import from_bits, to_bits

ROWS, HEADS, PLACES, LANES = 6, 3, 50, 4


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(params=["cpu", "default"])
def platform(request, monkeypatch):
    """What is written for a CPU, and what is written for the others."""

    def choose(*arrays, **programs):
        return programs[request.param](*arrays)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)


# Fewer terms than are written out, as many, more with and without a rest; an odd dimension.
@pytest.mark.parametrize("length", [1, 5, 16, 32, 37])
@pytest.mark.parametrize("dim", [8, 5])
def test_prefixes_of_a_pool(platform, length, dim):
    query, weights = normal(0, ROWS, HEADS, dim), normal(1, ROWS, HEADS, length)
    keys, values = normal(2, PLACES, HEADS * dim), normal(3, PLACES, HEADS * dim)
    ancestors = np.random.default_rng(4).integers(0, PLACES, (ROWS, length))
    of_rows = keys.reshape(PLACES, HEADS, dim)[ancestors]
    np.testing.assert_allclose(
        row_attention.logits_of_prefix(query, jnp.asarray(keys), jnp.asarray(ancestors)),
        (query[:, None] * of_rows).sum(-1).transpose(0, 2, 1),
        atol=1e-5,
    )
    of_rows = values.reshape(PLACES, HEADS, dim)[ancestors]
    np.testing.assert_allclose(
        row_attention.sum_of_prefix(jnp.asarray(weights), jnp.asarray(values), jnp.asarray(ancestors)),
        (weights.transpose(0, 2, 1)[..., None] * of_rows).sum(1),
        atol=1e-5,
    )


@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("dim", [8, 20])
def test_sources_of_lanes(platform, length, dim):
    query, weights = normal(0, ROWS, HEADS, dim), normal(1, ROWS, HEADS, length)
    keys, values = normal(2, LANES, dim, HEADS, length), normal(3, LANES, length, HEADS, dim)
    lanes = np.random.default_rng(4).integers(0, LANES, ROWS)
    np.testing.assert_allclose(
        row_attention.logits_of_source(jnp.asarray(query), jnp.asarray(keys), jnp.asarray(lanes)),
        (query.transpose(0, 2, 1)[..., None] * keys[lanes]).sum(1),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        row_attention.sum_of_source(jnp.asarray(weights), jnp.asarray(values), jnp.asarray(lanes)),
        (weights.transpose(0, 2, 1)[..., None] * values[lanes]).sum(1),
        atol=1e-5,
    )


def test_bfloat16_is_added_in_float32(platform):
    """Sums of many equal terms, which bfloat16 could not hold."""
    length, dim = 300, 300
    ones = jnp.ones((1, 1, dim), jnp.bfloat16)
    pool = jnp.ones((1, dim), jnp.bfloat16)
    none = jnp.zeros((1, length), jnp.int32)
    assert np.all(np.asarray(row_attention.logits_of_prefix(ones, pool, none)) == dim)
    weights = jnp.ones((1, 1, length), jnp.bfloat16)
    assert np.all(np.asarray(row_attention.sum_of_prefix(weights, pool, none)) == length)
    lane = jnp.zeros(1, jnp.int32)
    assert np.all(row_attention.logits_of_source(ones, jnp.ones((1, dim, 1, 4), jnp.bfloat16), lane) == dim)


def test_a_pool_of_bits_is_one_of_bfloat16(platform):
    pool = jnp.asarray(normal(0, PLACES, HEADS * 8), jnp.bfloat16)
    query, weights = (jnp.asarray(normal(k, ROWS, HEADS, 8), jnp.bfloat16) for k in (1, 2))
    ancestors = jnp.asarray(np.random.default_rng(4).integers(0, PLACES, (ROWS, 8)))
    bits = to_bits(pool)
    assert bits.dtype == jnp.uint16
    np.testing.assert_array_equal(from_bits(bits), pool)
    for look, asks in ((row_attention.logits_of_prefix, query), (row_attention.sum_of_prefix, weights)):
        np.testing.assert_array_equal(look(asks, bits, ancestors), look(asks, pool, ancestors))
