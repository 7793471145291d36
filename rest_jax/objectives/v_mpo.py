"""V-MPO, and BVMPO with a behaviour prior.

Floor 1. Song et al. 2020 (V-MPO, openreview.net/forum?id=SylOlp4FvH); in ReST: arXiv:2308.08998, appendix
A.8.1: L_BVMPO = L_VMPO + λ KL(π_β || π), π_β being the frozen BC policy and λ annealed from 1 to 1e-5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.objectives import settings, tokens
from rest_jax.types import LossSums

Anneal = Literal["exponential", "linear"]
DUAL_FLOOR = 1e-8


@dataclasses.dataclass(frozen=True)
class VMPOConfig:
    """V-MPO's settings; with a behaviour weight it is BVMPO.

    The paper names λ's ends and leaves the rest to V-MPO; the other defaults are of the size of V-MPO's own.

    Attributes:
      top_fraction: share of a batch's tokens, those of the greatest advantages, that the policy learns from.
      epsilon_eta: bound of the E-step, KL(ψ || uniform) over the kept tokens, that the temperature η keeps.
      epsilon_alpha: bound of the M-step, KL(π_old || π) per token, that the multiplier α keeps.
      initial_eta: η at the start.
      initial_alpha: α at the start.
      behaviour_weight: λ at the start; None is V-MPO without the behaviour prior.
      behaviour_weight_end: λ at the end of training.
      anneal: how λ goes from one to the other, "exponential" or "linear"; the paper does not say.
      discount: γ of V-trace.
      rho_bar: V-trace's clip ρ-bar.
      c_bar: V-trace's clip c-bar, at most rho_bar.
      sync_period: updates between two copies of the policy for π_old.
      dual_learning_rate: Adam's rate for η and α.

    Raises:
      ConfigError: a setting is out of its range.
    """

    top_fraction: float = 0.5
    epsilon_eta: float = 0.1
    epsilon_alpha: float = 0.005
    initial_eta: float = 1.0
    initial_alpha: float = 5.0
    behaviour_weight: float | None = 1.0
    behaviour_weight_end: float = 1e-5
    anneal: Anneal = "exponential"
    discount: float = 1.0
    rho_bar: float = 1.0
    c_bar: float = 1.0
    sync_period: int = 100
    dual_learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        settings.require_number(self, "top_fraction", 0, 1, above=True)
        for field in ("epsilon_eta", "epsilon_alpha", "initial_eta", "initial_alpha", "behaviour_weight_end"):
            settings.require_number(self, field, 0, above=True)
        settings.require_number(self, "behaviour_weight", 0, above=True, optional=True)
        settings.require_choice(self, "anneal", ("exponential", "linear"))
        settings.require_number(self, "discount", 0, 1)
        settings.require_number(self, "rho_bar", 0, above=True)
        settings.require_number(self, "c_bar", 0, above=True)
        settings.require(self.c_bar <= self.rho_bar, self, "c_bar", f"at most rho_bar = {self.rho_bar}")
        settings.require_whole(self, "sync_period", 1)
        settings.require_number(self, "dual_learning_rate", 0, above=True)

    @property
    def name(self) -> str:
        """The loss's name in tables, as the paper writes it."""
        return "V-MPO" if self.behaviour_weight is None else "BVMPO"

    def initial_duals(self) -> dict[str, jax.Array]:
        """The parameters η and α at the start, float32 []."""
        return {"eta": jnp.float32(self.initial_eta), "alpha": jnp.float32(self.initial_alpha)}

    def weight_of_behaviour(self, progress: jax.Array) -> jax.Array | None:
        """λ when this share of training lies behind; None for V-MPO."""
        if self.behaviour_weight is None:
            return None
        return annealed(progress, self.behaviour_weight, self.behaviour_weight_end, self.anneal)


class Anchors(NamedTuple):
    """The policies that hold the new one near; no gradient goes into them.

    Attributes:
      old_logits_BxTxV: of π_old, the lagging copy that the step must stay near.
      behaviour_logits_BxTxV: of π_β, for BVMPO; it may be the very array of π_old, which is then read once.
      behaviour_weight: λ, [].
    """

    old_logits_BxTxV: jax.Array
    behaviour_logits_BxTxV: jax.Array | None = None
    behaviour_weight: jax.Array | float | None = None


class EStep(NamedTuple):
    """What V-MPO's E-step says of a batch.

    Attributes:
      psi_BxT: weights of the kept tokens, which sum to 1; a constant to the gradient.
      kept_BxT: bool, the tokens of the greatest advantages.
      temperature_loss: η ε_η + η log mean_kept exp(A / η), [].
    """

    psi_BxT: jax.Array
    kept_BxT: jax.Array
    temperature_loss: jax.Array


