"""Rank correlations, pooled and within groups.

Floor 4. Ties count as ties (Spearman on mean ranks, Kendall's tau-b). A constant input has no rank
correlation: the answer is None, never NaN or 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy import stats

from rest_jax import errors

RankCorrelation = Callable[[np.ndarray, np.ndarray], float | None]


def spearman(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float | None:
    """Spearman's rho of two score lists [n], or None where one of them is constant.

    Pairs with a missing (NaN) member are left out.

    Raises:
      DataError: the lists have different lengths.
    """
    x, y = _present_pairs(left, right)
    if _is_degenerate(x, y):
        return None
    return _inside(float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]))


def kendall(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float | None:
    """Kendall's tau-b of two score lists [n], or None where one of them is constant.

    Pairs with a missing (NaN) member are left out.

    Raises:
      DataError: the lists have different lengths.
    """
    x, y = _present_pairs(left, right)
    if _is_degenerate(x, y):
        return None
    return _inside(float(stats.kendalltau(x, y).statistic))


def mean_within(
    left: Sequence[float] | np.ndarray,
    right: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | np.ndarray,
    correlation: RankCorrelation = spearman,
) -> float | None:
    """Mean over groups of the correlation inside each, or None where no group has one.

    What a best-of-N choice depends on is the order among translations of one source; the pooled
    correlation also rewards knowing which sources are easy. Groups where a side is constant have no
    correlation and are left out of the mean.

    Raises:
      DataError: the lists have different lengths.
    """
    x, y = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if not len(x) == len(y) == len(groups):
        raise errors.DataError(f"{len(x)} and {len(y)} scores for {len(groups)} group labels")
    rows_of: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    found = [correlation(x[rows], y[rows]) for rows in rows_of.values()]
    present = [value for value in found if value is not None]
    return float(np.mean(present)) if present else None


def _present_pairs(
    left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(left, np.float64), np.asarray(right, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise errors.DataError(f"cannot correlate scores of shapes {x.shape} and {y.shape}")
    present = ~(np.isnan(x) | np.isnan(y))
    return x[present], y[present]


def _is_degenerate(x: np.ndarray, y: np.ndarray) -> bool:
    return len(x) < 2 or bool(np.all(x == x[0])) or bool(np.all(y == y[0]))


def _inside(value: float) -> float:
    """Keeps rounding from carrying a correlation past ±1."""
    return min(1.0, max(-1.0, value))
