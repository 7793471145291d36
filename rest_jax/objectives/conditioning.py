"""Reward-conditioned imitation: rewards as a few words that a policy can be told, and asked for the best.

Floor 1, on the host, in float64. In ReST: arXiv:2308.08998, appendix A.2, which saw no notable gain from it.
The loss itself is behaviour cloning with a reward token before the source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from rest_jax import errors
from rest_jax.objectives import settings, statistics, tokens

MISSING = -1


@dataclasses.dataclass(frozen=True)
class RewardConditionedConfig:
    """Behaviour cloning given the bucket that a translation's reward fell in.

    Attributes:
      buckets: K, how many reward tokens there are at most; the dataset's quantiles divide them.
      normalise: "token" averages over the target tokens of a batch, "sequence" over its pairs.
      label_smoothing: as for behaviour cloning.

    Raises:
      ConfigError: a setting is out of its range.
    """

    buckets: int = 5
    normalise: tokens.Normalise = "token"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        settings.require_whole(self, "buckets", 2)
        settings.require_choice(self, "normalise", ("token", "sequence"))
        settings.require_number(self, "label_smoothing", 0, 0.999)

    @property
    def name(self) -> str:
        """The loss's name in tables."""
        return "RCBC"


def bucket_edges(rewards: np.ndarray | Iterable[np.ndarray], buckets: int) -> tuple[float, ...]:
    """The rewards that divide a dataset into buckets of about the same size: rising, at most K − 1 of them.

    An edge is a reward of the data and belongs to the bucket below it. Where rewards are tied, edges that
    would leave a bucket empty are left out: above all the highest bucket, the one that is asked for, holds
    data.

    Args:
      rewards: an array, or chunks that can be gone through again (`statistics.Chunks`).
      buckets: K, at least 2.

    Raises:
      DataError: no reward is finite, or all are the same, so that there is nothing to condition on.
      ConfigError: K is below 2.
    """
    if buckets < 2:
        raise errors.ConfigError(f"{buckets} reward buckets", where="bucket_edges", remedy="Give 2 or more")
    shares = [number / buckets for number in range(1, buckets)]
    *edges, greatest = statistics.quantiles(rewards, [*shares, 1.0])
    found = tuple(sorted({edge for edge in edges if edge < greatest}))
    if found:
        return found
    # Ties at the top fill every quantile; the buckets are then the greatest reward and all below it.
    below = _greatest_below(rewards, greatest)
    if below is None:
        raise errors.DataError(
            f"all finite rewards are {greatest:.6g}: there is nothing to condition on",
            remedy="Use behaviour cloning, or a reward that tells translations apart",
        )
    return (below,)


def reward_bucket(rewards: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """The bucket of each reward, from 0 to len(edges), rising with it: int32, of the rewards' shape.

    Bucket b holds edges[b − 1] < R <= edges[b]; a missing reward (NaN or infinite) is in `MISSING`.

    Args:
      rewards: float.
      edges: strictly rising (`bucket_edges`).

    Raises:
      ValueError: the edges do not rise.
    """
    if any(after <= before for before, after in zip(edges, edges[1:], strict=False)):
        raise ValueError(f"edges {tuple(edges)} do not rise")
    rewards = np.asarray(rewards, np.float64)
    found = np.searchsorted(np.asarray(edges, np.float64), rewards, side="left")
    return np.where(np.isfinite(rewards), found, MISSING).astype(np.int32)


def _greatest_below(rewards: np.ndarray | Iterable[np.ndarray], bound: float) -> float | None:
    """The greatest finite reward below a bound; None where there is none."""
    found = -np.inf
    for chunk in statistics.in_chunks(rewards):
        chunk = np.asarray(chunk, np.float64)
        below = chunk[np.isfinite(chunk) & (chunk < bound)]
        found = max(found, below.max(initial=-np.inf))
    return float(found) if np.isfinite(found) else None
