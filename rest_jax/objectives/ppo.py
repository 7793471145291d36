"""Proximal policy optimisation: the online-RL baseline of Table 1.

Floor 1. Paper: arXiv:2308.08998, section 4; the algorithm is that of Schulman et al. 2017 (arXiv:1707.06347),
advantages those of Schulman et al. 2016 (arXiv:1506.02438). Rewards are normalised by source as in Donato et
al. 2022 (arXiv:2207.08583), whose setup the paper follows. All of it in float32.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from rest_jax import errors
from rest_jax.types import LossSums

_SMALL = 1e-6  # added to a standard deviation before it divides


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The PPO objective. The paper states none of these numbers.

    Attributes:
      clip_range: epsilon: the ratio of new to old probability counts up to 1 - epsilon and 1 + epsilon.
      value_clip_range: how far a value may move from that of its rollout before its gradient stops; None does
        not clip.
      value_coefficient: weight of the value loss beside the policy's.
      entropy_coefficient: weight of the bonus for the entropy of the policy's distributions; 0 leaves it out.
      kl_coefficient: beta: -beta (log pi - log pi_BC) is added to the reward of each token, against drifting
        away from the BC policy.
      discount: gamma, from token to token.
      trace: lambda of generalised advantage estimation.
      normalise_rewards: rewards of a source's samples less their mean, over their standard deviation.
      whiten_advantages: the same with the advantages, over all tokens of a rollout.
    """

    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.05
    discount: float = 1.0
    trace: float = 0.95
    normalise_rewards: bool = True
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        for field in ("clip_range", "value_clip_range"):
            _require(self, field, lambda value: 0 < value < math.inf, "above 0")
        for field in ("value_coefficient", "entropy_coefficient", "kl_coefficient"):
            _require(self, field, lambda value: 0 <= value < math.inf, "at least 0")
        for field in ("discount", "trace"):
            _require(self, field, lambda value: 0 <= value <= 1, "in [0, 1]")


def _require(config: PPOConfig, field: str, holds, rule: str) -> None:
    value = getattr(config, field)
    if value is not None and not holds(value):
        raise errors.ConfigError(
            f"{field} = {value!r} must be {rule}", where=f"PPOConfig.{field}", remedy="Mend the binding"
        )


def normalise_by_source(rewards_SxN: jax.Array) -> jax.Array:
    """Rewards of each source's samples with mean 0 and standard deviation 1: float32 [S, N].

    Where all samples of a source have the same reward, all get 0.
    """
    rewards_SxN = rewards_SxN.astype(jnp.float32)
    centred = rewards_SxN - jnp.mean(rewards_SxN, axis=1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True))
    return centred / (deviation + _SMALL)


