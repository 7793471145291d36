"""What the best of n samples is worth, from N >= n samples of each source, without sampling again.

Floor 4. The best of n is chosen among a random subset of n of the N samples. Ranked from the best, the
sample of rank k (0 to N - 1) is the best of its subset where it is in it and none of the k above it is:
w_k = C(N-1-k, n-1) / C(N, n). A weighted sum over the samples is therefore the mean over all subsets: the
expectation of the best of n has no bias, and far less variance than that of one subset.

Source: order statistics of sampling without replacement; the same weights as the unbiased pass@k of Chen et
al. 2021 (arXiv:2107.03374), for a maximum in place of a success. The comparison is that of ReST's section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rest_jax import errors


def rank_weights(total: int, n: int) -> np.ndarray:
    """Probability that the sample of each rank is the best of a random subset: float64 [N], best rank first.

    w_0 = n / N, and w_(k+1) = w_k (N - n - k) / (N - 1 - k): ratios, so that no binomial overflows.

    Raises:
      ConfigError: n is not within 1 to N.
    """
    if not 1 <= n <= total:
        raise errors.ConfigError(
            f"the best of {n} cannot be told from {total} samples",
            remedy=f"Choose n from 1 to {total}, or draw more samples",
        )
    ranks = np.arange(total - 1)
    return n / total * np.cumprod([1.0, *(np.maximum(total - n - ranks, 0) / (total - 1 - ranks))])


def selection_weights(
    rewards_N: np.ndarray, numbers: Sequence[int], eligible_N: np.ndarray | None = None
) -> np.ndarray:
    """Probability that each sample is the one that is chosen, for each n: float64 [numbers, N].

    Equal rewards share their weight: a tie is broken at random, and the order of the samples says nothing.
    A sample without a reward, or one that is not eligible, is never chosen before one that is; in a subset of
    such samples alone one of them is taken at random, since something has to be said.

    Args:
      rewards_N: float64 [N], what is chosen by, higher is better; NaN is missing.
      numbers: the n.
      eligible_N: bool [N]; False where a sample may not be chosen (a truncated one). None allows all.

    Raises:
      ConfigError: an n is not within 1 to N.
      DataError: there is no sample, or a reward is infinite.
    """
    order_N, starts = _ranked(rewards_N, eligible_N)
    sizes = np.diff([*starts, len(order_N)])
    chosen = np.empty((len(numbers), len(order_N)))
    for row, n in enumerate(numbers):
        of_group = np.add.reduceat(rank_weights(len(order_N), n), starts) / sizes
        chosen[row, order_N] = np.repeat(of_group, sizes)
    return chosen


def expected_value(weights_KxN: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """The expected value of the chosen sample, float64 [K], one for each n.

    Args:
      weights_KxN: from `selection_weights`.
      values_N: what is reported of the samples: the reward they are chosen by, or another. NaN is missing and
        is left out, with its weight; where nothing is left the expectation is NaN.
    """
    present = ~np.isnan(values_N)
    mass_K = weights_KxN[:, present].sum(axis=1)
    sums_K = weights_KxN[:, present] @ values_N[present]
    return np.divide(sums_K, mass_K, out=np.full(len(sums_K), np.nan), where=mass_K > 0)


def best_of_first(rewards_N: np.ndarray, n: int, eligible_N: np.ndarray | None = None) -> int:
    """The sample that best-of-n chooses from the first n: of equal rewards the earliest.

    Where none of them has a reward and may be chosen it is the first sample.

    Raises:
      ConfigError: n is not within 1 to N.
    """
    if not 1 <= n <= len(rewards_N):
        raise errors.ConfigError(f"there are no first {n} of {len(rewards_N)} samples", remedy="Lower n")
    usable = _usable(rewards_N, eligible_N)[:n]
    return int(np.argmax(np.where(usable, rewards_N[:n], -np.inf)))


def _usable(rewards_N: np.ndarray, eligible_N: np.ndarray | None) -> np.ndarray:
    present = ~np.isnan(rewards_N)
    return present if eligible_N is None else present & eligible_N


def _ranked(rewards_N: np.ndarray, eligible_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The samples from the best, and where in that order each group of equals starts; the last group holds
    what may not be chosen, if there is such a sample."""
    if not len(rewards_N):
        raise errors.DataError("a source without samples", remedy="Sample it first")
    if np.isinf(rewards_N).any():
        raise errors.DataError(f"{int(np.isinf(rewards_N).sum())} rewards are infinite")
    usable = _usable(rewards_N, eligible_N)
    key_N = np.where(usable, -rewards_N, np.inf)  # ascending: best first, the unusable last
    order_N = np.argsort(key_N, kind="stable")
    ranked = key_N[order_N]
    return order_N, np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
