"""Regression of values: the state-value function on returns, and the one-step Q-learning that the paper left.

Floor 1. In ReST: arXiv:2308.08998, appendix A.8.4 (value function) and A.2 (what was tried and dropped).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from rest_jax import errors
from rest_jax.objectives import returns, settings, tokens
from rest_jax.types import LossSums

ValueKind = Literal["mse", "huber"]


@dataclasses.dataclass(frozen=True)
class ValueConfig:
    """Regression of V(s_t) on the Monte-Carlo return G_t: the behaviour policy's value.

    Attributes:
      discount: γ of the return; the paper does not state it.
      kind: "mse", (V − G)²; or "huber", half of that near 0, and growing as a straight line beyond `delta`.
      delta: where "huber" turns into a line.

    Raises:
      ConfigError: a setting is out of its range.
    """

    discount: float = 1.0
    kind: ValueKind = "mse"
    delta: float = 1.0

    def __post_init__(self) -> None:
        settings.require_number(self, "discount", 0, 1)
        settings.require_choice(self, "kind", ("mse", "huber"))
        settings.require_number(self, "delta", 0, above=True)

    @property
    def name(self) -> str:
        """The loss's name in tables."""
        return "value"


@dataclasses.dataclass(frozen=True)
class BVEConfig:
    """One-step behaviour value estimation: the logits are Q, learned by SARSA on the dataset's own tokens.

    Attributes:
      discount: γ.
      kind: "mse" or "huber", of Q(s_t, y_t) against its target.
      delta: where "huber" turns into a line.
      sync_period: updates between two copies of the network for the targets.
      scale: Q = scale · logits. A policy that samples from the softmax of its logits then acts by
        softmax(Q / scale), and logits of a usual size stand for rewards in [0, 1].

    Raises:
      ConfigError: a setting is out of its range.
    """

    discount: float = 1.0
    kind: ValueKind = "mse"
    delta: float = 1.0
    sync_period: int = 100
    scale: float = 0.05

    def __post_init__(self) -> None:
        settings.require_number(self, "discount", 0, 1)
        settings.require_choice(self, "kind", ("mse", "huber"))
        settings.require_number(self, "delta", 0, above=True)
        settings.require_whole(self, "sync_period", 1)
        settings.require_number(self, "scale", 0, above=True)

    @property
    def name(self) -> str:
        """The loss's name in tables."""
        return "BVE"


def value_loss(
    values_BxT: jax.Array,
    returns_BxT: jax.Array,
    weights_BxT: jax.Array,
    kind: ValueKind = "mse",
    delta: float = 1.0,
) -> LossSums:
    """How far the values are from the returns, averaged over tokens. Its optimum under "mse" is E[G | s].

    Args:
      values_BxT: V of the state before each token.
      returns_BxT: what they should be (`returns.discounted_returns`); no gradient goes into them.
      weights_BxT: at least 0; positions of weight 0 add nothing, whatever stands there.
      kind: "mse", the square; "huber", half the square up to `delta` and δ (|e| − δ/2) beyond.
      delta: see `kind`.

    Returns:
      LossSums with the metrics "mse", "mae", "bias" (mean of value − return), "return" and "return_square";
      `explained_variance` reads them.

    Raises:
      ConfigError: the kind is unknown.
    """
    if kind not in ("mse", "huber"):
        raise errors.ConfigError(
            f"unknown value loss {kind!r}", where="value_loss", remedy='Use "mse" or "huber"'
        )
    weights_BxT = tokens.real(weights_BxT)
    values_BxT = tokens.cleared(tokens.real(values_BxT), weights_BxT > 0)
    returns_BxT = jax.lax.stop_gradient(tokens.cleared(tokens.real(returns_BxT), weights_BxT > 0))
    errors_BxT = values_BxT - returns_BxT
    count = jnp.sum(weights_BxT)
    losses_BxT = jnp.square(errors_BxT) if kind == "mse" else _huber(errors_BxT, delta)
    return LossSums(
        loss=jnp.sum(weights_BxT * losses_BxT),
        weight=count,
        metrics=regression_metrics(values_BxT, returns_BxT, weights_BxT),
    )