def annealed(
    progress: jax.Array | float, start: float = 1.0, end: float = 1e-5, shape: Anneal = "exponential"
) -> jax.Array:
    """A factor that goes from `start` to `end`, both above 0, while progress goes from 0 to 1.

    Args:
      progress: share of the training that lies behind; it is clipped to [0, 1].
      start: the factor at 0.
      end: the factor at 1.
      shape: "exponential" is a straight line in the logarithm, "linear" in the factor itself.
    """
    progress = jnp.clip(jnp.asarray(progress, jnp.float32), 0.0, 1.0)
    if shape == "linear":
        return start * (1 - progress) + end * progress
    return start * jnp.power(jnp.float32(end / start), progress)


def project_duals(duals: Mapping[str, jax.Array], floor: float = DUAL_FLOOR) -> dict[str, jax.Array]:
    """Multipliers put back above 0, as they must be after each update."""
    return {name: jnp.maximum(value, jnp.asarray(floor, value.dtype)) for name, value in duals.items()}


def e_step(advantages_BxT: jax.Array, weights_BxT: jax.Array, eta: jax.Array, config: VMPOConfig) -> EStep:
    """Keeps the best tokens of the batch and weighs them: ψ_t ∝ exp(A_t / η) (V-MPO, eq. 3 and 4).

    Of n tokens the floor(top_fraction · n) of the greatest advantages are kept, at least one; where several
    share the last kept advantage, all of them are. The sort is over the whole batch, also where its rows lie
    on several devices.

    Args:
      advantages_BxT: A_t; no gradient goes into them.
      weights_BxT: at least 0; positions of weight 0 are not there.
      eta: η above 0, [].
      config: settings.
    """
    weights_BxT = tokens.real(weights_BxT)
    counted_BxT = weights_BxT > 0
    advantages_BxT = jax.lax.stop_gradient(tokens.cleared(tokens.real(advantages_BxT), counted_BxT))
    ranked = jnp.sort(jnp.where(counted_BxT, advantages_BxT, -jnp.inf).reshape(-1))
    there = jnp.sum(counted_BxT)
    wanted = jnp.maximum(jnp.floor(config.top_fraction * there.astype(jnp.float32)).astype(jnp.int32), 1)
    kept_BxT = counted_BxT & (advantages_BxT >= ranked[ranked.size - wanted])

    shares_BxT = jnp.where(kept_BxT, weights_BxT, 0.0)
    # exp(A/η) over its greatest; without a token that is 0, and both sums below are 1 instead of 0.
    peak = jnp.where(there > 0, ranked[-1], 0.0)
    raised_BxT = shares_BxT * jnp.exp(jnp.where(kept_BxT, (advantages_BxT - peak) / eta, 0.0))
    total = jnp.where(there > 0, jnp.sum(raised_BxT), 1.0)
    log_mean = jnp.log(total) - jnp.log(jnp.where(there > 0, jnp.sum(shares_BxT), 1.0))
    temperature_loss = eta * (config.epsilon_eta + log_mean) + peak
    return EStep(jax.lax.stop_gradient(raised_BxT / total), kept_BxT, temperature_loss)


