"""What looks along the tokens of a pair: returns, generalised advantages, V-trace, sums of k steps.

Floor 1. Rows may be packed: a pair is a run of neighbouring positions of positive weight with the same
segment number, and nothing here crosses from one to the next. Every result is 0 where the weight is 0,
whatever stands there.

A translation is an episode: the state before token t is the source and the tokens before t, the action is
token t, the reward is 0 but at the last token, and the value after the last token is 0 (arXiv:2308.08998,
appendix A.1).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.objectives import tokens


def continues(weights_BxT: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Whether the next position is the next token of the same pair, bool [B, T].

    Args:
      weights_BxT: 0 on padding.
      segment_ids: int [B, T], numbers of the pairs packed into a row; None where a row is one pair.
    """
    counted_BxT = weights_BxT > 0
    joined_BxT = counted_BxT[:, :-1] & counted_BxT[:, 1:]
    if segment_ids is not None:
        joined_BxT = joined_BxT & (segment_ids[:, :-1] == segment_ids[:, 1:])
    return jnp.pad(joined_BxT, ((0, 0), (0, 1)))


def terminal_rewards(
    rewards_BxT: jax.Array, weights_BxT: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """The reward of a pair, given on each of its tokens, at its last token only: [B, T]."""
    counted_BxT = weights_BxT > 0
    last_BxT = counted_BxT & ~continues(weights_BxT, segment_ids)
    return jnp.where(last_BxT, tokens.real(rewards_BxT), 0.0)


def discounted_returns(
    rewards_BxT: jax.Array,
    weights_BxT: jax.Array,
    segment_ids: jax.Array | None = None,
    discount: float = 1.0,
) -> jax.Array:
    """Monte-Carlo return of every token: G_t = γ^(n − t) R for token t of n, so the last has R itself.

    Args:
      rewards_BxT: R of a pair on each of its tokens.
      weights_BxT: 0 on padding.
      segment_ids: int [B, T] or None.
      discount: γ in [0, 1].

    Returns:
      Returns [B, T].
    """
    joined_BxT = continues(weights_BxT, segment_ids)
    left_BxT = _backwards(joined_BxT.astype(jnp.float32), joined_BxT)
    returns_BxT = tokens.real(rewards_BxT) * jnp.power(jnp.float32(discount), left_BxT)
    return jnp.where(weights_BxT > 0, returns_BxT, 0.0)


def generalised_advantages(
    rewards_BxT: jax.Array,
    values_BxT: jax.Array,
    weights_BxT: jax.Array,
    segment_ids: jax.Array | None = None,
    discount: float = 1.0,
    trace: float = 0.95,
) -> jax.Array:
    """GAE (Schulman et al. 2016, arXiv:1506.02438, eq. 16): A_t = sum_l (γλ)^l δ_{t+l}.

    δ_t = r_t + γ V_{t+1} − V_t, with V = 0 after a pair's last token. Add the values for TD(λ)'s targets.

    Args:
      rewards_BxT: of each token itself (`terminal_rewards` puts a pair's reward where it belongs).
      values_BxT: V of the state before each token.
      weights_BxT: 0 on padding.
      segment_ids: int [B, T] or None.
      discount: γ in [0, 1].
      trace: λ in [0, 1]; 0 is the one-step error, 1 the return less the value.

    Returns:
      Advantages [B, T].
    """
    joined_BxT = continues(weights_BxT, segment_ids)
    values_BxT = _counted(values_BxT, weights_BxT)
    steps_BxT = (
        _counted(rewards_BxT, weights_BxT) + discount * _following(values_BxT, joined_BxT) - values_BxT
    )
    return _backwards(steps_BxT, discount * trace * joined_BxT)


class VTrace(NamedTuple):
    """Off-policy values and advantages.

    Attributes:
      targets_BxT: v_t, what the value function is regressed on.
      advantages_BxT: ρ_t (r_t + γ v_{t+1} − V_t), what weighs log π.
    """

    targets_BxT: jax.Array
    advantages_BxT: jax.Array


def v_trace(
    log_ratios_BxT: jax.Array,
    values_BxT: jax.Array,
    rewards_BxT: jax.Array,
    weights_BxT: jax.Array,
    segment_ids: jax.Array | None = None,
    discount: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> VTrace:
    """V-trace (Espeholt et al. 2018, arXiv:1802.01561, eq. 1 and section 4.2).

    v_t = V_t + sum_{l >= 0} γ^l (c_t … c_{t+l-1}) ρ_{t+l} (r_{t+l} + γ V_{t+l+1} − V_{t+l}), to the end of
    the pair, with ρ = min(ρ-bar, π/μ) and c = min(c-bar, π/μ). All of it is a constant to the gradient.

    Args:
      log_ratios_BxT: log π(a_t) − log μ(a_t), μ being the policy that the data is from.
      values_BxT: V of the state before each token.
      rewards_BxT: of each token itself (`terminal_rewards`).
      weights_BxT: 0 on padding.
      segment_ids: int [B, T] or None.
      discount: γ in [0, 1].
      rho_bar: clip that decides which policy's value is learned; infinity for π's own.
      c_bar: clip that decides how far corrections reach back; at most rho_bar.

    Returns:
      VTrace.
    """
    joined_BxT = continues(weights_BxT, segment_ids)
    log_ratios_BxT, values_BxT, rewards_BxT = (
        jax.lax.stop_gradient(_counted(array, weights_BxT))
        for array in (log_ratios_BxT, values_BxT, rewards_BxT)
    )
    # min(bar, ratio) in the logarithm: a huge ratio would overflow.
    rhos_BxT = jnp.exp(jnp.minimum(log_ratios_BxT, jnp.log(jnp.float32(rho_bar))))
    cs_BxT = jnp.exp(jnp.minimum(log_ratios_BxT, jnp.log(jnp.float32(c_bar))))
    errors_BxT = rhos_BxT * (rewards_BxT + discount * _following(values_BxT, joined_BxT) - values_BxT)
    targets_BxT = values_BxT + _backwards(errors_BxT, discount * cs_BxT * joined_BxT)
    following_BxT = _following(targets_BxT, joined_BxT)
    advantages_BxT = rhos_BxT * (rewards_BxT + discount * following_BxT - values_BxT)
    return VTrace(targets_BxT, advantages_BxT)


def unrolled_sums(
    q_BxT: jax.Array,
    weights_BxT: jax.Array,
    segment_ids: jax.Array | None = None,
    steps: int = 5,
    discount: float = 1.0,
    past_end: float = 0.0,
) -> jax.Array:
    """sum_{j = 0 … k} γ^j q_{t+j}, k + 1 terms at every token, where terms past a pair's end are `past_end`.

    Args:
      q_BxT: the terms.
      weights_BxT: 0 on padding.
      segment_ids: int [B, T] or None.
      steps: k, at least 0.
      discount: γ.
      past_end: q of a position that is not there.

    Returns:
      Sums [B, T].
    """
    counted_BxT = weights_BxT > 0
    joined_BxT = continues(weights_BxT, segment_ids)
    terms_BxT = _counted(q_BxT, weights_BxT)
    inside_BxT, sums_BxT = counted_BxT, terms_BxT
    for step in range(1, steps + 1):
        inside_BxT = joined_BxT & _shifted(inside_BxT)
        terms_BxT = _shifted(terms_BxT)
        sums_BxT = sums_BxT + discount**step * jnp.where(inside_BxT, terms_BxT, past_end)
    return jnp.where(counted_BxT, sums_BxT, 0.0)


def _counted(values_BxT: jax.Array, weights_BxT: jax.Array) -> jax.Array:
    return tokens.cleared(tokens.real(values_BxT), weights_BxT > 0)


def _shifted(array_BxT: jax.Array) -> jax.Array:
    """What stands at the next position; 0 at the last."""
    return jnp.pad(array_BxT[:, 1:], ((0, 0), (0, 1)))


def _following(values_BxT: jax.Array, joined_BxT: jax.Array) -> jax.Array:
    """The values of the same pair's next token; 0 at its last."""
    return jnp.where(joined_BxT, _shifted(values_BxT), 0.0)


def _backwards(terms_BxT: jax.Array, factors_BxT: jax.Array) -> jax.Array:
    """x_t = terms_t + factors_t x_{t+1}, from x = 0 behind the row. A factor of 0 starts anew.

    In log T rounds: two neighbouring stretches with x = a + f x' and x' = a' + f' x'' are one with a + f a'
    and f f'.
    """

    def join(later, earlier):
        later_terms, later_factors = later
        terms, factors = earlier
        return terms + factors * later_terms, factors * later_factors

    factors_BxT = factors_BxT.astype(terms_BxT.dtype)
    return jax.lax.associative_scan(join, (terms_BxT, factors_BxT), reverse=True, axis=1)[0]