def regression_metrics(
    values_BxT: jax.Array, returns_BxT: jax.Array, weights_BxT: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """ "mse", "mae", "bias", "return" and "return_square", per token, of arrays cleared on padding."""
    errors_BxT = values_BxT - returns_BxT
    per_token = {
        "mse": jnp.square(errors_BxT),
        "mae": jnp.abs(errors_BxT),
        "bias": errors_BxT,
        "return": returns_BxT,
        "return_square": jnp.square(returns_BxT),
    }
    return tokens.averages(weights_BxT, per_token, jnp.sum(weights_BxT))


def explained_variance(averages: Mapping[str, float]) -> float:
    """1 − mse / Var(G): 1 is perfect, 0 no better than the mean return; NaN where the returns are all equal.

    Args:
      averages: "mse", "return" and "return_square" of `value_loss`, each divided by its weight.
    """
    variance = averages["return_square"] - averages["return"] ** 2
    return 1.0 - averages["mse"] / variance if variance > 0 else float("nan")


def bve_q_loss(
    q_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    target_q_BxTxV: jax.Array,
    rewards_BxT: jax.Array,
    config: BVEConfig | None = None,
    segment_ids: jax.Array | None = None,
) -> LossSums:
    """One-step SARSA: Q(s_t, y_t) against γ Q'(s_{t+1}, y_{t+1}), and against R at the pair's last token.

    Its fixed point is the behaviour policy's Q (BVE, Gulcehre et al. 2021, arXiv:2103.09575): the next token
    is the dataset's, there is no maximum over the vocabulary. One acts by the greatest Q.

    Args:
      q_BxTxV: the network's logits, read as Q, of any float dtype.
      targets_BxT: int, the dataset's tokens.
      weights_BxT: at least 0; positions of weight 0 add nothing, whatever stands there.
      target_q_BxTxV: Q' of the target network; no gradient goes into it.
      rewards_BxT: R of a pair on each of its tokens.
      config: settings; None takes the defaults.
      segment_ids: int [B, T] or None.

    Returns:
      LossSums with the metrics "mse", "mae", "bias", "return" and "return_square" (the targets' moments), and
      "q_gap" (the greatest Q of a state less that of the dataset's token), per token.
    """
    config = config or BVEConfig()
    weights_BxT = tokens.real(weights_BxT)
    counted_BxT = weights_BxT > 0
    q_BxTxV = tokens.real(tokens.cleared(q_BxTxV, counted_BxT))
    taken_BxT = tokens.select(q_BxTxV, targets_BxT)
    following_BxT = tokens.select(tokens.real(tokens.cleared(target_q_BxTxV, counted_BxT)), targets_BxT)
    joined_BxT = returns.continues(weights_BxT, segment_ids)
    following_BxT = jnp.where(joined_BxT, jnp.roll(following_BxT, -1, axis=1), 0.0)
    goals_BxT = (
        returns.terminal_rewards(rewards_BxT, weights_BxT, segment_ids) + config.discount * following_BxT
    )
    sums = value_loss(taken_BxT, goals_BxT, weights_BxT, config.kind, config.delta)
    gaps_BxT = jax.lax.stop_gradient(jnp.max(q_BxTxV, axis=-1) - taken_BxT)
    gap = tokens.averages(weights_BxT, {"q_gap": gaps_BxT}, sums.weight)
    return dataclasses.replace(sums, metrics={**sums.metrics, **gap})


def _huber(errors_BxT: jax.Array, delta: float) -> jax.Array:
    sizes_BxT = jnp.abs(errors_BxT)
    near_BxT = jnp.minimum(sizes_BxT, delta)
    return near_BxT * (sizes_BxT - 0.5 * near_BxT)
