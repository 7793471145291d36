from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from rest_jax.errors import ConfigError
from rest_jax.network.config import T5Config
from rest_jax.network.init import (
    abstract_params,
    abstract_reward_params,
    count_params,
    init_params,
    init_reward_params,
)
from tests.network.tiny import TIED, TINY, params_of

E, HD, H, F, V = TINY.emb_dim, TINY.joined_kv_dim, TINY.num_heads, TINY.mlp_dim, TINY.vocab_size
INWARDS, OUTWARDS = ("embed", "joined_kv"), ("joined_kv", "embed")


def _attention(prefix):
    inwards = {f"{prefix}/{name}/kernel": ((E, HD), INWARDS) for name in ("query", "key", "value")}
    return {**inwards, f"{prefix}/out/kernel": ((HD, E), OUTWARDS)}


def _mlp(prefix):
    return {
        f"{prefix}/wi_0/kernel": ((E, F), ("embed", "mlp")),
        f"{prefix}/wi_1/kernel": ((E, F), ("embed", "mlp")),
        f"{prefix}/wo/kernel": ((F, E), ("mlp", "embed")),
    }


def _norm(name):
    return {f"{name}/scale": ((E,), ("embed",))}


def t5x_tree(tied: bool = False) -> dict:
    """Name -> (shape, logical axes) of `t5x.examples.t5.network` with two layers a side, written out."""
    tree = {"token_embedder/embedding": ((V, E), ("vocab", "embed"))}
    for side in ("encoder", "decoder"):
        tree[f"{side}/relpos_bias/rel_embedding"] = ((H, 32), ("heads", "relpos_buckets"))
        tree.update(_norm(f"{side}/{side}_norm"))
        for i in range(2):
            tree.update(_mlp(f"{side}/layers_{i}/mlp"))
            tree.update(_norm(f"{side}/layers_{i}/pre_mlp_layer_norm"))
    for i in range(2):
        tree.update(_attention(f"encoder/layers_{i}/attention"))
        tree.update(_norm(f"encoder/layers_{i}/pre_attention_layer_norm"))
        tree.update(_attention(f"decoder/layers_{i}/self_attention"))
        tree.update(_norm(f"decoder/layers_{i}/pre_self_attention_layer_norm"))
        tree.update(_attention(f"decoder/layers_{i}/encoder_decoder_attention"))
        tree.update(_norm(f"decoder/layers_{i}/pre_cross_attention_layer_norm"))
    if not tied:
        tree["decoder/logits_dense/kernel"] = ((E, V), ("embed", "vocab"))
    return tree


def _boxed_leaves(boxed):
    leaves = jax.tree_util.tree_leaves_with_path(
        boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.value.shape, leaf.names)
        for path, leaf in leaves
    }


def flat(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("config", [TINY, TIED], ids=["untied", "tied"])
def test_the_tree_is_t5x_s(config):
    expected = t5x_tree(config.logits_via_embedding)
    assert _boxed_leaves(abstract_params(config)) == expected
    params = flat(init_params(config, jax.random.key(0)))
    assert {name: leaf.shape for name, leaf in params.items()} == {
        name: s for name, (s, _) in expected.items()
    }
    assert {leaf.dtype for leaf in params.values()} == {np.dtype("float32")}


def test_a_plain_mlp_has_one_input_kernel():
    names = _boxed_leaves(abstract_params(dataclasses.replace(TINY, mlp_activations=("relu",))))
    assert "encoder/layers_0/mlp/wi/kernel" in names
    assert "encoder/layers_0/mlp/wi_0/kernel" not in names


def test_parameters_stay_float32_and_do_not_depend_on_numerics():
    reference = flat(init_params(TINY, jax.random.key(0)))
    other = flat(init_params(dataclasses.replace(TINY, dtype="bfloat16", remat="full"), jax.random.key(0)))
    assert reference.keys() == other.keys()
    for name, leaf in reference.items():
        np.testing.assert_array_equal(leaf, other[name])


def test_weights_are_a_function_of_the_key_and_their_name():
    first, again = flat(init_params(TINY, jax.random.key(7))), flat(init_params(TINY, jax.random.key(7)))
    other = flat(init_params(TINY, jax.random.key(8)))
    deeper = flat(init_params(dataclasses.replace(TINY, num_encoder_layers=3), jax.random.key(7)))
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[name])
        np.testing.assert_array_equal(leaf, deeper[name])
        if not name.endswith("scale"):
            assert (leaf != other[name]).all()
    assert not np.array_equal(
        first["encoder/layers_0/mlp/wo/kernel"], first["encoder/layers_1/mlp/wo/kernel"]
    )


