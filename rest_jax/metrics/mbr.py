"""Minimum Bayes risk decoding among samples: the one that agrees most with the others.

Floor 4. Of n samples the one with the highest mean utility against the n - 1 others is chosen, each of them
standing for the reference. Equal texts are one text with a multiplicity, and each pair of distinct texts is
compared once.

Sources: Kumar and Byrne 2004; Eikema and Aziz 2020 (arXiv:2005.10283), sampling-based MBR.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rest_jax import errors


def distinct(texts_N: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The different texts in order of appearance, and the number of each sample's text: int64 [N]."""
    known: dict[str, int] = {}
    numbers_N = np.array([known.setdefault(text, len(known)) for text in texts_N], np.int64)
    return list(known), numbers_N


def mbr_choices(
    utilities_DxD: np.ndarray, numbers_N: np.ndarray, n: int, eligible_N: np.ndarray | None = None
) -> np.ndarray:
    """What MBR chooses of each n samples in a row: int64 [N // n], rows of the samples.

    The N // n disjoint blocks are independent draws of n samples, so their mean estimates what MBR with n
    samples is worth without bias; the first of them is MBR of the first n.

    Args:
      utilities_DxD: utility of distinct text i where text j is the reference; finite.
      numbers_N: the number of each sample's text, from `distinct`.
      n: samples that are compared.
      eligible_N: bool [N]; False where a sample may not be chosen (a truncated one). It counts as a reference
        all the same. Where no sample of a block may be chosen it is the block's first. None allows all.

    Of equally good samples the earliest is chosen.

    Raises:
      ConfigError: n is not within 1 to N.
      DataError: a utility is not finite.
    """
    if not 1 <= n <= len(numbers_N):
        raise errors.ConfigError(f"there are no {n} of {len(numbers_N)} samples", remedy="Lower n")
    if not np.isfinite(utilities_DxD).all():
        raise errors.DataError("a utility between two samples is not finite")
    own_D = np.diagonal(utilities_DxD)
    blocks = len(numbers_N) // n
    numbers_BxN = numbers_N[: blocks * n].reshape(blocks, n)
    counts_BxD = np.zeros((blocks, len(utilities_DxD)))
    np.add.at(counts_BxD, (np.arange(blocks)[:, None], numbers_BxN), 1.0)
    sums_BxD = counts_BxD @ utilities_DxD.T - own_D  # against the others: a sample is no reference of itself
    gains_BxN = np.take_along_axis(sums_BxD, numbers_BxN, axis=1)
    if eligible_N is not None:
        gains_BxN = np.where(eligible_N[: blocks * n].reshape(blocks, n), gains_BxN, -np.inf)
    return gains_BxN.argmax(axis=1) + n * np.arange(blocks)
