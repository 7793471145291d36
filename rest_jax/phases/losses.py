"""From an objective's settings to a loss function of the trainer: (parameters, batch, dropout key) -> sums.

Floor 6. The mathematics is in `objectives/`, the networks in `network/`; here they meet.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from rest_jax.network import config as network_config
from rest_jax.network import heads, transformer
from rest_jax.objectives import policy, reward
from rest_jax.types import LossFn, LossSums, Params, RewardBatch, Seq2SeqBatch


def dropout_arguments(key: jax.Array | None) -> dict[str, Any]:
    """How a network is told of its dropout key; None is none."""
    return {"deterministic": True} if key is None else {"deterministic": False, "rngs": {"dropout": key}}


def policy_loss(config: network_config.T5Config, objective: policy.BehaviourCloningConfig) -> LossFn:
    """The loss of a policy on (packed) pairs."""
    model = transformer.Transformer(config)

    def loss(params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None) -> LossSums:
        logits_BxTxV = model.apply(
            {"params": params},
            batch.encoder_input_tokens,
            batch.decoder_input_tokens,
            encoder_segment_ids=batch.encoder_segment_ids,
            decoder_segment_ids=batch.decoder_segment_ids,
            **dropout_arguments(dropout_key),
        )
        return policy.behaviour_cloning(
            jnp.asarray(logits_BxTxV),
            jnp.asarray(batch.decoder_target_tokens),
            jnp.asarray(batch.decoder_loss_weights),
            normalise=objective.normalise,
            label_smoothing=objective.label_smoothing,
            z_loss=objective.z_loss,
            segment_ids=None if batch.decoder_segment_ids is None else jnp.asarray(batch.decoder_segment_ids),
        )

    return loss


def reward_loss(config: network_config.T5Config, kind: Literal["bce", "mse"]) -> LossFn:
    """The loss of the reward model on rated translations."""
    model = heads.RewardModel(config)

    def loss(params: Params, batch: RewardBatch, dropout_key: jax.Array | None) -> LossSums:
        logits_B = model.apply(
            {"params": params},
            batch.encoder_input_tokens,
            batch.decoder_input_tokens,
            **dropout_arguments(dropout_key),
        )
        scores_B, weights_B = jnp.asarray(batch.scores), jnp.asarray(batch.row_weights)
        return reward.regression_loss(jnp.asarray(logits_B), scores_B, weights_B, kind=kind)

    return loss