def generalised_advantages(
    rewards_BxT: jax.Array,
    values_BxT: jax.Array,
    weights_BxT: jax.Array,
    discount: float = 1.0,
    trace: float = 0.95,
) -> jax.Array:
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, with delta_t = r_t + gamma V_{t+1} - V_t: float32 [B, T].

    One sequence a row, from position 0; behind its last token the value is 0. The return is A_t + V_t.

    Args:
      rewards_BxT: of each token.
      values_BxT: V before each token.
      weights_BxT: 0 behind the end of a row, where the result is 0.
      discount: gamma.
      trace: lambda.
    """
    counted_BxT = weights_BxT > 0
    rewards_BxT = jnp.where(counted_BxT, rewards_BxT.astype(jnp.float32), 0.0)
    values_BxT = jnp.where(counted_BxT, values_BxT.astype(jnp.float32), 0.0)
    next_BxT = jnp.pad(values_BxT[:, 1:], ((0, 0), (0, 1)))
    deltas_BxT = rewards_BxT + discount * next_BxT - values_BxT

    def back(later_B: jax.Array, delta_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage_B = delta_B + discount * trace * later_B
        return advantage_B, advantage_B

    start_B = jnp.zeros_like(deltas_BxT[:, 0])
    _, advantages_TxB = jax.lax.scan(back, start_B, deltas_BxT.T, reverse=True)
    return jnp.where(counted_BxT, advantages_TxB.T, 0.0)


def ppo_policy_loss(
    log_probs_BxT: jax.Array,
    old_log_probs_BxT: jax.Array,
    advantages_BxT: jax.Array,
    weights_BxT: jax.Array,
    clip_range: float,
) -> LossSums:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) with rho = pi / pi_old, eq. (7) of 1707.06347.

    Args:
      log_probs_BxT: of the target tokens under the policy in training.
      old_log_probs_BxT: the same under the policy of the rollout.
      advantages_BxT: of the tokens.
      weights_BxT: positions of weight 0 add nothing, even where something is NaN.
      clip_range: epsilon.

    Returns:
      LossSums with the metrics "clip_fraction" (share of tokens whose gradient the clipping stops) and
      "approx_kl", (rho - 1) - log rho, which estimates KL(pi_old || pi) a token without bias and is >= 0.
    """
    weights_BxT = weights_BxT.astype(jnp.float32)
    counted_BxT = weights_BxT > 0
    change_BxT = jnp.where(counted_BxT, log_probs_BxT - old_log_probs_BxT, 0.0).astype(jnp.float32)
    advantages_BxT = jnp.where(counted_BxT, advantages_BxT, 0.0).astype(jnp.float32)
    ratio_BxT = jnp.exp(change_BxT)
    clipped_BxT = jnp.clip(ratio_BxT, 1 - clip_range, 1 + clip_range)
    gains_BxT = jnp.minimum(ratio_BxT * advantages_BxT, clipped_BxT * advantages_BxT)
    stopped_BxT = clipped_BxT * advantages_BxT < ratio_BxT * advantages_BxT
    tokens = jnp.sum(weights_BxT)
    return LossSums(
        loss=-jnp.sum(weights_BxT * gains_BxT),
        weight=tokens,
        metrics={
            "clip_fraction": (jnp.sum(weights_BxT * stopped_BxT), tokens),
            "approx_kl": (jnp.sum(weights_BxT * (ratio_BxT - 1 - change_BxT)), tokens),
        },
    )


def entropy_sum(logits_BxTxV: jax.Array, weights_BxT: jax.Array) -> jax.Array:
    """The weighted sum over positions of the entropy of their distributions, in nats: float32 []."""
    weights_BxT = weights_BxT.astype(jnp.float32)
    logits_BxTxV = jnp.where((weights_BxT > 0)[..., None], logits_BxTxV.astype(jnp.float32), 0.0)
    log_probs_BxTxV = jax.nn.log_softmax(logits_BxTxV)
    return -jnp.sum(weights_BxT[..., None] * jnp.exp(log_probs_BxTxV) * log_probs_BxTxV)


def ppo_value_loss(
    values_BxT: jax.Array,
    old_values_BxT: jax.Array,
    returns_BxT: jax.Array,
    weights_BxT: jax.Array,
    clip_range: float | None,
) -> LossSums:
    """Half the squared error; with a clip range the greater of that and that of the clipped value.

    Args:
      values_BxT: V in training.
      old_values_BxT: V at the rollout.
      returns_BxT: what V is to be.
      weights_BxT: positions of weight 0 add nothing, even where something is NaN.
      clip_range: how far from the old value the clipped value may be; None does not clip.
    """
    weights_BxT = weights_BxT.astype(jnp.float32)
    counted_BxT = weights_BxT > 0

    def clean(numbers_BxT: jax.Array) -> jax.Array:
        return jnp.where(counted_BxT, numbers_BxT, 0.0).astype(jnp.float32)

    values_BxT, old_BxT, returns_BxT = clean(values_BxT), clean(old_values_BxT), clean(returns_BxT)
    errors_BxT = jnp.square(values_BxT - returns_BxT)
    if clip_range is not None:
        near_BxT = old_BxT + jnp.clip(values_BxT - old_BxT, -clip_range, clip_range)
        errors_BxT = jnp.maximum(errors_BxT, jnp.square(near_BxT - returns_BxT))
    return LossSums(loss=0.5 * jnp.sum(weights_BxT * errors_BxT), weight=jnp.sum(weights_BxT), metrics={})
