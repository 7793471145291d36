"""OAC, the offline actor-critic: policy gradient on logged data, weighed by the behaviour value's advantage.

Floor 1. Mathieu et al. 2021; in ReST: arXiv:2308.08998, appendix A.8.3, where V-trace was no better than the
plain advantage.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rest_jax.objectives import settings, tokens
from rest_jax.types import LossSums


@dataclasses.dataclass(frozen=True)
class OACConfig:
    """L_t = −sg[G_t − V(s_t)] log π(y_t).

    Attributes:
      discount: γ of the return G_t.
      normalise_advantages: divides the advantages by their standard deviation in the batch; it is not stated
        in the paper, and off. Their mean stays, so no advantage changes its sign.
      importance_clip: ρ-bar of truncated importance weights min(ρ-bar, π(y_t) / μ(y_t)), μ being the policy
        that the data is from; None, the paper's, has none.
      normalise: "token" averages over the target tokens of a batch, "sequence" over its pairs.

    Raises:
      ConfigError: a setting is out of its range.
    """

    discount: float = 1.0
    normalise_advantages: bool = False
    importance_clip: float | None = None
    normalise: tokens.Normalise = "token"

    def __post_init__(self) -> None:
        settings.require_number(self, "discount", 0, 1)
        settings.require_number(self, "importance_clip", 0, above=True, optional=True)
        settings.require_choice(self, "normalise", ("token", "sequence"))

    @property
    def name(self) -> str:
        """The loss's name in tables, as the paper writes it."""
        return "OAC"


def advantage_weighted(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    advantages_BxT: jax.Array,
    config: OACConfig | None = None,
    behaviour_log_probs_BxT: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> LossSums:
    """−sg[A_t] log π(y_t), times a truncated importance weight where that is asked for.

    The loss has no lower bound: a token of negative advantage can be pushed down for ever.

    Args:
      logits_BxTxV: the policy's, of any float dtype.
      targets_BxT: int.
      weights_BxT: at least 0; positions of weight 0 add nothing, whatever stands there.
      advantages_BxT: G_t − V(s_t); no gradient goes into them.
      config: settings; None takes the defaults.
      behaviour_log_probs_BxT: log μ of the targets, which `importance_clip` needs.
      segment_ids: int [B, T] or None; only "sequence" reads them.

    Returns:
      LossSums with the metrics "nll", "advantage", "advantage_square" (before they are normalised) and, with
      importance weights, "importance" and "importance_clipped" (share of tokens), all per token. It adds up
      over micro-batches exactly, but for `normalise_advantages`, where each takes its own deviation.

    Raises:
      ValueError: importance weights are asked for and μ is not given.
    """
    config = config or OACConfig()
    weights_BxT = tokens.real(weights_BxT)
    counted_BxT = weights_BxT > 0
    count = jnp.sum(weights_BxT)
    shifted_BxTxV, log_sum_BxT, _ = tokens.log_sum(tokens.cleared(logits_BxTxV, counted_BxT))
    nll_BxT = log_sum_BxT - tokens.select(shifted_BxTxV, targets_BxT)
    advantages_BxT = jax.lax.stop_gradient(tokens.cleared(tokens.real(advantages_BxT), counted_BxT))

    per_token = {"nll": nll_BxT, "advantage": advantages_BxT, "advantage_square": jnp.square(advantages_BxT)}
    factors_BxT = advantages_BxT
    if config.normalise_advantages:
        _, deviation = tokens.moments(advantages_BxT, weights_BxT)
        factors_BxT = advantages_BxT / (deviation + 1e-8)
    if config.importance_clip is not None:
        if behaviour_log_probs_BxT is None:
            raise ValueError("importance weights need behaviour_log_probs")
        behaviour_BxT = tokens.cleared(tokens.real(behaviour_log_probs_BxT), counted_BxT)
        log_ratios_BxT = jax.lax.stop_gradient(tokens.cleared(-nll_BxT - behaviour_BxT, counted_BxT))
        log_clip = jnp.log(jnp.float32(config.importance_clip))
        ratios_BxT = jnp.exp(jnp.minimum(log_ratios_BxT, log_clip))
        factors_BxT = factors_BxT * ratios_BxT
        per_token["importance"] = ratios_BxT
        per_token["importance_clipped"] = (log_ratios_BxT > log_clip).astype(jnp.float32)
    return LossSums(
        loss=jnp.sum(weights_BxT * factors_BxT * nll_BxT),
        weight=tokens.divisor(weights_BxT, config.normalise, segment_ids),
        metrics=tokens.averages(weights_BxT, per_token, count),
    )
