from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.network.decoding import empty_cache
from rest_jax.network.transformer import Transformer
from tests.network.tiny import TIED, TINY, params_of, policy_logits, rows

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.partial(jax.jit, static_argnums=0)
def _start(config, params, source):
    return Transformer(config).apply({"params": params}, source, method="start_decoding")


@functools.partial(jax.jit, static_argnums=0)
def _step(config, params, tokens, position, cache, source):
    return Transformer(config).apply(
        {"params": params}, tokens, position, cache, source, method="decode_step"
    )


def _decode(config, params, source, inputs_SxNxT):
    """Logits [S, N, T, V] of feeding the inputs one position at a time."""
    sources, samples, length = inputs_SxNxT.shape
    cache, encoded = empty_cache(config, sources, samples, length), _start(config, params, source)
    logits = []
    for t in range(length):
        step, cache = _step(config, params, inputs_SxNxT[:, :, t], jnp.int32(t), cache, encoded)
        logits.append(step)
    return np.stack(logits, axis=2)


def _inputs(sources, samples, length, seed=5):
    return rows([length] * sources * samples, length, seed, shifted=True).reshape(sources, samples, length)


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_step_by_step_equals_teacher_forcing(config):
    source, inputs = rows([8, 3, 5], 8, seed=1), _inputs(3, 4, 20)
    cached = _decode(config, params_of(config), source, inputs)
    whole = policy_logits(config, params_of(config), np.repeat(source, 4, axis=0), inputs.reshape(12, 20))
    np.testing.assert_allclose(cached.reshape(12, 20, -1), whole, atol=2e-5)


def test_samples_that_share_a_source_equal_sources_tiled():
    source, inputs = rows([8, 3], 8, seed=1), _inputs(2, 3, 6)
    shared = _decode(TINY, params_of(TINY), source, inputs)
    tiled = _decode(TINY, params_of(TINY), np.repeat(source, 3, axis=0), inputs.reshape(6, 1, 6))
    np.testing.assert_allclose(shared.reshape(6, 6, -1), tiled[:, 0], atol=2e-5)


def test_a_source_is_held_once_however_many_samples_there_are():
    source = rows([8, 3], 8, seed=1)
    encoded = _start(TINY, params_of(TINY), source)
    assert [leaf.shape for leaf in encoded.keys + encoded.values] == [(2, 2, 8, 6)] * 4
    np.testing.assert_array_equal(encoded.mask, source != 0)
    step = jax.make_jaxpr(functools.partial(_step, TINY))
    cache = empty_cache(TINY, 2, 5, 4)
    text = str(step(params_of(TINY), jnp.zeros((2, 5), jnp.int32), jnp.int32(0), cache, encoded))
    for tiled in ("[2,5,2,8,6]", "[10,2,8,6]", "[2,5,8,2,6]", "[10,8,2,6]"):
        assert tiled not in text


def test_padding_of_the_source_and_room_in_the_cache_change_nothing():
    source, inputs = rows([5], 5, seed=1), _inputs(1, 2, 6)
    exact = _decode(TINY, params_of(TINY), source, inputs)
    roomy = np.zeros((1, 2, 13), np.int32)
    roomy[:, :, :6] = inputs
    padded = _decode(TINY, params_of(TINY), np.pad(source, ((0, 0), (0, 9))), roomy)
    np.testing.assert_allclose(padded[:, :, :6], exact, atol=2e-5)


def test_a_source_that_is_all_padding_gives_finite_logits():
    source = np.concatenate([np.zeros((1, 5), np.int32), rows([5], 5, seed=1)])
    assert np.isfinite(_decode(TINY, params_of(TINY), source, _inputs(2, 2, 3))).all()


def test_reordered_samples_go_on_from_their_parents():
    source, inputs = rows([8, 3], 8, seed=1), _inputs(2, 3, 6)
    parents = np.array([[2, 0, 0], [1, 1, 2]])
    params, encoded = params_of(TINY), _start(TINY, params_of(TINY), source)
    cache = empty_cache(TINY, 2, 3, 6)
    for t in range(3):
        _, cache = _step(TINY, params, inputs[:, :, t], jnp.int32(t), cache, encoded)
    logits, _ = _step(
        TINY, params, inputs[:, :, 3], jnp.int32(3), cache.reorder(jnp.asarray(parents)), encoded
    )
    grafted = np.concatenate(
        [np.take_along_axis(inputs[:, :, :3], parents[:, :, None], 1), inputs[:, :, 3:4]], 2
    )
    np.testing.assert_allclose(logits, _decode(TINY, params, source, grafted)[:, :, 3], atol=2e-5)


def test_bfloat16_keeps_the_cache_small_and_the_logits_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    source, inputs = rows([8, 3], 8, seed=1), _inputs(2, 2, 5)
    assert empty_cache(config, 2, 2, 5).keys[0].dtype == jnp.bfloat16
    coarse = _decode(config, params_of(TINY), source, inputs)
    assert coarse.dtype == np.float32
    exact = _decode(TINY, params_of(TINY), source, inputs)
    assert 0 < np.abs(coarse - exact).max() < 0.1 * np.abs(exact).max()


def test_the_cache_can_be_donated():
    source = rows([8, 3], 8, seed=1)
    encoded = _start(TINY, params_of(TINY), source)

    def step(params, tokens, position, cache, source):
        return _step(TINY, params, tokens, position, cache, source)

    donating = jax.jit(step, donate_argnums=3)
    logits, cache = donating(
        params_of(TINY), jnp.zeros((2, 2), jnp.int32), jnp.int32(0), empty_cache(TINY, 2, 2, 4), encoded
    )
    assert logits.shape == (2, 2, TINY.vocab_size)
    assert np.abs(cache.keys[0][:, :, :, 0]).sum() > 0
    assert not np.asarray(cache.keys[0][:, :, :, 1:]).any()
