"""GOLD: off-policy learning from demonstrations, with the BC policy's probability as the reward.

Floor 1. Pang & He 2021 (arXiv:2009.07839); in ReST: arXiv:2308.08998, appendix A.8.2. The reward model does
not appear: it acts through the filter alone.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from rest_jax.objectives import returns, settings, tokens
from rest_jax.types import LossSums

GoldKind = Literal["s", "p"]


@dataclasses.dataclass(frozen=True)
class GoldConfig:
    """L_t = −w_t Q_t log π(y_t), with the values of the GOLD authors' recipe for IWSLT 2014 as defaults.

    Attributes:
      kind: the reward q of a token. "s": p_MLE, so that Q is a sum of probabilities; "p": log p_MLE − b, so
        that it is a product.
      steps: k, how many further tokens' rewards Q_t counts in: k + 1 terms. The paper's is 5.
      discount: γ, by which each further token counts less.
      importance_floor: u, the lower bound of w_t = clip(π_lagged(y_t), u, 1).
      reward_floor: c, the lower bound of q. It holds past the end of a pair too, where p = 1.
      baseline: b, subtracted from log p_MLE; only "p" reads it.
      label_smoothing: ε. The loss is (1 − ε) of the above and ε of the mean −log π over the vocabulary, which
        is not weighted, as in the authors' code.
      sync_period: updates between two copies of the policy for π_lagged; 1 is the policy of this very step.
      normalise: "token" averages over the target tokens of a batch, "sequence" over its pairs.

    Raises:
      ConfigError: a setting is out of its range.
    """

    kind: GoldKind = "s"
    steps: int = 5
    discount: float = 1.0
    importance_floor: float = 0.2
    reward_floor: float = 0.1
    baseline: float = -10.0
    label_smoothing: float = 0.0
    sync_period: int = 3000
    normalise: tokens.Normalise = "token"

    def __post_init__(self) -> None:
        settings.require_choice(self, "kind", ("s", "p"))
        settings.require_whole(self, "steps", 0)
        settings.require_number(self, "discount", 0, 1)
        settings.require_number(self, "importance_floor", 0, 1)
        settings.require_number(self, "reward_floor")
        settings.require_number(self, "baseline")
        settings.require_number(self, "label_smoothing", 0, 0.999)
        settings.require_whole(self, "sync_period", 1)
        settings.require_choice(self, "normalise", ("token", "sequence"))

    @property
    def name(self) -> str:
        """The loss's name in tables."""
        return f"GOLD-{self.kind}"


def gold_returns(
    mle_log_probs_BxT: jax.Array,
    weights_BxT: jax.Array,
    config: GoldConfig,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Q_t = sum_{j = 0 … k} γ^j q_{t+j}, a constant to the gradient: [B, T], 0 on padding.

    Args:
      mle_log_probs_BxT: log p_MLE of the targets.
      weights_BxT: 0 on padding.
      config: settings.
      segment_ids: int [B, T] or None.
    """
    log_probs_BxT = tokens.cleared(tokens.real(mle_log_probs_BxT), weights_BxT > 0)
    log_probs_BxT = jax.lax.stop_gradient(log_probs_BxT)
    if config.kind == "s":
        rewards_BxT, past_end = jnp.exp(log_probs_BxT), 1.0
    else:
        rewards_BxT, past_end = log_probs_BxT - config.baseline, -config.baseline
    return returns.unrolled_sums(
        jnp.maximum(rewards_BxT, config.reward_floor),
        weights_BxT,
        segment_ids,
        config.steps,
        config.discount,
        max(past_end, config.reward_floor),
    )


def gold(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    mle_log_probs_BxT: jax.Array,
    lagged_log_probs_BxT: jax.Array | None = None,
    config: GoldConfig | None = None,
    segment_ids: jax.Array | None = None,
) -> LossSums:
    """The GOLD loss, −w_t Q_t log π(y_t); w and Q are constants to the gradient.

    Args:
      logits_BxTxV: the policy's, of any float dtype.
      targets_BxT: int.
      weights_BxT: at least 0; positions of weight 0 add nothing, whatever stands there.
      mle_log_probs_BxT: log-probabilities of the targets under the BC policy.
      lagged_log_probs_BxT: the same under a lagging copy of the policy; None takes the policy as it is now,
        with the dropout of this pass.
      config: settings; None takes the defaults.
      segment_ids: int [B, T], numbers of the pairs packed into a row, from 1; None where a row is one pair.

    Returns:
      LossSums with the metrics "nll", "importance" (w), "importance_at_floor" (share of tokens whose π_lagged
      is below u) and "q" (Q), all per token.
    """
    config = config or GoldConfig()
    weights_BxT = tokens.real(weights_BxT)
    counted_BxT = weights_BxT > 0
    logits_BxTxV = tokens.cleared(logits_BxTxV, counted_BxT)
    shifted_BxTxV, log_sum_BxT, _ = tokens.log_sum(logits_BxTxV)
    nll_BxT = log_sum_BxT - tokens.select(shifted_BxTxV, targets_BxT)

    lagged_BxT = -nll_BxT if lagged_log_probs_BxT is None else tokens.real(lagged_log_probs_BxT)
    lagged_BxT = jax.lax.stop_gradient(jnp.exp(tokens.cleared(lagged_BxT, counted_BxT)))
    importance_BxT = jnp.clip(lagged_BxT, config.importance_floor, 1.0)
    q_BxT = gold_returns(mle_log_probs_BxT, weights_BxT, config, segment_ids)

    losses_BxT = importance_BxT * q_BxT * nll_BxT
    if config.label_smoothing:
        even_BxT = log_sum_BxT - jnp.mean(shifted_BxTxV, axis=-1)
        losses_BxT = (1 - config.label_smoothing) * losses_BxT + config.label_smoothing * even_BxT
    count = jnp.sum(weights_BxT)
    at_floor_BxT = (lagged_BxT < config.importance_floor).astype(jnp.float32)
    per_token = {
        "nll": nll_BxT,
        "importance": importance_BxT,
        "importance_at_floor": at_floor_BxT,
        "q": q_BxT,
    }
    return LossSums(
        loss=jnp.sum(weights_BxT * losses_BxT),
        weight=tokens.divisor(weights_BxT, config.normalise, segment_ids),
        metrics=tokens.averages(weights_BxT, per_token, count),
    )
