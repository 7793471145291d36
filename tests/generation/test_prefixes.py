"""Samples that share prefixes are those of a sampler that shares nothing, with no prefix computed twice."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.generation.contract import transformer_decoder, transformer_prefixes
from rest_jax.generation.prefixes import Queue, Tiling, memory_lengths, pool_places, sample
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.types import PAD_ID
from tests.generation.naive import naive_sample
from tests.generation.small import SMALL, padded, random_sources, small_params
from tests.generation.tabular import keys_for, make_table, source_rows, tabular_prefixes

ALLOWED = 22
SOURCES = padded(random_sources(11, 8, seed=1), 8)
KEYS = keys_for(list(range(100, 111)), range(7))
LONG = SamplingConfig(temperature=0.5, max_length=40)
CONFIGS = {
    "short": SamplingConfig(temperature=1.0, max_length=6),
    "long": LONG,
    "truncated": SamplingConfig(temperature=0.9, top_k=9, top_p=0.8, max_length=20),
}
# Everything at once; a tile of one row, and one lane; tiles of both sizes, with a queue in parts.
TILINGS = [Tiling(256, 32, 32), Tiling(1, 1, 1), Tiling(64, 5, 3)]


@functools.partial(jax.jit, static_argnames=("config", "tiling"))
def draw(params, keys_QxN, config, tiling):
    return sample(
        transformer_prefixes(SMALL), params, Queue(SOURCES, keys_QxN), config,
        tiling=tiling, allowed_vocab_size=ALLOWED,
    )[0]  # fmt: skip


@functools.cache
def naive(name):
    program = functools.partial(
        naive_sample, transformer_decoder(SMALL), config=CONFIGS[name], allowed_vocab_size=ALLOWED
    )
    return jax.jit(lambda params: program(params, SOURCES, KEYS))(small_params())


def distinct_prefixes(tokens_QxNxT) -> int:
    """How many different beginnings there are that some sample of a source went on from."""
    found = set()
    for source, samples in enumerate(np.asarray(tokens_QxNxT).tolist()):
        for tokens in samples:
            length = sum(token != PAD_ID for token in tokens)
            found.update((source, *tokens[:t]) for t in range(length))
    return len(found)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_sample_for_sample_it_is_the_naive_sampler(name, tiling):
    expected, found = naive(name), draw(small_params(), KEYS, CONFIGS[name], tiling)
    np.testing.assert_array_equal(found.tokens_SxNxT, expected.tokens_SxNxT)
    np.testing.assert_array_equal(found.finished_SxN, expected.finished_SxN)
    for field in ("log_probs_SxNxT", "tempered_log_probs_SxNxT", "scores_SxN"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), atol=2e-5)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_each_distinct_prefix_is_computed_once(tiling):
    found = draw(small_params(), KEYS, LONG, tiling)
    distinct = distinct_prefixes(found.tokens_SxNxT)
    assert found.rows_computed_D.tolist() == [distinct]
    assert distinct < int((found.tokens_SxNxT != PAD_ID).sum())


def test_the_bits_do_not_depend_on_the_company():
    """Of tiles of one size: the order of the queue, how many samples there are, how many lanes."""
    whole = draw(small_params(), KEYS, LONG, Tiling(32, 11, 11))
    few = draw(small_params(), KEYS[:, :3], LONG, Tiling(32, 4, 11))
    np.testing.assert_array_equal(few.tokens_SxNxT, whole.tokens_SxNxT[:, :3])
    np.testing.assert_array_equal(few.log_probs_SxNxT, whole.log_probs_SxNxT[:, :3])


def test_tiles_are_full_as_long_as_the_queue_lasts():
    """40 sources of 16 samples that share little: the steps are hardly more than the rows need."""
    steps: list[int] = []
    fns = tabular_prefixes()

    def counting(params, rows, pool, sources):
        jax.debug.callback(lambda _: steps.append(1), rows.positions_R)
        return fns.step(params, rows, pool, sources)

    table = make_table(1, 30, seed=2, scale=0.5)
    tiling = Tiling(rows=16, lanes=6, sources=8)
    found, _ = sample(
        fns._replace(step=counting), table,
        Queue(source_rows([0] * 40), keys_for(list(range(40)), range(16))),
        SamplingConfig(temperature=1.0, max_length=12), tiling=tiling,
    )  # fmt: skip
    jax.effects_barrier()
    rows = int(found.rows_computed_D[0])
    assert rows > 3000
    assert rows / 16 <= len(steps) <= 1.05 * rows / 16


def test_bfloat16_draws_from_float32_sums():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    program = functools.partial(
        sample, transformer_prefixes(config), config=LONG, tiling=Tiling(64, 5, 3), allowed_vocab_size=ALLOWED
    )
    found, _ = jax.jit(lambda params: program(params, Queue(SOURCES, KEYS)))(small_params())
    assert found.log_probs_SxNxT.dtype == jnp.float32
    assert found.rows_computed_D.tolist() == [distinct_prefixes(found.tokens_SxNxT)]
    assert not np.array_equal(found.tokens_SxNxT, naive("long").tokens_SxNxT)


def test_what_an_earlier_call_left_in_the_pool_does_not_matter():
    fns, tiling = transformer_prefixes(SMALL), Tiling(64, 5, 3)
    program = jax.jit(functools.partial(sample, fns, config=LONG, tiling=tiling, allowed_vocab_size=ALLOWED))
    fresh, pool = program(small_params(), Queue(SOURCES, KEYS))
    places = pool_places(tiling, *KEYS.shape, LONG.max_length)
    assert {len(leaf) for leaf in jax.tree.leaves(pool)} == {places}
    # Keys of another call, some of them far beyond what a network makes.
    stale = jax.tree.map(lambda leaf: 1e6 * jax.random.normal(jax.random.key(1), leaf.shape), pool)
    again, _ = program(small_params(), Queue(SOURCES, KEYS), pool=stale)
    jax.tree.map(np.testing.assert_array_equal, again, fresh)


def test_memories_grow_up_to_the_longest_translation():
    assert memory_lengths(6) == (6,)
    assert memory_lengths(16) == (16,)
    assert memory_lengths(40) == (16, 40)
    assert memory_lengths(128) == (16, 64, 128)
