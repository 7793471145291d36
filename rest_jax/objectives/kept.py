"""What a filter kept of the samples, counted as they come by: overall, a source, and by quantile of reward.

Floor 1, on the host. It holds counts only, and they do not depend on how whole sources are cut into pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rest_jax.objectives import statistics

# Sources are counted by how many samples are kept of them: 0, 1, 2, 3-5, …
_LOWEST_KEPT = (0, 1, 2, 3, 6, 11, 21, 51, 101)


class KeptCounts:
    """Counts of samples and sources, before and after a filter.

    Args:
      quantiles: rewards by the share of all samples that is at or below them, rising; they divide the
        samples into bands of which it is counted how many are kept. None of them gives no bands.
    """

    def __init__(self, quantiles: Sequence[tuple[float, float]] = ()):
        self._all, self._kept = statistics.Summary(), statistics.Summary()
        self._by_source = np.zeros(len(_LOWEST_KEPT), np.int64)
        self._shares = [share for share, _ in quantiles]
        self._edges = np.array([reward for _, reward in quantiles], np.float64)
        self._in_band = np.zeros((2, len(quantiles) + 1), np.int64)

    def add(self, rewards: np.ndarray, kept: np.ndarray, starts: np.ndarray) -> None:
        """Takes in the samples of further sources.

        Args:
          rewards: float64 [n]; NaN where there is none.
          kept: bool [n].
          starts: int64 [m], the first row of each source.
        """
        if rewards.shape != kept.shape:
            raise ValueError(f"{rewards.shape} rewards for {kept.shape} that are kept or not")
        if not len(rewards):
            return
        self._all.add(rewards)
        self._kept.add(rewards[kept])
        a_source = np.add.reduceat(kept.astype(np.int64), starts)
        bins = np.searchsorted(_LOWEST_KEPT, a_source, side="right") - 1
        self._by_source += np.bincount(bins, minlength=len(_LOWEST_KEPT))
        for row, chosen in enumerate((np.isfinite(rewards), kept)):
            bands = np.searchsorted(self._edges, rewards[chosen], side="left")
            self._in_band[row] += np.bincount(bands, minlength=self._in_band.shape[1])

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
        """Samples whose reward is NaN or infinite, or that a guard took out."""
        return self._all.total - self._all.finite

    @property
    def sources(self) -> int:
        """Sources that have samples."""
        return int(self._by_source.sum())

    @property
    def sources_with_none(self) -> int:
        """Sources without a kept sample."""
        return int(self._by_source[0])

    @property
    def mean_kept(self) -> float:
        """Mean reward of the kept, NaN where there are none."""
        return self._kept.mean

    @property
    def by_source(self) -> dict[str, int]:
        """How many sources have so many samples kept: {"0": …, "1": …, "2": …, "3-5": …, …, "101-": …}."""
        ends = [*(low - 1 for low in _LOWEST_KEPT[1:]), None]
        names = (
            str(low) if low == end else f"{low}-{'' if end is None else end}"
            for low, end in zip(_LOWEST_KEPT, ends, strict=True)
        )
        return dict(zip(names, self._by_source.tolist(), strict=True))

    @property
    def by_quantile(self) -> list[dict[str, Any]]:
        """The bands of reward, rising: shares "from" and "to", samples in the band, and how many are kept."""
        if not self._shares:
            return []
        ends = [0.0, *self._shares, 1.0]
        return [
            {"from": low, "to": high, "samples": samples, "kept": kept}
            for low, high, samples, kept in zip(ends, ends[1:], *self._in_band.tolist(), strict=False)
        ]

    def facts(self) -> dict[str, Any]:
        """The counts as JSON can hold them (None for NaN)."""
        return {
            "samples": self.total,
            "kept_samples": self.kept,
            "without_reward": self.missing,
            "sources": self.sources,
            "sources_with_none": self.sources_with_none,
            "mean_kept_reward": None if math.isnan(self.mean_kept) else self.mean_kept,
            "kept_by_source": self.by_source,
            "kept_by_quantile": self.by_quantile,
        }
