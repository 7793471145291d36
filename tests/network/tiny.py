"""The small networks and batches that the tests of this room share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.network.config import T5Config
from rest_jax.network.heads import RewardModel
from rest_jax.network.init import init_params, init_reward_params
from rest_jax.network.transformer import Transformer

TINY = T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    head_dim=6,  # so that H * D differs from E
    mlp_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.1,
)
# One layer a side compiles in half the time, where depth is not the matter.
SHALLOW = dataclasses.replace(TINY, num_encoder_layers=1, num_decoder_layers=1)
TIED = dataclasses.replace(TINY, logits_via_embedding=True)


@functools.cache
def params_of(config: T5Config, seed: int = 0) -> dict[str, Any]:
    """Parameters in which everything matters: norm scales are not all 1, position biases not all small."""
    fresh = init_params(config, jax.random.key(seed))
    return jax.tree_util.tree_map_with_path(functools.partial(_stir, seed), fresh)


@functools.cache
def reward_params_of(config: T5Config, seed: int = 0) -> dict[str, Any]:
    fresh = init_reward_params(config, jax.random.key(seed))
    return jax.tree_util.tree_map_with_path(functools.partial(_stir, seed), fresh)


def _stir(seed: int, path: Any, leaf: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path)
    if "scale" in name or "rel_embedding" in name:
        rng = np.random.default_rng([seed, sum(name.encode())])
        return leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
    return leaf


@functools.partial(jax.jit, static_argnums=0)
def _policy(config: T5Config, params: Any, source: jax.Array, target: jax.Array, segments: Any) -> jax.Array:
    return Transformer(config).apply({"params": params}, source, target, **segments)


def policy_logits(config: T5Config, params: Any, source: Any, target: Any, **segments: Any) -> np.ndarray:
    """Teacher-forced logits [B, T, V]."""
    segments = {name: jnp.asarray(ids) for name, ids in segments.items()}
    return np.asarray(_policy(config, params, jnp.asarray(source), jnp.asarray(target), segments))


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: T5Config, params: Any, source: jax.Array, target: jax.Array) -> jax.Array:
    return RewardModel(config).apply({"params": params}, source, target)


def score_logits(config: T5Config, params: Any, source: Any, target: Any) -> np.ndarray:
    """Score logits [B]."""
    return np.asarray(_scores(config, params, jnp.asarray(source), jnp.asarray(target)))


def rows(lengths: list[int], width: int, seed: int, *, shifted: bool = False, vocab: int = 40) -> np.ndarray:
    """Random rows ending in EOS (1), padded to `width`; `shifted` starts with the start symbol."""
    rng = np.random.default_rng(seed)
    out = np.zeros((len(lengths), width), np.int32)
    for row, length in zip(out, lengths, strict=True):
        first = int(shifted)
        row[first:length] = rng.integers(2, vocab, length - first)
        row[length - 1] = 1 if length > first else 0
    return out
