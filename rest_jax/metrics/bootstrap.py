"""Bootstrap intervals from sufficient statistics, over sentences or over clusters of them.

Floor 4. A resample draws units with replacement. What a statistic needs from a resample is a sum of
per-unit statistics, so a resample is a row of multiplicities and all of them are one matrix product.
Several samples of one source are not independent: they are drawn together, as one unit (a cluster
bootstrap). The seed is explicit and part of the signature.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals; for
translation metrics Koehn, Statistical significance tests for machine translation evaluation (2004).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from rest_jax import errors

LEVEL = 0.95
_MULTIPLICITIES_IN_MEMORY = 4_000_000


def resampled_sums(statistics: np.ndarray, seed: int, resamples: int = 1000) -> np.ndarray:
    """Sums of per-unit statistics over bootstrap resamples of the units.

    Args:
      statistics: float64 [units, k], one row a unit.
      seed: of the draw; equal seeds and unit counts draw equal resamples, so two systems are paired.
      resamples: how many.

    Returns:
      float64 [resamples, k].

    Raises:
      DataError: there are no units.
      ConfigError: no resamples are asked for.
    """
    if resamples < 1:
        raise errors.ConfigError(f"resamples = {resamples} gives no interval", remedy="Use 1000")
    if not len(statistics):
        raise errors.DataError("no sentences to estimate an interval from")
    parts = [counts @ statistics for counts in _multiplicities(len(statistics), seed, resamples)]
    return np.concatenate(parts)


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> list[float]:
    """The central interval [low, high] that holds `level` of the bootstrap values [resamples]."""
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return [float(low), float(high)]


def sum_by_group(statistics: np.ndarray, groups: Sequence[Hashable] | np.ndarray | None) -> np.ndarray:
    """Adds the statistics [n, k] of the rows of each group, float64 [groups, k]; None keeps the rows.

    Groups are ordered by first appearance, so the result depends on no hash order.

    Raises:
      DataError: there are not as many labels as rows.
    """
    statistics = np.asarray(statistics, np.float64)
    if groups is None:
        return statistics
    if len(groups) != len(statistics):
        raise errors.DataError(f"{len(statistics)} rows, but {len(groups)} group labels")
    number: dict[Hashable, int] = {}
    rows = np.fromiter((number.setdefault(g, len(number)) for g in groups), np.int64, count=len(groups))
    sums = np.zeros((len(number), statistics.shape[1]))
    np.add.at(sums, rows, statistics)
    return sums


def interval_signature(seed: int, resamples: int, clustered: bool) -> str:
    """How an interval was estimated, in sacreBLEU's manner ("bs:1000|seed:7|unit:source")."""
    return f"bs:{resamples}|seed:{seed}|unit:{'source' if clustered else 'row'}"


def mean_interval(
    values: Sequence[float] | np.ndarray,
    seed: int,
    resamples: int = 1000,
    groups: Sequence[Hashable] | np.ndarray | None = None,
    signature: str = "",
) -> dict[str, Any]:
    """Mean of scores with its 95 % bootstrap interval, clustered by source where `groups` is given.

    Args:
      values: scores [n]; NaN is a missing score and is left out.
      seed: of the resamples.
      resamples: how many.
      groups: the source of each value [n], or None where the values are independent.
      signature: what the scores are, put before the interval's own signature.

    Returns:
      {"mean", "ci95": [low, high], "signature"}, JSON-able.

    Raises:
      DataError: nothing is present, a value is infinite, or the lengths differ.
    """
    scores = np.asarray(values, np.float64)
    present = ~np.isnan(scores)
    if not present.any():
        raise errors.DataError(f"no score present among {len(scores)}", remedy="Score the translations first")
    if np.isinf(scores).any():
        raise errors.DataError(f"{int(np.isinf(scores).sum())} of {len(scores)} scores are infinite")
    # A missing score adds neither to the sum nor to the count.
    sums_and_counts = np.stack([np.where(present, scores, 0.0), present.astype(np.float64)], axis=1)
    units = sum_by_group(sums_and_counts, groups)
    units = units[units[:, 1] > 0]
    draws = resampled_sums(units, seed, resamples)
    parts = [signature] if signature else []
    parts.append(interval_signature(seed, resamples, groups is not None))
    return {
        "mean": float(scores[present].mean()),
        "ci95": percentile_interval(draws[:, 0] / draws[:, 1]),
        "signature": "|".join(parts),
    }


def _multiplicities(units: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Blocks of float64 [block, units]: how often each resample draws each unit."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    block = max(1, _MULTIPLICITIES_IN_MEMORY // units)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(units, size=(rows, units))
        drawn += np.arange(rows)[:, None] * units
        yield np.bincount(drawn.reshape(-1), minlength=rows * units).reshape(rows, units).astype(np.float64)
