"""From an objective's settings to a loss function of the trainer: (parameters, batch, dropout key) -> sums.

Floor 6. The mathematics is in `objectives/`, the networks in `network/`; here they meet.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rest_jax.network import config as network_config
from rest_jax.network import heads, transformer
from rest_jax.objectives import actor_critic, gold, policy, ppo, returns, reward, v_mpo, values
from rest_jax.types import (
    ContextLossFn,
    LossContext,
    LossFn,
    LossSums,
    Params,
    RewardBatch,
    Seq2SeqBatch,
)

# Columns of the target tokens that losses read: R of the pair, log-probabilities under the BC and under the
# (tempered) behaviour policy, and the behaviour policy's value.
REWARD, MLE, BEHAVIOUR, VALUE = "reward", "mle_log_prob", "behaviour_log_prob", "value"
# Those of a rollout's tokens, under the policy and the value function that it began with.
OLD_LOG_PROB, OLD_VALUE, ADVANTAGE, RETURN = "old_log_prob", "old_value", "advantage", "return"
# Parts of the parameters, and names of the networks that are read and not trained.
POLICY, CRITIC, DUALS, LAGGING, PRIOR = "policy", "value", "duals", "lagging", "prior"


def dropout_arguments(key: jax.Array | None) -> dict[str, Any]:
    """How a network is told of its dropout key; None is none."""
    return {"deterministic": True} if key is None else {"deterministic": False, "rngs": {"dropout": key}}


def apply_to_batch(model: Any, params: Params, batch: Seq2SeqBatch, **dropout: Any) -> jax.Array:
    """A network of source and shifted target applied to a batch, packed or not."""
    return jnp.asarray(
        model.apply(
            {"params": params},
            batch.encoder_input_tokens,
            batch.decoder_input_tokens,
            encoder_segment_ids=batch.encoder_segment_ids,
            decoder_segment_ids=batch.decoder_segment_ids,
            **dropout,
        )
    )


class _Arrays:
    """A batch as the objectives take it."""

    def __init__(self, batch: Seq2SeqBatch):
        self.targets_BxT = jnp.asarray(batch.decoder_target_tokens)
        self.weights_BxT = jnp.asarray(batch.decoder_loss_weights)
        segments = batch.decoder_segment_ids
        self.segments_BxT = None if segments is None else jnp.asarray(segments)
        self.columns = {name: jnp.asarray(column) for name, column in batch.token_columns.items()}


def policy_loss(config: network_config.T5Config, objective: policy.BehaviourCloningConfig) -> LossFn:
    """The loss of a policy on (packed) pairs."""
    model = transformer.Transformer(config)

    def loss(params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None) -> LossSums:
        found = _Arrays(batch)
        return policy.behaviour_cloning(
            apply_to_batch(model, params, batch, **dropout_arguments(dropout_key)),
            found.targets_BxT,
            found.weights_BxT,
            normalise=objective.normalise,
            label_smoothing=objective.label_smoothing,
            z_loss=objective.z_loss,
            segment_ids=found.segments_BxT,
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


def gold_loss(network: network_config.T5Config, settings: gold.GoldConfig) -> ContextLossFn:
    """GOLD (A.8.2) on pairs with the column MLE; the policy is a part of the parameters."""
    model = transformer.Transformer(network)

    def lagged(context: LossContext, batch: Seq2SeqBatch, targets_BxT: jax.Array) -> jax.Array | None:
        if settings.sync_period == 1:  # the copy is the policy itself: no second pass
            return None
        logits_BxTxV = apply_to_batch(model, context.lagging[LAGGING], batch, deterministic=True)
        return policy.token_log_probs(logits_BxTxV, targets_BxT)

    def loss(
        params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None, context: LossContext
    ) -> LossSums:
        found = _Arrays(batch)
        return gold.gold(
            apply_to_batch(model, params[POLICY], batch, **dropout_arguments(dropout_key)),
            found.targets_BxT,
            found.weights_BxT,
            found.columns[MLE],
            lagged(context, batch, found.targets_BxT),
            settings,
            found.segments_BxT,
        )

    return loss


def v_mpo_loss(
    network: network_config.T5Config,
    value_network: network_config.T5Config,
    settings: v_mpo.VMPOConfig,
    value_settings: values.ValueConfig,
) -> ContextLossFn:
    """V-MPO and BVMPO (A.8.1) on pairs with the columns REWARD and BEHAVIOUR.

    Policy, value and duals are parts of the parameters and are trained together, the value by V-trace.
    """
    model, critic = transformer.Transformer(network), heads.ValueModel(value_network)

    def loss(
        params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None, context: LossContext
    ) -> LossSums:
        found, dropout = _Arrays(batch), dropout_arguments(dropout_key)
        logits_BxTxV = apply_to_batch(model, params[POLICY], batch, **dropout)
        values_BxT = apply_to_batch(critic, params[CRITIC], batch, **dropout)
        old_BxTxV = apply_to_batch(model, context.lagging[LAGGING], batch, deterministic=True)
        prior_BxTxV = None
        if settings.behaviour_weight is not None:
            prior_BxTxV = apply_to_batch(model, context.frozen[PRIOR], batch, deterministic=True)
        trace = returns.v_trace(
            policy.token_log_probs(logits_BxTxV, found.targets_BxT) - found.columns[BEHAVIOUR],
            values_BxT,
            returns.terminal_rewards(found.columns[REWARD], found.weights_BxT, found.segments_BxT),
            found.weights_BxT,
            found.segments_BxT,
            settings.discount,
            settings.rho_bar,
            settings.c_bar,
        )
        anchors = v_mpo.Anchors(old_BxTxV, prior_BxTxV, settings.weight_of_behaviour(context.progress))
        of_policy = v_mpo.v_mpo(
            logits_BxTxV,
            found.targets_BxT,
            found.weights_BxT,
            trace.advantages_BxT,
            anchors,
            params[DUALS],
            settings,
        )
        of_value = values.value_loss(
            values_BxT, trace.targets_BxT, found.weights_BxT, value_settings.kind, value_settings.delta
        )
        # Each is averaged over tokens, and they share no parameter: their sum trains both.
        metrics = {f"value_{name}": pair for name, pair in of_value.metrics.items()}
        return LossSums(of_policy.loss + of_value.loss, of_policy.weight, {**of_policy.metrics, **metrics})

    return loss


def oac_loss(network: network_config.T5Config, settings: actor_critic.OACConfig) -> LossFn:
    """OAC (A.8.3) on pairs with the columns REWARD and VALUE, and BEHAVIOUR for importance weights."""
    model = transformer.Transformer(network)

    def loss(params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None) -> LossSums:
        found = _Arrays(batch)
        returns_BxT = returns.discounted_returns(
            found.columns[REWARD], found.weights_BxT, found.segments_BxT, settings.discount
        )
        return actor_critic.advantage_weighted(
            apply_to_batch(model, params, batch, **dropout_arguments(dropout_key)),
            found.targets_BxT,
            found.weights_BxT,
            returns_BxT - found.columns[VALUE],
            settings,
            None if settings.importance_clip is None else found.columns[BEHAVIOUR],
            found.segments_BxT,
        )

    return loss


def bve_loss(network: network_config.T5Config, settings: values.BVEConfig) -> ContextLossFn:
    """One-step Q-learning (A.2) on pairs with the column REWARD.

    Scale · logits is Q, so that the policy acts by softmax(Q / scale).
    """
    model = transformer.Transformer(network)

    def loss(
        params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None, context: LossContext
    ) -> LossSums:
        found = _Arrays(batch)
        logits_BxTxV = apply_to_batch(model, params[POLICY], batch, **dropout_arguments(dropout_key))
        old_BxTxV = apply_to_batch(model, context.lagging[LAGGING], batch, deterministic=True)
        return values.bve_q_loss(
            settings.scale * logits_BxTxV,
            found.targets_BxT,
            found.weights_BxT,
            settings.scale * old_BxTxV,
            found.columns[REWARD],
            settings,
            found.segments_BxT,
        )

    return loss


def value_regression(network: network_config.T5Config, settings: values.ValueConfig) -> LossFn:
    """The value function (A.8.4) on pairs with the column REWARD."""
    model = heads.ValueModel(network)

    def loss(params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None) -> LossSums:
        found = _Arrays(batch)
        returns_BxT = returns.discounted_returns(
            found.columns[REWARD], found.weights_BxT, found.segments_BxT, settings.discount
        )
        values_BxT = apply_to_batch(model, params, batch, **dropout_arguments(dropout_key))
        return values.value_loss(values_BxT, returns_BxT, found.weights_BxT, settings.kind, settings.delta)

    return loss


def ppo_loss(network: network_config.T5Config, objective: ppo.PPOConfig) -> ContextLossFn:
    """PPO (Table 1) on pairs with the columns of a rollout; policy and value are parts of the parameters.

    There is no dropout: the ratio of new to old probability is that of one and the same network.
    """
    model, critic = transformer.Transformer(network), heads.ValueModel(network)
    normalised_before = dataclasses.replace(objective, normalise_advantages=False)  # over a whole rollout

    def loss(
        params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None, context: LossContext
    ) -> LossSums:
        del dropout_key, context
        found = _Arrays(batch)
        of_policy = ppo.ppo_policy_loss(
            apply_to_batch(model, params[POLICY], batch, deterministic=True),
            found.targets_BxT,
            found.weights_BxT,
            found.columns[OLD_LOG_PROB],
            found.columns[ADVANTAGE],
            normalised_before,
            found.segments_BxT,
        )
        of_value = ppo.ppo_value_loss(
            apply_to_batch(critic, params[CRITIC], batch, deterministic=True),
            found.columns[OLD_VALUE],
            found.columns[RETURN],
            found.weights_BxT,
            objective.value_clip,
        )
        metrics = {
            "policy_loss": (of_policy.loss, of_policy.weight),
            "value_loss": (of_value.loss, of_value.weight),
            **of_policy.metrics,
            **{f"value_{name.removeprefix('value_')}": pair for name, pair in of_value.metrics.items()},
        }
        # One divisor for both, so that micro-batches add up.
        total = of_policy.loss + objective.value_weight * of_value.loss
        return LossSums(total, of_policy.weight, metrics)

    return loss
