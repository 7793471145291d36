"""The filter of Improve: which samples a rising threshold lets through (arXiv:2308.08998, section 3).

Floor 1, on the host, in float64. A reward that is missing (NaN) or infinite never passes, is never ranked and
never averaged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rest_jax import errors
from rest_jax.objectives import statistics

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
        object.__setattr__(self, name, _checked_list(getattr(self, name), f"ThresholdSchedule.{name}"))

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


def _checked_list(thresholds: Any, where: str) -> tuple[float, ...]:
    try:
        checked = tuple(float(threshold) for threshold in thresholds)
    except (TypeError, ValueError) as error:
        raise errors.ConfigError(
            f"{thresholds!r} is not a list of numbers", where=where, remedy="Write it like (0.7, 0.8, 0.9)"
        ) from error
    if not checked:
        raise errors.ConfigError(
            "threshold list is empty", where=where, remedy="Give one threshold an Improve step"
        )
    for threshold in checked:
        if not 0.0 <= threshold <= 1.0:
            raise errors.ConfigError(
                f"threshold {threshold} is not in [0, 1]", where=where, remedy="Rewards are scaled to [0, 1]"
            )
    for before, after in zip(checked, checked[1:], strict=False):
        if after <= before:
            verb = "falls" if after < before else "does not rise"
            raise errors.ConfigError(
                f"threshold list {verb}: {before} then {after}",
                where=where,
                remedy="List the thresholds strictly rising, one an Improve step",
            )
    return checked


@dataclasses.dataclass(frozen=True)
class FilterReport:
    """What a threshold let through.

    Attributes:
      mask: bool [n], the samples kept.
      threshold: tau, absolute.
      kept: samples kept.
      total: samples there were.
      missing: samples whose reward is NaN or infinite.
      sources: different example ids.
      sources_with_none: example ids without a kept sample.
      mean_kept: mean reward of the kept, NaN where there are none.
      quantiles: of the finite rewards before the filter, by share; empty where none is finite.
    """

    mask: np.ndarray
    threshold: float
    kept: int
    total: int
    missing: int
    sources: int
    sources_with_none: int
    mean_kept: float
    quantiles: dict[float, float]

    def facts(self) -> dict[str, Any]:
        """The report without the mask, as JSON can hold it (None for NaN)."""
        return {
            "threshold": self.threshold,
            "kept": self.kept,
            "total": self.total,
            "missing": self.missing,
            "sources": self.sources,
            "sources_with_none": self.sources_with_none,
            "mean_kept": None if math.isnan(self.mean_kept) else self.mean_kept,
            "quantiles": {str(share): value for share, value in self.quantiles.items()},
        }


def keep(
    rewards: np.ndarray, example_ids: np.ndarray, tau: float, *, allow_empty: bool = False
) -> FilterReport:
    """Filters samples by their reward, strictly above `tau`, and counts what is left.

    Args:
      rewards: float [n].
      example_ids: int [n], the source that each is a sample of.
      tau: absolute threshold.
      allow_empty: report an empty result instead of raising, for one part of a union.

    Raises:
      DataError: nothing is left; the message states the quantiles of the rewards.
      ConfigError: tau is NaN.
    """
    rewards = np.asarray(rewards, np.float64)
    example_ids = np.asarray(example_ids)
    _check_tau(tau)
    if rewards.shape != example_ids.shape:
        raise ValueError(f"{rewards.shape} rewards for {example_ids.shape} example ids")
    mask = above_threshold(rewards, tau)
    kept = int(mask.sum())
    if not kept and not allow_empty:
        raise nothing_kept(rewards, tau)
    finite = np.isfinite(rewards)
    points = quantile_thresholds(rewards, REPORTED_QUANTILES) if finite.any() else ()
    sources = len(np.unique(example_ids))
    return FilterReport(
        mask=mask,
        threshold=float(tau),
        kept=kept,
        total=int(rewards.size),
        missing=int((~finite).sum()),
        sources=sources,
        sources_with_none=sources - len(np.unique(example_ids[mask])),
        mean_kept=float(rewards[mask].mean()) if kept else math.nan,
        quantiles=dict(zip(REPORTED_QUANTILES, points, strict=False)),
    )


class StreamedFilter:
    """The filter for samples that come piece by piece, sorted by source: `keep` in constant memory.

    Args:
      tau: absolute threshold.

    Attributes:
      sources: different example ids so far.

    Raises:
      ConfigError: tau is NaN.
    """

    def __init__(self, tau: float):
        _check_tau(tau)
        self._tau = tau
        self._all, self._kept = statistics.Summary(), statistics.Summary()
        self.sources = self._sources_kept = 0
        self._last: int | None = None
        self._last_kept: int | None = None

    def __call__(self, rewards: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
        """Which samples of the next piece pass, bool [n]; the counts go on.

        Args:
          rewards: float [n].
          example_ids: int [n], rising, and from where the piece before ended.

        Raises:
          ValueError: the ids fall, or are not as many as the rewards.
        """
        if rewards.shape != example_ids.shape:
            raise ValueError(f"{rewards.shape} rewards for {example_ids.shape} example ids")
        mask = above_threshold(rewards, self._tau)
        self._all.add(rewards)
        self._kept.add(rewards[mask])
        new, self._last = _sources_in(example_ids, self._last)
        new_kept, self._last_kept = _sources_in(example_ids[mask], self._last_kept)
        self.sources += new
        self._sources_kept += new_kept
        return mask

    @property
    def total(self) -> int:
        """Samples there were."""
        return self._all.total

    @property
    def kept(self) -> int:
        """Samples kept."""
        return self._kept.total

    @property
    def missing(self) -> int:
        """Samples whose reward is NaN or infinite."""
        return self._all.total - self._all.finite

    @property
    def sources_with_none(self) -> int:
        """Sources without a kept sample."""
        return self.sources - self._sources_kept

    @property
    def mean_kept(self) -> float:
        """Mean reward of the kept, NaN where there are none."""
        return self._kept.mean


def _sources_in(sorted_ids: np.ndarray, last: int | None) -> tuple[int, int | None]:
    """How many ids of a sorted piece are new after `last`, and the last of the piece."""
    if not sorted_ids.size:
        return 0, last
    steps = np.diff(sorted_ids)
    first = int(sorted_ids[0])
    if (steps < 0).any() or (last is not None and first < last):
        raise ValueError("the samples are not sorted by their source")
    return int((steps > 0).sum()) + (first != last), int(sorted_ids[-1])


def _check_tau(tau: float) -> None:
    if math.isnan(tau):
        raise errors.ConfigError("the threshold is NaN", where="filter", remedy="Give a number in [0, 1]")


def nothing_kept(rewards: np.ndarray | Iterable[np.ndarray], tau: float) -> errors.DataError:
    """The error that a threshold keeps nothing of all rewards; it states their quantiles."""
    seen = statistics.Summary()
    for chunk in statistics.in_chunks(rewards):
        seen.add(chunk)
    if not seen.finite:
        return errors.DataError(
            f"threshold {tau:.6g} keeps 0 of {seen.total} (no reward is a finite number)",
            remedy="Look at what the reward model returned",
        )
    shares = [share for share in REPORTED_QUANTILES if 0.5 <= share < 1]
    points = zip(shares, quantile_thresholds(rewards, shares), strict=True)
    shown = ", ".join(f"{share:g}: {value:.4g}" for share, value in points)
    return errors.DataError(
        f"threshold {tau:.6g} keeps 0 of {seen.total} (max reward {seen.maximum:.6g}; quantiles {shown})",
        remedy="Lower ThresholdSchedule.values, or give quantiles instead",
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
