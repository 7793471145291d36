"""PPO, the online baseline: clipped losses of policy and value, and the rewards that go into them.

Floor 1. Schulman et al. 2017 (arXiv:1707.06347); in ReST: arXiv:2308.08998, section 4, in the setup of Donato
et al. 2022 (arXiv:2207.08583), whose rewards are normalised over the candidates of a source. Advantages are
those of `returns.generalised_advantages`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rest_jax.objectives import returns, settings, tokens, values
from rest_jax.types import LossSums


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """PPO's settings. The paper states none of them; these are usual ones.

    Attributes:
      clip: ε, how far the ratio π / π_old may go from 1 before it stops paying.
      value_clip: how far a value may go from the old one before it stops paying; None is without a clip.
      value_weight: factor of the value loss beside the policy loss, where one trainer minimises both.
      kl_weight: β of the penalty −β (log π_old − log π_ref) on every token's reward; 0 is without.
      entropy_weight: factor of the policy's entropy, which is added to what is maximised.
      discount: γ.
      trace: λ of the generalised advantages.
      normalise_advantages: takes off the batch's mean and divides by its standard deviation.
      normalise_rewards: takes off the mean of a source's candidates and divides by their standard deviation.
      normalise: "token" averages over the target tokens of a batch, "sequence" over its pairs.

    Raises:
      ConfigError: a setting is out of its range.
    """

    clip: float = 0.2
    value_clip: float | None = 0.2
    value_weight: float = 0.5
    kl_weight: float = 0.05
    entropy_weight: float = 0.0
    discount: float = 1.0
    trace: float = 0.95
    normalise_advantages: bool = True
    normalise_rewards: bool = True
    normalise: tokens.Normalise = "token"

    def __post_init__(self) -> None:
        settings.require_number(self, "clip", 0, above=True)
        settings.require_number(self, "value_clip", 0, above=True, optional=True)
        for field in ("value_weight", "kl_weight", "entropy_weight"):
            settings.require_number(self, field, 0)
        settings.require_number(self, "discount", 0, 1)
        settings.require_number(self, "trace", 0, 1)
        settings.require_choice(self, "normalise", ("token", "sequence"))

    @property
    def name(self) -> str:
        """The loss's name in tables."""
        return "PPO"


def ppo_policy_loss(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    old_log_probs_BxT: jax.Array,
    advantages_BxT: jax.Array,
    config: PPOConfig | None = None,
    segment_ids: jax.Array | None = None,
) -> LossSums:
    """−min(r A, clip(r, 1 − ε, 1 + ε) A) with r = π / π_old (eq. 7 of the PPO paper), less an entropy bonus.

    Args:
      logits_BxTxV: the policy's, of any float dtype.
      targets_BxT: int, the tokens that π_old sampled.
      weights_BxT: at least 0; positions of weight 0 add nothing, whatever stands there.
      old_log_probs_BxT: log π_old of the targets; no gradient goes into them.
      advantages_BxT: no gradient goes into them either.
      config: settings; None takes the defaults.
      segment_ids: int [B, T] or None; only "sequence" reads them.

    Returns:
      LossSums with the metrics "clip_fraction" (tokens whose ratio left the clip), "approx_kl"
      (KL(π_old || π) by r − 1 − log r on the samples, never below 0), "ratio", "entropy" and "advantage"
      (before it is normalised), per token. It adds up over micro-batches exactly, but for
      `normalise_advantages`, where each takes its own mean and deviation.
    """
    config = config or PPOConfig()
    weights_BxT = tokens.real(weights_BxT)
    counted_BxT = weights_BxT > 0
    count = jnp.sum(weights_BxT)
    log_probs_BxTxV = tokens.log_softmax(tokens.cleared(logits_BxTxV, counted_BxT))
    taken_BxT = tokens.select(log_probs_BxTxV, targets_BxT)
    old_BxT, advantages_BxT = (
        jax.lax.stop_gradient(tokens.cleared(tokens.real(array), counted_BxT))
        for array in (old_log_probs_BxT, advantages_BxT)
    )
    log_ratios_BxT = tokens.cleared(taken_BxT - old_BxT, counted_BxT)
    ratios_BxT = jnp.exp(log_ratios_BxT)
    factors_BxT = advantages_BxT
    if config.normalise_advantages:
        mean, deviation = tokens.moments(advantages_BxT, weights_BxT)
        factors_BxT = (advantages_BxT - mean) / (deviation + 1e-8)
    clipped_BxT = jnp.clip(ratios_BxT, 1 - config.clip, 1 + config.clip)
    losses_BxT = -jnp.minimum(ratios_BxT * factors_BxT, clipped_BxT * factors_BxT)
    entropy_BxT = tokens.entropy(log_probs_BxTxV)
    if config.entropy_weight:
        losses_BxT = losses_BxT - config.entropy_weight * entropy_BxT
    per_token = {
        "clip_fraction": (jnp.abs(ratios_BxT - 1) > config.clip).astype(jnp.float32),
        # expm1, since r − 1 − log r is a small difference of large numbers near 1
        "approx_kl": jnp.expm1(log_ratios_BxT) - log_ratios_BxT,
        "ratio": ratios_BxT,
        "entropy": entropy_BxT,
        "advantage": advantages_BxT,
    }
    return LossSums(
        loss=jnp.sum(weights_BxT * losses_BxT),
        weight=tokens.divisor(weights_BxT, config.normalise, segment_ids),
        metrics=tokens.averages(weights_BxT, per_token, count),
    )


