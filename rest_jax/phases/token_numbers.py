"""What a fixed network says of every target token of many pairs: log-probabilities, values.

Floor 6. The offline-RL losses read quantities of networks that do not change while the policy is trained:
the MLE policy of GOLD, the behaviour policy of V-trace, the behaviour value of OAC. They are computed once,
packed row by packed row, and travel with the tokens as columns of the batch; a training step then costs no
more than one of behaviour cloning.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rest_jax.data.batches import iterate_batches
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.generation.scorer import score_logits
from rest_jax.network import heads, transformer
from rest_jax.network.config import T5Config
from rest_jax.network.mesh import batch_sharding, replicated, use_mesh
from rest_jax.phases.losses import apply_to_batch
from rest_jax.phases.workspace import Workspace
from rest_jax.training.step import place_batch
from rest_jax.types import Params, Seq2SeqBatch, TokenPairs

# (params, batch) -> float [B, T]
TokenFn = Callable[[Params, Seq2SeqBatch], jax.Array]
_PLACE = "place"


def log_probs(
    workspace: Workspace,
    params: Params,
    pairs: TokenPairs,
    batch_size: int,
    sampling: SamplingConfig | None = None,
) -> np.ndarray:
    """log π(y_t | y_{<t}, x), float32 [target tokens], as `pairs.targets.values` lies.

    Args:
      workspace: the run; the network is its policy's.
      params: of a policy.
      pairs: any; each must fit a training row.
      batch_size: rows at a time, over all devices.
      sampling: None gives the policy's own, at temperature 1; else those of the distribution that is sampled
        from, -inf for a token that it never draws.
    """
    allowed = None if sampling is None else workspace.vocabulary.size
    program = _log_prob_program(workspace.experiment.policy, workspace.mesh, sampling, allowed)
    return _over_tokens(workspace, program, params, pairs, batch_size)


def values(
    workspace: Workspace, network: T5Config, params: Params, pairs: TokenPairs, batch_size: int
) -> np.ndarray:
    """V(x, y_{<t}) before each target token, float32 [target tokens]; arguments as for `log_probs`."""
    return _over_tokens(workspace, _value_program(network, workspace.mesh), params, pairs, batch_size)


def of_each_token(pairs: TokenPairs, numbers_n: np.ndarray) -> np.ndarray:
    """One number a pair, repeated for each of its target tokens: float32 [target tokens]."""
    return np.repeat(np.asarray(numbers_n, np.float32), pairs.targets.lengths)


@functools.lru_cache(maxsize=16)
def _log_prob_program(
    config: T5Config, mesh: Mesh, sampling: SamplingConfig | None, allowed_vocab_size: int | None
) -> TokenFn:
    model = transformer.Transformer(config)

    def compute(params: Params, batch: Seq2SeqBatch) -> jax.Array:
        logits_BxTxV = apply_to_batch(model, params, batch, deterministic=True)
        targets_BxT = jnp.asarray(batch.decoder_target_tokens)
        return score_logits(logits_BxTxV, targets_BxT, sampling, allowed_vocab_size)

    return _compiled(compute, mesh)


@functools.lru_cache(maxsize=16)
def _value_program(config: T5Config, mesh: Mesh) -> TokenFn:
    model = heads.ValueModel(config)

    def compute(params: Params, batch: Seq2SeqBatch) -> jax.Array:
        return apply_to_batch(model, params, batch, deterministic=True)

    return _compiled(compute, mesh)


def _compiled(compute: TokenFn, mesh: Mesh) -> TokenFn:
    return jax.jit(compute, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))


def _over_tokens(
    workspace: Workspace, run: TokenFn, params: Params, pairs: TokenPairs, batch_size: int
) -> np.ndarray:
    experiment, mesh = workspace.experiment, workspace.mesh
    found = np.zeros(len(pairs.targets.values), np.float32)
    placed = TokenPairs(pairs.ids, pairs.sources, pairs.targets, {_PLACE: np.arange(len(found))})
    rows = iterate_batches(placed, batch_size, experiment.source_length, experiment.target_length, pack=True)
    with use_mesh(mesh):
        for batch in rows:
            places_BxT = np.asarray(batch.token_columns[_PLACE])
            bare = dataclasses.replace(batch, token_columns={})
            numbers_BxT = np.asarray(jax.device_get(run(params, place_batch(bare, mesh))))
            counted_BxT = np.asarray(batch.decoder_loss_weights) > 0
            found[places_BxT[counted_BxT]] = numbers_BxT[counted_BxT]
    return found
