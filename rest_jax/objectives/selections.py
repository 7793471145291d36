"""Filters that judge each source by its own candidates, so that no source starves (arXiv:2308.08998, A.7).

Floor 1, on the host, in float64. One global threshold leaves hard sources without data. Here a source's
candidates compete among themselves: by percentile, by a point between their mean and their best, or by rank.
`capped` bounds what any filter keeps of a source, as ReST-EM does (arXiv:2312.06585).
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
import math
from collections.abc import Iterable

import numpy as np

from rest_jax import errors, keys
from rest_jax.objectives.rules import Judge, Rule, checked_schedule, ranks_in_source, rows_by_source


@dataclasses.dataclass(frozen=True)
class PercentileSchedule:
    """Keeps what lies strictly above the p-th percentile of its own source (A.7, Fig. 15).

    The percentile of p is the smallest reward r of the source such that at least a share p of its finite
    rewards is <= r: an order statistic, as the quantiles of `ThresholdSchedule`. So at most a share 1 - p of
    a source is kept, with ties fewer; of a source whose rewards are all equal, or that has one candidate,
    nothing.

    Attributes:
      percentiles: shares in [0, 1), strictly rising, one an Improve step; 0.9 is the 90th percentile.

    Raises:
      ConfigError: the list is empty, out of range or does not rise.
    """

    percentiles: tuple[float, ...]

    def __post_init__(self) -> None:
        checked = checked_schedule(
            self.percentiles,
            "PercentileSchedule.percentiles",
            noun="percentile",
            one_allowed=False,
            remedy="Write 0.9 for the 90th; nothing lies above the 100th",
        )
        object.__setattr__(self, "percentiles", checked)

    def __len__(self) -> int:
        return len(self.percentiles)

    def rules(self, rewards: np.ndarray | Iterable[np.ndarray]) -> tuple[Rule, ...]:
        """A rule a step; `rewards` are not read."""
        del rewards
        return tuple(
            Rule(
                "percentile",
                share,
                f"percentile {share:g} of each source",
                "Lower PercentileSchedule.percentiles, or draw more samples a source",
                _above(functools.partial(source_percentiles, share=share)),
            )
            for share in self.percentiles
        )


@dataclasses.dataclass(frozen=True)
class MeanMaxSchedule:
    """Keeps what lies strictly above τ_γ(x) = γ max(x) + (1 - γ) mean(x) of its own source (A.7, Fig. 16).

    Where all rewards of a source are equal, or it has one candidate, mean and maximum are τ itself, and the
    strict filter keeps nothing of it.

    Attributes:
      gammas: γ in [0, 1), strictly rising, one an Improve step; at 1 nothing could pass.

    Raises:
      ConfigError: the list is empty, out of range or does not rise.
    """

    gammas: tuple[float, ...]

    def __post_init__(self) -> None:
        checked = checked_schedule(
            self.gammas,
            "MeanMaxSchedule.gammas",
            noun="gamma",
            one_allowed=False,
            remedy="0 is the mean of a source; at 1 its maximum would have to be exceeded",
        )
        object.__setattr__(self, "gammas", checked)

    def __len__(self) -> int:
        return len(self.gammas)

    def rules(self, rewards: np.ndarray | Iterable[np.ndarray]) -> tuple[Rule, ...]:
        """A rule a step; `rewards` are not read."""
        del rewards
        return tuple(
            Rule(
                "mean_max",
                gamma,
                f"gamma {gamma:g} between mean and maximum of each source",
                "Lower MeanMaxSchedule.gammas, or draw more samples a source",
                _above(functools.partial(source_mean_max, gamma=gamma)),
            )
            for gamma in self.gammas
        )


@dataclasses.dataclass(frozen=True)
class TopKSchedule:
    """Keeps the k best of each source; of equal ones those that come first.

    (1,) with one Improve step and no D is the selection of RAFT (arXiv:2304.06767).

    Attributes:
      counts: k, whole numbers from 1, strictly falling, one an Improve step.

    Raises:
      ConfigError: the list is empty, out of range or does not fall.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        where = "TopKSchedule.counts"
        if not isinstance(self.counts, (tuple, list)) or not all(
            isinstance(count, int) and not isinstance(count, bool) for count in self.counts
        ):
            raise errors.ConfigError(
                f"{self.counts!r} is not a list of whole numbers",
                where=where,
                remedy="Write it like (4, 2, 1)",
            )
        counts = tuple(self.counts)
        if not counts:
            raise errors.ConfigError("count list is empty", where=where, remedy="Give one an Improve step")
        if min(counts) < 1:
            raise errors.ConfigError(
                f"count {min(counts)} keeps nothing", where=where, remedy="Keep at least 1 a source"
            )
        for before, after in zip(counts, counts[1:], strict=False):
            if after >= before:
                verb = "rises" if after > before else "does not fall"
                raise errors.ConfigError(
                    f"count list {verb}: {before} then {after}",
                    where=where,
                    remedy="List the counts strictly falling, one an Improve step",
                )
        object.__setattr__(self, "counts", counts)

    def __len__(self) -> int:
        return len(self.counts)

    def rules(self, rewards: np.ndarray | Iterable[np.ndarray]) -> tuple[Rule, ...]:
        """A rule a step; `rewards` are not read."""
        del rewards
        return tuple(
            Rule(
                "top_k",
                count,
                f"the best {count} of each source",
                "Look at what the reward model returned, and at what GuardConfig takes out",
                functools.partial(best_of_source, count=count),
            )
            for count in self.counts
        )


