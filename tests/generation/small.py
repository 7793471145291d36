"""A tiny transformer with sharp enough predictions to tell right from wrong."""

from __future__ import annotations

import functools

import jax
import numpy as np

from rest_jax.network.config import T5Config
from rest_jax.network.init import init_params
from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.types import EOS_ID, PAD_ID, RaggedTokens

SMALL = T5Config(
    vocab_size=24,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.0,
)


@functools.cache
def small_params(seed: int = 0):
    """Random parameters, the output head scaled up so that distributions are far from flat."""
    params = jax.device_get(init_params(SMALL, jax.random.key(seed)))
    head = params["decoder"]["logits_dense"]
    head["kernel"] = head["kernel"] * 3.0
    return params


@functools.cache
def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def random_sources(number: int, longest: int, seed: int = 0) -> RaggedTokens:
    rng = np.random.default_rng(seed)
    rows = [[*rng.integers(3, 24, size=rng.integers(0, longest)), EOS_ID] for _ in range(number)]
    return RaggedTokens.from_lists(rows)


def padded(rows: RaggedTokens, length: int) -> np.ndarray:
    tokens = np.full((len(rows), length), PAD_ID, np.int32)
    for i in range(len(rows)):
        tokens[i, : len(rows[i])] = rows[i]
    return tokens
