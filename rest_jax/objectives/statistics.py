"""Exact statistics of numbers that come in chunks, in memory that does not grow with their count.

Floor 1, on the host, in float64. A Grow step has more rewards than one wants to hold, and what is said of
them must not depend on how they were cut into files and row groups. So a sum is exact before it is rounded
once, and a quantile is an order statistic that is found by counting bits, not by sorting.

A missing (NaN) or infinite number is never summed and never ranked.
"""

from __future__ import annotations

import dataclasses
import fractions
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from rest_jax import errors

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_SIGN = np.uint64(1 << 63)
# A double is an integer times 2^(exponent - 53), and `np.frexp` gives exponents from -1073.
_LOWEST_EXPONENT = -1073
_HALF_BITS = 26
_ROWS_AT_ONCE = 1 << 20  # halves of 27 bits: a bin's sum stays far below 2^53, so it is exact in a double


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Numbers in arrays that can be gone through again and again.

    Attributes:
      make: starts a pass; every pass must give the same numbers.
    """

    make: Callable[[], Iterable[np.ndarray]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.make())


def in_chunks(values: np.ndarray | Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """An array as one chunk; chunks as they are.

    Raises:
      ValueError: the chunks are an iterator, which is spent after one pass.
    """
    if isinstance(values, np.ndarray):
        return [values]
    if isinstance(values, Iterator):
        raise ValueError("chunks are gone through several times: give a list or Chunks, not an iterator")
    return values


class ExactSum:
    """A sum of doubles without rounding error, whatever their order and however they are cut into chunks.

    Adding up in a fixed order would tie the result to the cut: NumPy adds pairwise within a chunk. Here each
    double is taken for what it is, an integer times a power of two, and the integers are added.
    """

    def __init__(self) -> None:
        self.count = 0
        self._units = 0  # of 2^(_LOWEST_EXPONENT - 53)

    def add(self, values: np.ndarray) -> None:
        """Adds finite numbers.

        Raises:
          ValueError: one is NaN or infinite.
        """
        values = np.asarray(values, np.float64).reshape(-1)
        if not np.isfinite(values).all():
            raise ValueError("only finite numbers have a sum")
        for start in range(0, len(values), _ROWS_AT_ONCE):
            self._add(values[start : start + _ROWS_AT_ONCE])
        self.count += len(values)

    def _add(self, values: np.ndarray) -> None:
        mantissas, exponents = np.frexp(values)
        integers = np.ldexp(mantissas, 53).astype(np.int64)
        shifts = np.where(integers == 0, 0, exponents - _LOWEST_EXPONENT)
        low = np.bincount(shifts, integers & ((1 << _HALF_BITS) - 1))
        high = np.bincount(shifts, integers >> _HALF_BITS)
        for shift in np.flatnonzero((low != 0) | (high != 0)).tolist():
            self._units += (int(low[shift]) + (int(high[shift]) << _HALF_BITS)) << shift

    @property
    def total(self) -> float:
        """The sum, rounded once.

        Raises:
          OverflowError: it is beyond the largest double.
        """
        return self._units / (1 << (53 - _LOWEST_EXPONENT))

    @property
    def mean(self) -> float:
        """The sum over the count, rounded once; NaN where there is no number."""
        return self._units / (self.count << (53 - _LOWEST_EXPONENT)) if self.count else math.nan


class Summary:
    """Counts, mean and extremes of numbers that come in chunks."""

    def __init__(self) -> None:
        self.total = 0
        self.minimum, self.maximum = math.inf, -math.inf
        self._sum = ExactSum()

    def add(self, values: np.ndarray) -> None:
        """Takes further numbers in."""
        finite = _finite(values)
        self.total += np.size(values)
        self._sum.add(finite)
        if finite.size:
            self.minimum = min(self.minimum, float(finite.min()))
            self.maximum = max(self.maximum, float(finite.max()))

    @property
    def finite(self) -> int:
        """How many of the numbers are finite."""
        return self._sum.count

    @property
    def mean(self) -> float:
        """Of the finite ones; NaN where there is none."""
        return self._sum.mean

    @property
    def sum(self) -> float:
        """Of the finite ones."""
        return self._sum.total


def order_statistics(
    chunks: np.ndarray | Iterable[np.ndarray], ranks_of: Callable[[int], Sequence[int]]
) -> tuple[float, ...]:
    """The k-th smallest of the finite numbers, for several k, exactly.

    The bits of a double, its sign bit turned over (all of them where it is negative), sort as unsigned
    integers as the doubles do. So the answer is found digit by digit, as in radix sort: a histogram of the
    upper 16 bits says which of them the k-th has, a second pass counts the next 16 bits of the numbers that
    begin so, and after four passes all 64 are known. Equal numbers are no special case.

    Args:
      chunks: gone through four times; NaN and infinite numbers do not count, -0.0 is 0.0.
      ranks_of: from the count of the finite numbers, the wanted k, from 1.

    Raises:
      DataError: no number is finite.
      ValueError: a k is not from 1 to the count.
    """
    chunks = in_chunks(chunks)
    prefixes = np.zeros(1, np.uint64)
    first = _histograms(chunks, prefixes, 64 - _DIGIT_BITS)
    count = int(first.sum())
    if not count:
        total = sum(np.size(chunk) for chunk in chunks)
        raise errors.DataError(
            f"0 of {total} rewards are finite numbers", remedy="Look at what the reward model returned"
        )
    ranks = np.array(ranks_of(count), np.int64).reshape(-1)
    if ((ranks < 1) | (ranks > count)).any():
        raise ValueError(f"ranks {ranks.tolist()} of {count} numbers")
    found = np.zeros(len(ranks), np.uint64)  # the digits known so far of each answer
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histograms = first if shift == 64 - _DIGIT_BITS else _histograms(chunks, prefixes, shift)
        below = np.cumsum(histograms, axis=1)
        for k, row in enumerate(np.searchsorted(prefixes, found)):
            digit = int(np.searchsorted(below[row], ranks[k]))
            ranks[k] -= below[row, digit - 1] if digit else 0
            found[k] = found[k] << np.uint64(_DIGIT_BITS) | np.uint64(digit)
        prefixes = np.unique(found)
    return tuple(_from_ordered_bits(found).tolist())


def quantiles(chunks: np.ndarray | Iterable[np.ndarray], shares: Sequence[float]) -> tuple[float, ...]:
    """For each share q the smallest number r such that at least a share q of the finite ones is <= r.

    An order statistic, without interpolation: no rounding, and a number that occurs.

    Raises:
      DataError: no number is finite.
      ConfigError: a share is not in [0, 1].
    """
    for share in shares:
        if not 0.0 <= share <= 1.0:
            raise errors.ConfigError(
                f"quantile {share} is not in [0, 1]", where="quantiles", remedy="Write 0.9 for 90 %"
            )
    # Through the decimal as it was written: in binary 0.07 * 100 is above 7.
    decimals = [fractions.Fraction(repr(float(share))) for share in shares]
    return order_statistics(chunks, lambda count: [max(math.ceil(d * count), 1) for d in decimals])


def interpolated_quantiles(
    chunks: np.ndarray | Iterable[np.ndarray], shares: Sequence[float]
) -> tuple[float, ...]:
    """What `np.quantile` gives by default: linear between the two numbers beside q (n - 1). For display.

    Raises:
      DataError: no number is finite.
    """
    weights: list[float] = []

    def neighbours(count: int) -> list[int]:
        places = [share * (count - 1) for share in shares]
        weights[:] = [place - math.floor(place) for place in places]
        return [min(math.floor(place) + 1 + side, count) for place in places for side in (0, 1)]

    values = order_statistics(chunks, neighbours)
    between = []
    for low, high, weight in zip(values[::2], values[1::2], weights, strict=True):
        # From the nearer side, as NumPy does, so that the two agree in every bit.
        step = high - low
        between.append(low + step * weight if weight < 0.5 else high - step * (1 - weight))
    return tuple(between)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return values[np.isfinite(values)]


def _ordered_bits(values: np.ndarray) -> np.ndarray:
    """uint64 [n] that sort as the doubles do; -0.0 and 0.0 are equal, and so are their bits."""
    bits = (values + 0.0).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _from_ordered_bits(ordered: np.ndarray) -> np.ndarray:
    return np.where(ordered & _SIGN, ordered & ~_SIGN, ~ordered).view(np.float64)


def _histograms(chunks: Iterable[np.ndarray], prefixes: np.ndarray, shift: int) -> np.ndarray:
    """How often each digit at `shift` occurs after each prefix (sorted), int64 [prefixes, 2^16]."""
    counts = np.zeros(len(prefixes) * _DIGITS, np.int64)
    for chunk in chunks:
        ordered = _ordered_bits(_finite(chunk))
        digits = (ordered >> np.uint64(shift)) & np.uint64(_DIGITS - 1)
        if shift + _DIGIT_BITS < 64:
            upper = ordered >> np.uint64(shift + _DIGIT_BITS)
            rows = np.minimum(np.searchsorted(prefixes, upper), len(prefixes) - 1)
            ours = prefixes[rows] == upper
            digits = digits[ours] + rows[ours].astype(np.uint64) * np.uint64(_DIGITS)
        np.add.at(counts, digits.astype(np.int64), 1)
    return counts.reshape(len(prefixes), _DIGITS)