def source_percentiles(rewards: np.ndarray, starts: np.ndarray, share: float) -> np.ndarray:
    """The percentile of each source: its smallest reward with a share of its finite ones at or below it.

    Args:
      rewards: float64 [n].
      starts: int64 [m], the first row of each source.
      share: p in [0, 1].

    Returns:
      float64 [m]; NaN where a source has no finite reward.
    """
    finite = np.isfinite(rewards)
    order = np.lexsort((np.where(finite, rewards, np.inf), rows_by_source(starts, len(rewards))))
    counts = np.add.reduceat(finite.astype(np.int64), starts) if len(starts) else np.zeros(0, np.int64)
    # Through the decimal as it was written: in binary 0.07 * 100 is above 7.
    decimal = fractions.Fraction(repr(float(share)))
    distinct, which = np.unique(counts, return_inverse=True)
    ranks = np.array([max(math.ceil(decimal * int(count)), 1) for count in distinct], np.int64)[which]
    return np.where(counts > 0, rewards[order][starts + np.minimum(ranks, np.maximum(counts, 1)) - 1], np.nan)


def source_mean_max(rewards: np.ndarray, starts: np.ndarray, gamma: float) -> np.ndarray:
    """τ_γ of each source, γ max + (1 - γ) mean of its finite rewards (A.7).

    The mean is held between the least and the largest reward, and τ is counted up from it, so that rounding
    cannot push τ below rewards that are all equal.

    Args:
      rewards: float64 [n].
      starts: int64 [m], the first row of each source.
      gamma: γ.

    Returns:
      float64 [m]; NaN where a source has no finite reward.
    """
    if not len(starts):
        return np.zeros(0)
    finite = np.isfinite(rewards)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(finite, rewards, 0.0), starts)
    low = np.minimum.reduceat(np.where(finite, rewards, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, rewards, -np.inf), starts)
    low, high = (np.where(counts > 0, ends, np.nan) for ends in (low, high))
    mean = np.clip(sums / np.maximum(counts, 1), low, high)
    return mean + gamma * (high - mean)


def best_of_source(rewards: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """Which candidates are among the `count` best of their source, bool [n]; of equal ones the earlier.

    Args:
      rewards: float64 [n].
      starts: int64 [m], the first row of each source.
      count: k.
    """
    finite = np.isfinite(rewards)
    worst_last = np.where(finite, -rewards, np.inf)
    return finite & (ranks_in_source(starts, worst_last) < count)


def capped(kept: np.ndarray, priorities: np.ndarray, starts: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the kept of each source: those with the lowest priorities, bool [n].

    Args:
      kept: bool [n].
      priorities: uint64 [n], see `cap_priorities`.
      starts: int64 [m], the first row of each source.
      most: n, the cap.
    """
    return kept & (ranks_in_source(starts, ~kept, priorities) < most)


def cap_priorities(
    seed: int, grow_steps: np.ndarray, example_ids: np.ndarray, samples: np.ndarray
) -> np.ndarray:
    """Addressed pseudo-random numbers that a cap chooses by, uint64 [n].

    They depend on the address of a sample alone: not on its reward, its place, or what else is there. So the
    choice is uniform over the kept of a source, is the same however the data is cut, and stays the same for
    what a later Improve step keeps of it.

    Args:
      seed: of the run.
      grow_steps: int [n], g.
      example_ids: int64 [n].
      samples: int [n], number of each sample among those of its source.
    """
    return keys.address_hash(seed, grow_steps, example_ids, samples)


def _above(thresholds_of: Judge) -> Judge:
    """The strict filter by a threshold for each source; a NaN on either side never passes."""

    def judge(rewards: np.ndarray, starts: np.ndarray) -> np.ndarray:
        of_row = thresholds_of(rewards, starts)[rows_by_source(starts, len(rewards))]
        return np.isfinite(rewards) & (rewards > of_row)

    return judge
