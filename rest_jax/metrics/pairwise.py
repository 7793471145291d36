"""How much each translation of a source agrees with each other one: the utilities of MBR decoding.

Floor 4. sacreBLEU reads n-grams anew for every pair: for 100 distinct samples of 1,000 sources that is 10^7
readings. Here each text is read once, and the matches of all pairs are one matrix product for each order:
min(a, b) is the number of levels t >= 1 that both counts reach, so with a 0/1 column for each (n-gram, level)
M = B B^T. For D texts of length L that is O(D L) reading and O(D^2 F) multiply-adds, F <= D L columns that at
least two texts share: 0.1 s for 100 texts of 90 characters where 10^4 calls take 3 s. The values are
sacreBLEU's (a test holds it to 1e-9).

Sources: Popović 2015 (chrF); Papineni et al. 2002 and Chen and Cherry 2014, method 3 (smoothed BLEU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from rest_jax import errors
from rest_jax.metrics.corpus import BLEU_ORDER, CHRF_BETA, bleu_tokenizer, chrf_from_statistics

CHRF_ORDER = CHRF.CHAR_ORDER
_CELLS = 4_000_000  # of a block of the 0/1 matrix, and of a block of statistics
Score = Callable[[Sequence[str], Sequence[str]], np.ndarray]


@runtime_checkable
class Utility(Protocol):
    """A metric between any two translations of a source."""

    name: str

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """Float64 [D, D]: row i, column j is the utility of text i where text j is the reference."""

    def signature(self) -> str:
        """All that the numbers depend on, in sacreBLEU's manner."""


