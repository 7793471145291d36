from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from rest_jax.errors import ConfigError
from rest_jax.network.config import T5Config


def test_defaults_are_t5_1_1_small_but_for_the_layers():
    config = T5Config()
    assert (config.vocab_size, config.emb_dim, config.head_dim, config.mlp_dim) == (32128, 512, 64, 1024)
    assert config.mlp_activations == ("gelu", "linear")
    assert not config.logits_via_embedding


def test_is_hashable_even_when_lists_are_given():
    config = T5Config(mlp_activations=["relu"])
    assert config.mlp_activations == ("relu",)
    assert hash(config) == hash(T5Config(mlp_activations=("relu",)))


def test_derived_numbers():
    config = T5Config(emb_dim=64, num_heads=3, head_dim=5, dtype="bfloat16")
    assert config.joined_kv_dim == 15
    assert config.logits_scale == 1 / 8
    assert config.activation_dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("num_heads", -1),
        ("num_decoder_layers", 0),
        ("mlp_activations", ()),
        ("mlp_activations", ("tanh",)),
        ("dropout_rate", 1.0),
        ("dropout_rate", -0.1),
        ("dtype", "float16"),
        ("remat", "minimal"),
        ("relpos_num_buckets", 30),
        ("relpos_max_distance", 16),
    ],
)
def test_refuses_what_makes_no_network_and_names_it(field, value):
    with pytest.raises(ConfigError, match=f"T5Config.{field}"):
        dataclasses.replace(T5Config(), **{field: value})
