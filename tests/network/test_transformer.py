from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.network.layers import dropout
from rest_jax.network.transformer import Transformer, kernels_as_read
from tests.network.tiny import SHALLOW, TIED, TINY, params_of, policy_logits, rows

CLOSE = {"atol": 2e-5, "rtol": 0}


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_a_row_alone_equals_the_row_padded_longer_in_a_batch(config):
    source, target = rows([7], 7, seed=1), rows([5], 5, seed=2, shifted=True)
    alone = policy_logits(config, params_of(config), source, target)

    more_sources, more_targets = rows([3, 12], 15, seed=3), rows([9, 2], 11, seed=4, shifted=True)
    sources = np.concatenate([more_sources, np.pad(source, ((0, 0), (0, 8)))])
    targets = np.concatenate([more_targets, np.pad(target, ((0, 0), (0, 6)))])
    together = policy_logits(config, params_of(config), sources, targets)
    np.testing.assert_allclose(together[2, :5], alone[0], **CLOSE)
    assert np.abs(together[1, :5] - alone[0]).max() > 0.1


def test_two_pairs_packed_into_a_row_equal_each_alone():
    sources = [rows([6], 6, seed=1), rows([4], 4, seed=2)]
    targets = [rows([3], 3, seed=3, shifted=True), rows([5], 5, seed=4, shifted=True)]
    params = params_of(TINY)
    packed = policy_logits(
        TINY,
        params,
        np.pad(np.concatenate(sources, axis=1), ((0, 0), (0, 2))),
        np.pad(np.concatenate(targets, axis=1), ((0, 0), (0, 1))),
        encoder_segment_ids=np.array([[1] * 6 + [2] * 4 + [0] * 2], np.int32),
        decoder_segment_ids=np.array([[1] * 3 + [2] * 5 + [0]], np.int32),
    )
    first = policy_logits(TINY, params, sources[0], targets[0])
    second = policy_logits(TINY, params, sources[1], targets[1])
    np.testing.assert_allclose(packed[:, :3], first, **CLOSE)
    np.testing.assert_allclose(packed[:, 3:8], second, **CLOSE)
    assert np.isfinite(packed).all()


def test_packed_rows_need_the_segments_of_both_sides():
    source, target = rows([6], 6, seed=1), rows([3], 3, seed=3, shifted=True)
    with pytest.raises(ValueError, match="both"):
        policy_logits(TINY, params_of(TINY), source, target, encoder_segment_ids=np.ones_like(source))


def test_no_position_depends_on_a_later_one():
    """By the gradient of each position's output with respect to every position's input."""
    params, source, target = params_of(SHALLOW), rows([5], 5, seed=1), rows([6], 6, seed=2, shifted=True)
    model = Transformer(SHALLOW)

    def outputs(embedded, encoded):
        mask = jnp.tril(jnp.ones((6, 6), bool))[None, None]
        seen = jnp.ones((1, 1, 1, 5), bool)
        decode = lambda m, x, e: m.decoder(x, e, mask, seen, True)  # noqa: E731
        return model.apply({"params": params}, embedded, encoded, method=decode).sum((0, 2))

    encoded = model.apply({"params": params}, source, method="encode")
    embedded = params["token_embedder"]["embedding"][target]
    through_the_whole = model.apply({"params": params}, encoded, source, target, method="decode_hidden").sum(
        (0, 2)
    )
    np.testing.assert_allclose(outputs(embedded, encoded), through_the_whole, atol=1e-5)
    to_inputs, to_source = jax.jit(jax.jacobian(outputs, argnums=(0, 1)))(embedded, encoded)
    sensitivity = np.abs(to_inputs).sum((1, 3))
    assert not sensitivity[np.triu_indices(6, 1)].any()
    assert (sensitivity[np.tril_indices(6)] > 0).all()
    assert (np.abs(to_source).sum((1, 3)) > 0).all()


def test_the_encoder_sees_both_ways_but_no_padding():
    params, source = params_of(SHALLOW), rows([4], 6, seed=1)
    model = Transformer(SHALLOW)

    def encoded(table):
        # Six rows of a table, so that padding, which has one id, has an input of its own at each position.
        mask = (source != 0)[:, None, None, :]
        encode = lambda m, x: m.encoder(x, mask, True)  # noqa: E731
        return model.apply({"params": params}, table[None], method=encode).sum((0, 2))

    sensitivity = np.abs(
        jax.jit(jax.jacobian(encoded))(params["token_embedder"]["embedding"][source[0]])
    ).sum(2)
    assert (sensitivity[:4, :4] > 0).all()
    assert not sensitivity[:4, 4:].any()