class PairwiseChrf:
    """Sentence chrF (character 6-grams, beta = 2) over 100 of all pairs."""

    name = "chrf"

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """Float64 [D, D] in [0, 1]; the reference is the column."""
        orders = _character_orders(texts)
        totals = np.stack([np.bincount(texts_of, minlength=len(texts)) for texts_of, _ in orders], axis=1)
        matches = np.stack([_matches(*order, len(texts)) for order in orders], axis=-1)
        scores = np.empty((len(texts), len(texts)))
        rows = max(1, _CELLS // max(1, len(texts) * 3 * CHRF_ORDER))
        for start in range(0, len(texts), rows):
            part = matches[start : start + rows]
            hypothesis = np.broadcast_to(totals[start : start + rows, None], part.shape)
            reference = np.broadcast_to(totals[None], part.shape)
            statistics = np.stack([hypothesis, reference, part], axis=-1)
            found = chrf_from_statistics(statistics.reshape(-1, 3 * CHRF_ORDER))
            scores[start : start + rows] = found.reshape(part.shape[:2])
        return np.minimum(scores / 100.0, 1.0)

    def signature(self) -> str:
        """sacreBLEU's signature."""
        metric = CHRF(beta=CHRF_BETA)
        metric.num_refs = 1
        return f"pairwise_chrf|{metric.get_signature()}"


class PairwiseBleu:
    """Sentence BLEU (exponential smoothing, effective order) over 100 of all pairs.

    Args:
      target_language: ISO code; decides the tokenizer, see `metrics.corpus.bleu_tokenizer`.

    Raises:
      ConfigError: the language is empty.
    """

    name = "bleu"

    def __init__(self, target_language: str) -> None:
        self._metric = BLEU(tokenize=bleu_tokenizer(target_language), effective_order=True, force=True)

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """Float64 [D, D] in [0, 1]; the reference is the column."""
        words = [self._metric._preprocess_segment(text).split() for text in texts]
        lengths = np.array([len(each) for each in words], np.float64)
        known: dict[str, int] = {}
        flat = np.array([known.setdefault(word, len(known)) for each in words for word in each], np.int64)
        orders = _orders(flat, lengths.astype(np.int64), BLEU_ORDER)
        matches = np.stack([_matches(*order, len(texts)) for order in orders], axis=-1)
        totals = np.maximum(lengths[:, None] - np.arange(BLEU_ORDER), 0.0)[:, None]  # [D, 1, orders]
        return np.minimum(_smoothed_bleu(matches, totals, lengths), 1.0)

    def signature(self) -> str:
        """sacreBLEU's signature."""
        self._metric.num_refs = 1
        return f"pairwise_bleu|{self._metric.get_signature()}"


class PairwiseScore:
    """Any metric that scores lists of pairs (a learned one, say) as a utility.

    Args:
      name: in tables.
      score: (hypothesis texts, reference texts) -> float64 [n], higher is better. It is called once for each
        text, with that text repeated against all.
      signature: all that the scores depend on.
    """

    def __init__(self, name: str, score: Score, signature: str = ""):
        self.name, self._score, self._signature = name, score, signature or name

    def matrix(self, texts: Sequence[str]) -> np.ndarray:
        """Float64 [D, D]; D^2 pairs are scored.

        Raises:
          DataError: the metric does not give one number a pair.
        """
        rows = [np.asarray(self._score([text] * len(texts), list(texts)), np.float64) for text in texts]
        if any(row.shape != (len(texts),) for row in rows):
            raise errors.DataError(
                f"utility {self.name!r} gave scores of shape {rows[0].shape} for {len(texts)} pairs",
                remedy="A metric returns one number for each pair",
            )
        return np.array(rows).reshape(len(texts), len(texts))

    def signature(self) -> str:
        """As it was given."""
        return self._signature


def _character_orders(texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Character n-grams without whitespace, order by order, as in `_orders`."""
    bare = ["".join(text.split()) for text in texts]
    flat = np.frombuffer("".join(bare).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    return _orders(flat, np.array([len(text) for text in bare], np.int64), CHRF_ORDER)


def _orders(flat: np.ndarray, lengths: np.ndarray, orders: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The n-grams of all texts, order by order: (text of each n-gram, number of the n-gram), both int64.

    Args:
      flat: int64, the units (characters, words) of all texts, one text after another.
      lengths: int64 [D], how many units each text has.
      orders: the longest n-gram.
    """
    units = np.unique(flat, return_inverse=True)[1].reshape(-1).astype(np.int64)
    text_of = np.repeat(np.arange(len(lengths)), lengths)
    # How many units there are from each place to the end of its text.
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(units))
    places, grams, found = np.arange(len(units)), units, []
    for order in range(1, orders + 1):
        if order > 1:  # an n-gram is the (n-1)-gram at its place and one unit more
            keep = left[places] >= order
            places, grams = places[keep], grams[keep]
            pairs = grams * (units.max(initial=0) + 1) + units[places + order - 1]
            grams = np.unique(pairs, return_inverse=True)[1].reshape(-1).astype(np.int64)
        found.append((text_of[places], grams))
    return found


def _matches(text_of: np.ndarray, grams: np.ndarray, count: int) -> np.ndarray:
    """Clipped matches of one order, sum over n-grams of min(count in i, count in j): float64 [D, D]."""
    order = np.lexsort((grams, text_of))
    text_of, grams = text_of[order], grams[order]
    # The occurrences of an n-gram in a text are its levels 0, 1, ...
    places = np.arange(len(grams))
    is_first = np.ones(len(grams), bool)
    is_first[1:] = (text_of[1:] != text_of[:-1]) | (grams[1:] != grams[:-1])
    levels = places - np.maximum.accumulate(np.where(is_first, places, 0))
    features = grams * (levels.max(initial=0) + 1) + levels
    _, columns, shared = np.unique(features, return_inverse=True, return_counts=True)
    columns = columns.reshape(-1)
    keep = shared[columns] > 1  # what one text has alone matches itself only
    matches = np.zeros((count, count))
    of_kept = np.unique(columns[keep], return_inverse=True)[1].reshape(-1)
    rows, width = text_of[keep], int(of_kept.max(initial=-1)) + 1
    step = max(1, _CELLS // max(1, count))
    for start in range(0, width, step):
        here = (of_kept >= start) & (of_kept < start + step)
        block = np.zeros((count, min(step, width - start)), np.float32)  # sums stay below 2^24: exact
        block[rows[here], of_kept[here] - start] = 1.0
        matches += block @ block.T
    np.fill_diagonal(matches, np.bincount(text_of, minlength=count))
    return matches


def _smoothed_bleu(matches: np.ndarray, totals: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Sentence BLEU in [0, 1] of all pairs, the orders without n-grams in the hypothesis left out.

    Args:
      matches: [D, D, orders].
      totals: [D, 1, orders], n-grams of the hypothesis.
      lengths: [D], words.
    """
    defined = np.broadcast_to(totals > 0, matches.shape)
    halvings = np.cumsum((matches == 0) & defined, axis=-1)  # the k-th order without a match counts as 2^-k
    smoothed = np.where(matches > 0, matches, 0.5**halvings)
    logs = np.where(defined, np.log(smoothed / np.maximum(totals, 1.0)), 0.0)
    means = logs.sum(axis=-1) / np.maximum(defined.sum(axis=-1), 1)
    ratio = lengths[None, :] / np.maximum(lengths[:, None], 1.0)
    brevity = np.exp(np.minimum(1.0 - ratio, 0.0))
    return np.where(matches.any(axis=-1), brevity * np.exp(means), 0.0)
