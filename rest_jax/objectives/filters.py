"""The paper's filter: one rising threshold for all sources (arXiv:2308.08998, section 3).

Floor 1, on the host, in float64. A reward that is missing (NaN) or infinite never passes, is never ranked and
never averaged. The filters that judge each source on its own are in `selections`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from rest_jax import errors
from rest_jax.objectives import statistics
from rest_jax.objectives.rules import Rule, checked_schedule

REPORTED_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


def above_threshold(rewards: np.ndarray, tau: float) -> np.ndarray:
    """F(x, y; tau) = 1[R(x, y) > tau], strictly, as bool [n]."""
    rewards = np.asarray(rewards, np.float64)
    return np.isfinite(rewards) & (rewards > tau)


def quantile_thresholds(
    rewards: np.ndarray | Iterable[np.ndarray], quantiles: Sequence[float]
) -> tuple[float, ...]:
    """Turns quantiles into absolute thresholds that are rewards of the data themselves.

    The threshold of q is the smallest reward r such that at least a share q of the finite rewards is <= r,
    so the strict filter keeps at most a share 1 - q of them, and with ties fewer. It is an order statistic,
    without interpolation: no rounding, and the same whatever the order of the rewards.

    Args:
      rewards: an array, or chunks that can be gone through again (`statistics.Chunks`).
      quantiles: shares q.

    Raises:
      DataError: no reward is finite.
      ConfigError: a quantile is not in [0, 1].
    """
    return statistics.quantiles(rewards, quantiles)


@dataclasses.dataclass(frozen=True)
class ThresholdSchedule:
    """The thresholds of a Grow step's Improve steps, one each; exactly one of the two lists is given.

    Attributes:
      values: absolute rewards in [0, 1], strictly rising; the paper's are from 0.7, 0.8, 0.9, 0.95, 0.99.
      quantiles: shares of the Grow dataset's rewards in [0, 1], strictly rising, turned into absolute values.

    Raises:
      ConfigError: both or neither is given, or a list is empty, out of range or does not rise.
    """

    values: tuple[float, ...] | None = None
    quantiles: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if (self.values is None) == (self.quantiles is None):
            state = "neither values nor quantiles" if self.values is None else "both values and quantiles"
            raise errors.ConfigError(
                f"{state} given", where="ThresholdSchedule", remedy="Give exactly one of the two lists"
            )
        name = "values" if self.quantiles is None else "quantiles"
        checked = checked_schedule(getattr(self, name), f"ThresholdSchedule.{name}", noun="threshold")
        object.__setattr__(self, name, checked)

    def __len__(self) -> int:
        return len(self.values or self.quantiles or ())

    def absolute(self, rewards: np.ndarray | Iterable[np.ndarray]) -> tuple[float, ...]:
        """The thresholds as rewards; quantiles are taken of `rewards`, [n] or chunks.

        Two quantiles may fall on the same reward where rewards are tied; such thresholds are equal.

        Raises:
          DataError: quantiles are asked for and no reward is finite.
        """
        if self.values is not None:
            return self.values
        assert self.quantiles is not None
        return quantile_thresholds(rewards, self.quantiles)

    def rules(self, rewards: np.ndarray | Iterable[np.ndarray]) -> tuple[Rule, ...]:
        """A rule a step: one strict threshold for all sources; quantiles are taken of `rewards`.

        Raises:
          DataError: quantiles are asked for and no reward is finite.
        """
        absolute = self.absolute(rewards)
        shares = self.quantiles or (None,) * len(absolute)
        return tuple(threshold_rule(tau, share) for tau, share in zip(absolute, shares, strict=True))


def threshold_rule(tau: float, quantile: float | None = None) -> Rule:
    """The strict filter by one threshold for all sources, as a rule.

    Args:
      tau: absolute threshold.
      quantile: the share that it was taken from, if it was.

    Raises:
      ConfigError: tau is NaN.
    """
    if math.isnan(tau):
        raise errors.ConfigError("the threshold is NaN", where="filter", remedy="Give a number in [0, 1]")
    return Rule(
        "threshold",
        tau,
        f"threshold {tau:.6g}",
        "Lower ThresholdSchedule.values, or give quantiles instead",
        lambda rewards, starts: above_threshold(rewards, tau),
        threshold=float(tau),
        quantile=quantile,
    )


def nothing_kept(rewards: np.ndarray | Iterable[np.ndarray], rule: Rule) -> errors.DataError:
    """The error that a rule keeps nothing of all rewards; it states their quantiles."""
    seen = statistics.Summary()
    for chunk in statistics.in_chunks(rewards):
        seen.add(chunk)
    if not seen.finite:
        return errors.DataError(
            f"{rule.said} keeps 0 of {seen.total} (no reward is a finite number)",
            remedy="Look at what the reward model returned, and at what GuardConfig takes out",
        )
    shares = [share for share in REPORTED_QUANTILES if 0.5 <= share < 1]
    points = zip(shares, quantile_thresholds(rewards, shares), strict=True)
    shown = ", ".join(f"{share:g}: {value:.4g}" for share, value in points)
    return errors.DataError(
        f"{rule.said} keeps 0 of {seen.total} (max reward {seen.maximum:.6g}; quantiles {shown})",
        remedy=rule.remedy,
    )


def check_above_mean(tau: float, mean_reward: float) -> None:
    """Checks that the first threshold is above the mean reward of the Grow dataset.

    Only then is the filtered data better than what made it (arXiv:2308.08998, appendix A.3).

    Raises:
      ConfigError: it is not, or the mean is NaN.
    """
    if not tau > mean_reward:
        raise errors.ConfigError(
            f"first threshold {tau:.6g} is not above the mean reward {mean_reward:.6g} of the samples",
            where="ThresholdSchedule",
            remedy="Raise the first threshold: the samples it keeps must be better than their average",
        )