def v_mpo(
    logits_BxTxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    advantages_BxT: jax.Array,
    anchors: Anchors,
    duals: Mapping[str, jax.Array],
    config: VMPOConfig | None = None,
) -> LossSums:
    """The V-MPO loss of policy and duals together, and BVMPO's where there is a behaviour policy.

    L = −sum_t ψ_t log π(y_t)  +  η (ε_η + log mean_kept exp(A / η))
        +  mean_t [α (ε_α − sg KL_t) + sg(α) KL_t]  +  λ mean_t KL(π_β || π)_t,   KL_t = KL(π_old || π)_t.

    **Micro-batches.** ψ and the log-mean belong to a batch as a whole: here, to the (micro-)batch that is
    given. The loss returned is tokens · L with the weight tokens, so micro-batches average to the
    token-weighted mean of their L, each having chosen its own best half and normalised its own ψ. That is
    V-MPO with smaller batches in the E-step; the KL terms are the same as in one batch. Rows on several
    devices are one batch.

    Args:
      logits_BxTxV: the policy's, of any float dtype.
      targets_BxT: int.
      weights_BxT: at least 0; positions of weight 0 add nothing, whatever stands there. A kept token of
        weight 2 counts as two of weight 1; what is kept is decided by numbers of tokens.
      advantages_BxT: A_t, of V-trace in the paper; no gradient goes into them.
      anchors: π_old, and π_β with its λ.
      duals: "eta" and "alpha", float32 []; apply `project_duals` after each update. A value below the floor
        is read as the floor.
      config: settings; None takes the defaults.

    Returns:
      LossSums with the metrics "nll", "advantage", "kl" (π_old to π), "kept" (share of the tokens),
      "effective" (exp of ψ's entropy over the kept tokens: 1 if all count alike), "policy_loss",
      "temperature_loss", "eta", "alpha", and with a behaviour policy "kl_behaviour" and "behaviour_weight".

    Raises:
      ValueError: there is a behaviour policy without its weight, or the other way round.
    """
    config = config or VMPOConfig()
    if (anchors.behaviour_logits_BxTxV is None) != (anchors.behaviour_weight is None):
        raise ValueError("behaviour_logits and behaviour_weight come together")
    weights_BxT = tokens.real(weights_BxT)
    counted_BxT = weights_BxT > 0
    count = jnp.sum(weights_BxT)
    log_probs_BxTxV = tokens.log_softmax(tokens.cleared(logits_BxTxV, counted_BxT))
    nll_BxT = -tokens.select(log_probs_BxTxV, targets_BxT)
    eta, alpha = _above_floor(duals["eta"]), _above_floor(duals["alpha"])

    step = e_step(advantages_BxT, weights_BxT, eta, config)
    kl_BxT = _anchored(anchors.old_logits_BxTxV, log_probs_BxTxV, counted_BxT)
    kl = jnp.sum(weights_BxT * kl_BxT) / jnp.where(count > 0, count, 1.0)
    parts = {"policy_loss": jnp.sum(step.psi_BxT * nll_BxT), "temperature_loss": step.temperature_loss}
    dual_loss = alpha * (config.epsilon_alpha - jax.lax.stop_gradient(kl)) + jax.lax.stop_gradient(alpha) * kl
    loss = parts["policy_loss"] + parts["temperature_loss"] + dual_loss
    scalars = {**parts, "kl": kl, "eta": eta, "alpha": alpha, "effective": _effective(step, weights_BxT)}
    if anchors.behaviour_logits_BxTxV is not None:
        same = anchors.behaviour_logits_BxTxV is anchors.old_logits_BxTxV
        prior_BxT = (
            kl_BxT if same else _anchored(anchors.behaviour_logits_BxTxV, log_probs_BxTxV, counted_BxT)
        )
        kl_behaviour = jnp.sum(weights_BxT * prior_BxT) / jnp.where(count > 0, count, 1.0)
        weight = jax.lax.stop_gradient(jnp.asarray(anchors.behaviour_weight, jnp.float32))
        loss = loss + weight * kl_behaviour
        scalars |= {"kl_behaviour": kl_behaviour, "behaviour_weight": weight}

    advantages_BxT = tokens.cleared(tokens.real(advantages_BxT), counted_BxT)
    per_token = {"nll": nll_BxT, "advantage": advantages_BxT, "kept": step.kept_BxT.astype(jnp.float32)}
    metrics = tokens.averages(weights_BxT, per_token, count)
    metrics |= {name: (count * value, count) for name, value in scalars.items()}
    return LossSums(loss=count * loss, weight=count, metrics=metrics)


def _anchored(
    anchor_logits_BxTxV: jax.Array, log_probs_BxTxV: jax.Array, counted_BxT: jax.Array
) -> jax.Array:
    """KL(anchor || π) [B, T]; no gradient goes into the anchor."""
    anchor_BxTxV = jax.lax.stop_gradient(tokens.cleared(anchor_logits_BxTxV, counted_BxT))
    return tokens.divergence(tokens.log_softmax(anchor_BxTxV), log_probs_BxTxV)


def _above_floor(dual: jax.Array) -> jax.Array:
    """max(dual, floor) whose gradient is that of the dual, so one that fell below can rise again."""
    return jnp.where(dual > DUAL_FLOOR, dual, DUAL_FLOOR + (dual - jax.lax.stop_gradient(dual)))


def _effective(step: EStep, weights_BxT: jax.Array) -> jax.Array:
    """exp(−sum ψ log(ψ / w)) over the sum of the kept weights: 1 where all kept tokens count alike."""
    safe_BxT = jnp.where(step.psi_BxT > 0, step.psi_BxT / jnp.where(weights_BxT > 0, weights_BxT, 1.0), 1.0)
    kept = jnp.sum(jnp.where(step.kept_BxT, weights_BxT, 0.0))
    return jnp.exp(-jnp.sum(step.psi_BxT * jnp.log(safe_BxT))) / jnp.where(kept > 0, kept, 1.0)