def test_a_fully_padded_row_gives_finite_numbers_and_gradients():
    params = params_of(SHALLOW)
    source = np.stack([np.zeros(5, np.int32), rows([5], 5, seed=1)[0]])
    target = np.stack([np.zeros(4, np.int32), rows([4], 4, seed=2, shifted=True)[0]])

    @jax.jit
    def loss(params, segments):
        logits = Transformer(SHALLOW).apply({"params": params}, source, target, **segments)
        return jnp.square(jax.nn.log_softmax(logits)).sum()

    for segments in (
        {},
        {"encoder_segment_ids": (source != 0) * 1, "decoder_segment_ids": np.array([[0] * 4, [1] * 4])},
    ):
        value, gradients = jax.value_and_grad(loss)(params, segments)
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_bfloat16_gives_float32_logits_near_those_of_float32(config):
    source, target = rows([7, 9], 9, seed=1), rows([5, 3], 5, seed=2, shifted=True)
    exact = policy_logits(config, params_of(config), source, target)
    coarse = policy_logits(dataclasses.replace(config, dtype="bfloat16"), params_of(config), source, target)
    assert exact.dtype == coarse.dtype == np.float32
    difference = np.abs(coarse - exact)[:, :3].max()
    assert 0 < difference < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_kernels_as_they_are_read_give_the_same_bits(config):
    source, target = rows([7, 9], 9, seed=1), rows([5, 3], 5, seed=2, shifted=True)
    config = dataclasses.replace(config, dtype="bfloat16")
    given = params_of(config)
    read = kernels_as_read(config, given)
    np.testing.assert_array_equal(
        policy_logits(config, read, source, target), policy_logits(config, given, source, target)
    )
    layer = read["decoder"]["layers_0"]
    assert layer["mlp"]["wo"]["kernel"].dtype == jnp.bfloat16
    head = read["decoder"].get("logits_dense", {})
    others = [read["token_embedder"], head, layer["pre_mlp_layer_norm"]]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(others)} == {"float32"}


def test_a_tied_head_divides_by_the_root_of_the_width():
    params, model = params_of(TIED), Transformer(TIED)
    hidden = np.random.default_rng(0).normal(size=(3, TIED.emb_dim)).astype(np.float32)
    logits = model.apply({"params": params}, hidden, method="logits")
    expected = hidden @ np.asarray(params["token_embedder"]["embedding"]).T / 4.0
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(config, params, key):
    source, target = rows([7, 9], 9, seed=1), rows([5, 3], 5, seed=2, shifted=True)

    def loss(params):
        rngs = {} if key is None else {"dropout": key}
        logits = Transformer(config).apply(
            {"params": params}, source, target, deterministic=key is None, rngs=rngs
        )
        return jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    return jax.value_and_grad(loss)(params)


def _loss_and_gradients(config, key):
    return _gradients(config, params_of(SHALLOW), key)


@pytest.mark.parametrize("key", [None, 3], ids=["without dropout", "with dropout"])
def test_remat_changes_nothing_but_memory(key):
    key = None if key is None else jax.random.key(key)
    value, gradients = _loss_and_gradients(SHALLOW, key)
    again, same_gradients = _loss_and_gradients(dataclasses.replace(SHALLOW, remat="full"), key)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(same_gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_remat_recomputes_each_layer_once():
    def loss(params, config):
        source, target = rows([5], 5, seed=1), rows([4], 4, seed=2, shifted=True)
        return Transformer(config).apply({"params": params}, source, target).sum()

    full = str(
        jax.make_jaxpr(jax.grad(loss), static_argnums=1)(
            params_of(SHALLOW), dataclasses.replace(SHALLOW, remat="full")
        )
    )
    none = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params_of(SHALLOW), SHALLOW))
    assert full.count("prevent_cse") == SHALLOW.num_encoder_layers + SHALLOW.num_decoder_layers
    assert "prevent_cse" not in none


def test_dropout_is_a_function_of_its_key():
    value, _ = _loss_and_gradients(SHALLOW, jax.random.key(1))
    again, _ = _loss_and_gradients(SHALLOW, jax.random.key(1))
    other, _ = _loss_and_gradients(SHALLOW, jax.random.key(2))
    assert value == again != other


def test_the_embedding_is_dropped_for_all_positions_of_a_row_at_once():
    x = jnp.ones((3, 7, 50))
    dropped = np.asarray(dropout(0.5).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(0)}))
    assert (dropped == dropped[:, :1]).all()
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert not (dropped[0] == dropped[1]).all()