def test_initial_spreads_are_t5x_s():
    config = T5Config(
        vocab_size=600,
        emb_dim=96,
        num_heads=4,
        head_dim=36,
        mlp_dim=200,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    params = flat(init_params(config, jax.random.key(0)))

    def spread(name, std):
        leaf = params[name]
        assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size), name
        assert leaf.std() == pytest.approx(std, rel=5 / math.sqrt(leaf.size)), name
        return np.abs(leaf).max() / std

    for attention in ("encoder/layers_0/attention", "decoder/layers_0/self_attention"):
        # No 1/sqrt(D) on the logits: it is in the query.
        assert spread(f"{attention}/query/kernel", 1 / math.sqrt(96 * 36)) > 3
        assert spread(f"{attention}/key/kernel", 1 / math.sqrt(96)) > 3
        assert spread(f"{attention}/out/kernel", 1 / math.sqrt(4 * 36)) > 3
    cut = 2 / 0.87962566103423978  # truncated at two standard deviations, then scaled back to the variance
    assert spread("decoder/layers_0/mlp/wi_0/kernel", 1 / math.sqrt(96)) <= cut + 1e-5
    assert spread("decoder/layers_0/mlp/wo/kernel", 1 / math.sqrt(200)) <= cut + 1e-5
    assert spread("decoder/logits_dense/kernel", 1 / math.sqrt(96)) <= cut + 1e-5
    assert spread("token_embedder/embedding", 1.0) > 3
    bias = params["encoder/relpos_bias/rel_embedding"]
    limit = math.sqrt(3 / ((4 + 32) / 2))
    assert 0.9 * limit < np.abs(bias).max() <= limit
    assert (params["decoder/decoder_norm/scale"] == 1).all()


def test_the_reward_model_has_the_trunk_and_a_head():
    trunk = t5x_tree(tied=True)
    reward = _boxed_leaves(abstract_reward_params(TINY))
    assert {name: reward.pop(name) for name in trunk} == trunk
    assert reward == {
        "score_head/hidden/kernel": ((2 * E, E), ("embed", "mlp")),
        "score_head/output/kernel": ((E, 1), ("mlp", "score")),
        "score_head/output/bias": ((1,), ("score",)),
    }


def test_a_reward_model_starts_from_a_policy_s_trunk():
    policy = params_of(TINY, seed=3)
    reward = flat(init_reward_params(TINY, jax.random.key(1), policy))
    fresh = flat(init_reward_params(TINY, jax.random.key(1)))
    trunk = flat(policy)
    del trunk["decoder/logits_dense/kernel"]
    assert reward.keys() == fresh.keys()
    for name, leaf in reward.items():
        np.testing.assert_array_equal(leaf, trunk.get(name, fresh[name]))
    assert "decoder/logits_dense/kernel" not in reward
    assert "logits_dense" in policy["decoder"]


def test_a_policy_of_another_size_is_refused_by_name():
    wider = dataclasses.replace(TINY, mlp_dim=TINY.mlp_dim + 1)
    with pytest.raises(ConfigError, match=r"decoder/layers_0/mlp/wi_0/kernel is \(16, 24\) in the policy"):
        init_reward_params(wider, jax.random.key(0), params_of(TINY))
    with pytest.raises(ConfigError, match="layers_2.* missing in the policy"):
        init_reward_params(
            dataclasses.replace(TINY, num_encoder_layers=3), jax.random.key(0), params_of(TINY)
        )


def test_the_published_size_of_t5_1_1_small():
    # 512-wide, 6 heads of 64, 8 layers a side, F = 1024: 76,961,152 parameters as published.
    small = T5Config(num_heads=6, num_encoder_layers=8, num_decoder_layers=8)
    assert count_params(abstract_params(small)) == 76_961_152
