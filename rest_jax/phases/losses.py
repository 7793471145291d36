"""From an objective's settings to a loss function of the trainer: (parameters, batch, dropout key) -> sums.

Floor 6. The mathematics is in `objectives/`, the networks in `network/`; here they meet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from rest_jax.network import config as network_config
from rest_jax.network import heads, transformer
from rest_jax.objectives import policy, reward
from rest_jax.phases.experiment import BehaviourCloningConfig
from rest_jax.types import LossFn, LossSums, Params, RewardBatch, Seq2SeqBatch


def _dropout(key: jax.Array | None) -> dict[str, Any]:
    return {"deterministic": True} if key is None else {"deterministic": False, "rngs": {"dropout": key}}


def policy_loss(config: network_config.T5Config, objective: BehaviourCloningConfig) -> LossFn:
    """The loss of a policy on (packed) pairs."""
    model = transformer.Transformer(config)

    def loss(params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None) -> LossSums:
        logits_BxTxV = model.apply(
            {"params": params},
            batch.encoder_input_tokens,
            batch.decoder_input_tokens,
            encoder_segment_ids=batch.encoder_segment_ids,
            decoder_segment_ids=batch.decoder_segment_ids,
            **_dropout(dropout_key),
        )
        return policy.behaviour_cloning(
            logits_BxTxV,
            batch.decoder_target_tokens,
            batch.decoder_loss_weights,
            normalise=objective.normalise,
            label_smoothing=objective.label_smoothing,
            z_loss=objective.z_loss,
            segment_ids=batch.decoder_segment_ids,
        )

    return loss


def reward_loss(config: network_config.T5Config, kind: str) -> LossFn:
    """The loss of the reward model on rated translations."""
    model = heads.RewardModel(config)

    def loss(params: Params, batch: RewardBatch, dropout_key: jax.Array | None) -> LossSums:
        logits_B = model.apply(
            {"params": params},
            batch.encoder_input_tokens,
            batch.decoder_input_tokens,
            **_dropout(dropout_key),
        )
        return reward.regression_loss(logits_B, batch.scores, batch.row_weights, kind=kind)

    return loss


class ValidationLoss:
    """Evaluator: the loss and its metrics over a fixed list of batches, as {"valid/loss": …}."""

    def __init__(self, loss_fn: LossFn, batches: Iterable[Any], prefix: str = "valid"):
        self._step = jax.jit(lambda params, batch: loss_fn(params, batch, None))
        self._batches = list(batches)
        self._prefix = prefix

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """Averages by weight over all batches."""
        del step
        sums = [jax.device_get(self._step(params, batch)) for batch in self._batches]
        weight = sum(float(s.weight) for s in sums)
        found = {"loss": sum(float(s.loss) for s in sums) / weight}
        for name in sums[0].metrics:
            pairs = [s.metrics[name] for s in sums]
            found[name] = sum(float(p[0]) for p in pairs) / sum(float(p[1]) for p in pairs)
        return {f"{self._prefix}/{name}": value for name, value in found.items()}
