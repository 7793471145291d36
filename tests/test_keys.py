from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import keys
from rest_jax.keys import Stream


def bits(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def keys_of(ids: list[int], samples: int, seed: int = 0, stream: Stream = Stream.GROW, index: int = 1):
    high, low = keys.split_ids(np.array(ids, np.uint64))
    key = keys.stream_key(seed, stream, index)
    return keys.sample_keys(key, high, low, jnp.arange(samples, dtype=jnp.uint32))


def test_ids_are_split_without_loss():
    ids = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    high, low = keys.split_ids(np.array(ids, np.uint64))
    assert (high.dtype, low.dtype) == (np.uint32, np.uint32)
    assert [(int(h) << 32) + int(lo) for h, lo in zip(high, low, strict=True)] == ids


def test_numbers_that_agree_in_their_low_half_have_different_keys():
    """`fold_in` alone would cut 2**32 to 0."""
    seeds = [0, 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    assert len({bits(keys.stream_key(seed, Stream.GROW)) for seed in seeds}) == len(seeds)
    ids = [0, 1, 2**32, 2**32 + 1, 2**40, 2**64 - 1]
    assert len({bits(key) for key in keys_of(ids, 1)[:, 0]}) == len(ids)


def test_streams_rounds_examples_samples_and_positions_all_differ():
    addresses = [keys.stream_key(7, stream, index) for stream in Stream for index in range(3)]
    grid = keys_of(list(range(20)), 5)
    assert grid.shape == (20, 5)
    found = {bits(key) for key in (*addresses, *grid.reshape(-1))}
    assert len(found) == len(addresses) + 100
    draws = np.stack([keys.position_uniforms(grid, jnp.int32(position)) for position in range(6)])
    assert len(np.unique(draws)) == draws.size


def test_a_sample_is_the_same_whatever_is_asked_for_beside_it():
    few, many = keys_of([5, 10**12], 8), keys_of([99, 10**12, 5], 64)
    np.testing.assert_array_equal(
        jax.random.key_data(few)[:, 7], jax.random.key_data(many)[np.array([2, 1]), 7]
    )
    np.testing.assert_array_equal(
        keys.position_uniforms(few, jnp.int32(3)),
        keys.position_uniforms(many, jnp.int32(3))[np.array([2, 1]), :8],
    )


def test_keys_are_the_same_inside_and_outside_jit():
    ids = np.arange(4, dtype=np.uint32)
    key = keys.stream_key(3, Stream.EVALUATE)
    compiled = jax.jit(keys.sample_keys)(key, ids, ids, ids)
    np.testing.assert_array_equal(
        jax.random.key_data(compiled), jax.random.key_data(keys.sample_keys(key, ids, ids, ids))
    )


def test_uniforms_are_uniform_in_the_half_open_interval():
    draws = np.asarray(keys.position_uniforms(keys_of(list(range(500)), 20), jnp.int32(2)))
    assert draws.dtype == np.float32 and draws.shape == (500, 20)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    count = draws.size
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * count)
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    # Chi-square with 19 degrees of freedom: above 43.8 once in a thousand.
    assert ((counts - count / 20) ** 2 / (count / 20)).sum() < 43.8


def test_neighbours_are_uncorrelated():
    draws = np.asarray(keys.position_uniforms(keys_of(list(range(2000)), 2), jnp.int32(0)))
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.1
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.1


def test_the_numbers_are_pinned():
    """They are part of every dataset's identity: another value here makes every stored run another run."""
    assert {stream.name: int(stream) for stream in Stream} == {
        "INIT": 0, "DROPOUT": 1, "GROW": 2, "EVALUATE": 3, "RATE": 4, "TRANSLATE": 5, "VALIDATE": 6,
        "SAMPLE": 7, "PPO": 8,
    }  # fmt: skip
    draws = np.asarray(keys.position_uniforms(keys_of([0, 2**40], 2, seed=2308), jnp.int32(1)))
    np.testing.assert_array_equal(draws * 2**23, [[4323178, 8196154], [1349720, 3184856]])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_number_that_is_no_address_is_refused(seed):
    with pytest.raises(ValueError, match="not an unsigned 64-bit number"):
        keys.stream_key(seed, Stream.GROW)


def test_an_address_hash_is_split_mix_64():
    """Its finaliser against the published outputs for seed 0 and 1234567, and against plain integers."""
    zero = keys.address_hash(0, np.zeros(1, np.int64))
    mask = 2**64 - 1

    def mixed(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    assert mixed(0) == 0xE220A8397B1DCDAF
    assert mixed(1234567) == 6457827717110365317
    assert zero.tolist() == [mixed(mixed(0))]
    found = keys.address_hash(2**63 + 5, np.array([1, -1]), np.array([2**62, 3], np.int64))
    wanted = [
        mixed(mixed(mixed(2**63 + 5) ^ 1) ^ 2**62), mixed(mixed(mixed(2**63 + 5) ^ mask) ^ 3),
    ]  # fmt: skip
    assert found.dtype == np.uint64
    assert found.tolist() == wanted
    # A part of its own for each place: (1, 2) is another address than (2, 1), in any integer type.
    one, two = np.array([1], np.int32), np.array([2], np.int32)
    assert keys.address_hash(0, one, two) != keys.address_hash(0, two, one)
    assert keys.address_hash(0, one, two) == keys.address_hash(0, one.astype(np.int64), two.astype(np.uint8))