def ppo_value_loss(
    values_BxT: jax.Array,
    old_values_BxT: jax.Array,
    returns_BxT: jax.Array,
    weights_BxT: jax.Array,
    value_clip: float | None = 0.2,
) -> LossSums:
    """½ max((V − G)², (V_clipped − G)²), V_clipped being within `value_clip` of the old value.

    Args:
      values_BxT: V of the state before each token.
      old_values_BxT: V when the tokens were sampled; no gradient goes into them.
      returns_BxT: G, the old values plus the generalised advantages; no gradient goes into them.
      weights_BxT: at least 0; positions of weight 0 add nothing, whatever stands there.
      value_clip: None is the plain half square.

    Returns:
      LossSums with the metrics of `values.value_loss`, which `values.explained_variance` reads, and
      "value_clip_fraction" (tokens whose value left the clip).
    """
    weights_BxT = tokens.real(weights_BxT)
    now_BxT, old_BxT, returns_BxT = (
        tokens.cleared(tokens.real(array), weights_BxT > 0)
        for array in (values_BxT, old_values_BxT, returns_BxT)
    )
    old_BxT, returns_BxT = jax.lax.stop_gradient((old_BxT, returns_BxT))
    losses_BxT = jnp.square(now_BxT - returns_BxT)
    metrics = values.regression_metrics(now_BxT, returns_BxT, weights_BxT)
    count = jnp.sum(weights_BxT)
    if value_clip is not None:
        near_BxT = old_BxT + jnp.clip(now_BxT - old_BxT, -value_clip, value_clip)
        losses_BxT = jnp.maximum(losses_BxT, jnp.square(near_BxT - returns_BxT))
        left_BxT = (jnp.abs(now_BxT - old_BxT) > value_clip).astype(jnp.float32)
        metrics |= tokens.averages(weights_BxT, {"value_clip_fraction": left_BxT}, count)
    return LossSums(loss=0.5 * jnp.sum(weights_BxT * losses_BxT), weight=count, metrics=metrics)


def normalise_by_source(rewards_SxN: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Rewards of a source's candidates less their mean, over their standard deviation: float32 [S, N].

    Args:
      rewards_SxN: of N candidates a source. A missing one (NaN or infinite) is not counted and comes out NaN:
        give its tokens a weight of 0.
      eps: added to the deviation.

    Returns:
      Normalised rewards; 0 where all the rewards of a source are the same, as a single one is.
    """
    rewards_SxN = jnp.asarray(rewards_SxN, jnp.float32)
    there = jnp.isfinite(rewards_SxN)
    count_S = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
    # Less the least reward first, so that equal rewards have no rounding for the division to blow up.
    least_S = jnp.min(jnp.where(there, rewards_SxN, jnp.inf), axis=1, keepdims=True)
    lifted_SxN = jnp.where(there, rewards_SxN - least_S, 0.0)
    centred_SxN = lifted_SxN - jnp.sum(lifted_SxN, axis=1, keepdims=True) / count_S
    squares_SxN = jnp.where(there, jnp.square(centred_SxN), 0.0)
    deviation_S = jnp.sqrt(jnp.sum(squares_SxN, axis=1, keepdims=True) / count_S)
    return jnp.where(there, centred_SxN / (deviation_S + eps), jnp.nan)


def penalised_rewards(
    rewards_BxT: jax.Array,
    old_log_probs_BxT: jax.Array,
    reference_log_probs_BxT: jax.Array,
    weights_BxT: jax.Array,
    kl_weight: float,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Rewards of each token: −β (log π_old − log π_ref), plus R at the pair's last token. [B, T].

    Args:
      rewards_BxT: R of a pair on each of its tokens.
      old_log_probs_BxT: of the targets under the policy that sampled them.
      reference_log_probs_BxT: under the policy to stay near, the BC policy.
      weights_BxT: 0 on padding, where the result is 0.
      kl_weight: β.
      segment_ids: int [B, T] or None.
    """
    gaps_BxT = tokens.real(old_log_probs_BxT) - tokens.real(reference_log_probs_BxT)
    penalties_BxT = kl_weight * tokens.cleared(gaps_BxT, weights_BxT > 0)
    return returns.terminal_rewards(rewards_BxT, weights_BxT, segment_ids) - penalties_BxT
