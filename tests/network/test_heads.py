from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.network.heads import RewardModel, ValueModel, summarise
from rest_jax.network.init import abstract_value_params, init_value_params
from rest_jax.network.mesh import unbox
from rest_jax.network.transformer import Transformer
from tests.network.tiny import SHALLOW, params_of, reward_params_of, rows, score_logits

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _pairs():
    return rows([7, 4, 9], 9, seed=1), rows([5, 8, 3], 8, seed=2, shifted=True)


def test_one_float32_score_a_pair():
    scores = score_logits(SHALLOW, reward_params_of(SHALLOW), *_pairs())
    assert scores.shape == (3,)
    assert scores.dtype == np.float32
    assert len(set(scores.tolist())) == 3


def test_a_pair_alone_equals_the_pair_padded_longer_in_a_batch():
    sources, targets = _pairs()
    batch = score_logits(
        SHALLOW,
        reward_params_of(SHALLOW),
        np.pad(sources, ((0, 0), (0, 6))),
        np.pad(targets, ((0, 0), (0, 3))),
    )
    for row in (0, 2):
        source, target = sources[row], targets[row]
        alone = score_logits(
            SHALLOW,
            reward_params_of(SHALLOW),
            source[None, source != 0],
            target[None, : (target != 0).sum() + 1],
        )
        np.testing.assert_allclose(alone[0], batch[row], atol=2e-5)


def test_the_start_symbol_counts_although_it_looks_like_padding():
    hidden = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    targets = np.array([[0, 5, 1, 0], [0, 0, 0, 0]])
    summary = np.asarray(summarise(jnp.asarray(hidden), jnp.asarray(targets)))
    np.testing.assert_allclose(summary[0], np.concatenate([hidden[0, :3].mean(0), hidden[0, 2]]), rtol=1e-6)
    np.testing.assert_allclose(summary[1], np.concatenate([hidden[1, 0], hidden[1, 0]]), rtol=1e-6)


def test_the_score_is_the_head_over_the_policy_s_hidden_states():
    """The trunk of a policy inside a reward model computes what it computes in the policy."""
    sources, targets = _pairs()
    policy, reward = params_of(SHALLOW), reward_params_of(SHALLOW)
    params = {**policy, "score_head": reward["score_head"]}
    policy_model = Transformer(SHALLOW)
    encoded = policy_model.apply({"params": policy}, sources, method="encode")
    hidden = policy_model.apply({"params": policy}, encoded, sources, targets, method="decode_hidden")
    summary = np.asarray(summarise(hidden, jnp.asarray(targets)), np.float64)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), reward["score_head"])
    pre = summary @ head["hidden"]["kernel"]
    gelu = 0.5 * pre * (1 + np.tanh(np.sqrt(2 / np.pi) * (pre + 0.044715 * pre**3)))
    expected = (gelu @ head["output"]["kernel"] + head["output"]["bias"])[:, 0]
    np.testing.assert_allclose(score_logits(SHALLOW, params, sources, targets), expected, atol=1e-5)


def test_fully_padded_pairs_give_finite_scores_and_gradients():
    sources, targets = (np.concatenate([x, np.zeros_like(x[:1])]) for x in _pairs())

    def loss(params):
        return jnp.square(RewardModel(SHALLOW).apply({"params": params}, sources, targets)).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(reward_params_of(SHALLOW))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["encoder"]["layers_0"]["mlp"]["wo"]["kernel"]).sum() > 0


def test_bfloat16_gives_float32_scores_near_those_of_float32():
    exact = score_logits(SHALLOW, reward_params_of(SHALLOW), *_pairs())
    coarse = score_logits(
        dataclasses.replace(SHALLOW, dtype="bfloat16"), reward_params_of(SHALLOW), *_pairs()
    )
    assert coarse.dtype == np.float32
    np.testing.assert_allclose(coarse, exact, atol=0.1)
    assert (coarse != exact).any()


def test_a_value_sees_the_tokens_before_it_and_no_later_one():
    sources, targets = _pairs()
    params = init_value_params(SHALLOW, jax.random.key(1), params_of(SHALLOW))
    model = ValueModel(SHALLOW)
    values_BxT = np.asarray(model.apply({"params": params}, sources, targets))
    assert values_BxT.shape == targets.shape
    assert values_BxT.dtype == np.float32
    changed = targets.copy()
    changed[:, 3] = 11
    moved = np.asarray(model.apply({"params": params}, sources, changed)) != values_BxT
    assert not moved[:, :3].any()
    assert moved[:, 3].all()


def test_a_value_function_starts_from_the_trunk_of_a_policy():
    policy = params_of(SHALLOW)
    params = init_value_params(SHALLOW, jax.random.key(1), policy)
    assert set(params) == {"token_embedder", "encoder", "decoder", "score_head"}
    assert "logits_dense" not in params["decoder"]
    np.testing.assert_array_equal(
        params["token_embedder"]["embedding"], policy["token_embedder"]["embedding"]
    )
    shapes = jax.tree.map(np.shape, params)
    assert jax.tree.map(np.shape, unbox(abstract_value_params(SHALLOW))) == shapes
