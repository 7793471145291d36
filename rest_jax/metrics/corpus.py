"""Corpus BLEU and chrF by sacreBLEU, each with its signature and a bootstrap interval.

Floor 4. sacreBLEU reads the sentences into sufficient statistics; the formulas below evaluate those of
the corpus and of all bootstrap resamples at once. The corpus value equals sacreBLEU's own (a test holds
it), only the thousand resamples cost one matrix product instead of a loop.

Sources: Papineni et al. 2002 (BLEU); Chen and Cherry 2014, method 3 (exponential smoothing); Popović 2015
(chrF); Post 2018 (signatures).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric

from rest_jax import errors
from rest_jax.metrics import bootstrap

BLEU_ORDER = 4
CHRF_BETA = 2
# Languages whose words the default tokenizer cannot see: it would take a whole clause for one word.
_UNSPACED_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab"}
_NEEDS_PACKAGE = {"ja-mecab": "MeCab"}


def bleu_tokenizer(target_language: str, tokenizer: str | None = None) -> str:
    """The BLEU tokenizer for a target language: zh for Chinese, ja-mecab for Japanese, else 13a.

    Where MeCab is not installed, Japanese is cut into characters; the signature says so (`tok:char`).

    Args:
      target_language: ISO code, a region may follow ("de", "zh", "zh-CN").
      tokenizer: one to use in place of the language's own.

    Raises:
      ConfigError: the language is empty, or 13a is asked for where words are not written apart.
    """
    language = target_language.lower().replace("_", "-").split("-")[0]
    if not language:
        raise errors.ConfigError(
            "the target language is not set, so the BLEU tokenizer is unknown", remedy='Set it, e.g. "en"'
        )
    own = _UNSPACED_TOKENIZERS.get(language, "13a")
    if own in _NEEDS_PACKAGE and importlib.util.find_spec(_NEEDS_PACKAGE[own]) is None:
        own = "char"
    if tokenizer in ("13a", "intl", "none") and own != "13a":
        raise errors.ConfigError(
            f"BLEU tokenizer {tokenizer!r} does not see the words of {target_language!r}",
            remedy=f"Use {own!r}, or leave the tokenizer to the language",
        )
    return tokenizer or own


def corpus_metrics(
    hypotheses: Sequence[str],
    references: Sequence[str],
    target_language: str,
    seed: int,
    resamples: int = 1000,
    groups: Sequence[Hashable] | np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """BLEU and chrF of a corpus, 0 to 100, with 95 % bootstrap intervals and signatures.

    Args:
      hypotheses: translations [n], detokenized.
      references: one a translation [n].
      target_language: decides the BLEU tokenizer, see `bleu_tokenizer`.
      seed: of the bootstrap.
      resamples: how many.
      groups: the source of each translation where there are several a source; resampled together.

    Returns:
      {"bleu": {"mean", "ci95": [low, high], "signature"}, "chrf": {...}}; "mean" is the corpus score.

    Raises:
      DataError: the lists are empty or differ in length.
      ConfigError: the language is not set.
    """
    check_parallel(hypotheses=hypotheses, references=references)
    bleu = BLEU(tokenize=bleu_tokenizer(target_language), force=True)
    chrf = CHRF(beta=CHRF_BETA)
    result = {}
    scorers: list[tuple[str, Metric, Callable[[np.ndarray], np.ndarray]]] = [
        ("bleu", bleu, bleu_from_statistics),
        ("chrf", chrf, chrf_from_statistics),
    ]
    for name, metric, score in scorers:
        statistics = segment_statistics(metric, hypotheses, references)
        units = bootstrap.sum_by_group(statistics, groups)
        draws = score(bootstrap.resampled_sums(units, seed, resamples))
        own = str(metric.get_signature())
        result[name] = {
            "mean": float(score(statistics.sum(axis=0, keepdims=True))[0]),
            "ci95": bootstrap.percentile_interval(draws),
            "signature": f"{own}|{bootstrap.interval_signature(seed, resamples, groups is not None)}",
        }
    return result


def segment_statistics(metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """sacreBLEU's sufficient statistics of each sentence, float64 [n, k]; they add up over a corpus."""
    rows = metric._extract_corpus_statistics(list(hypotheses), [list(references)])
    return np.asarray(rows, np.float64)


def bleu_from_statistics(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU (0 to 100) with exponential smoothing from summed statistics.

    Args:
      sums: [m, 2 + 2 × 4]: hypothesis length, reference length, matches by order, n-grams by order.

    Returns:
      float64 [m].
    """
    lengths, reference_lengths = sums[:, 0], sums[:, 1]
    matches, totals = sums[:, 2 : 2 + BLEU_ORDER], sums[:, 2 + BLEU_ORDER :]
    # The k-th order without a match counts as 2^-k matches.
    halvings = np.cumsum(matches == 0, axis=1)
    smoothed = np.where(matches == 0, 0.5**halvings, matches)
    defined = matches.any(axis=1) & (totals > 0).all(axis=1)
    precisions = smoothed / np.where(totals > 0, totals, 1.0)
    ratio = reference_lengths / np.where(lengths > 0, lengths, 1.0)
    brevity = np.where(lengths < reference_lengths, np.exp(np.minimum(1.0 - ratio, 0.0)), 1.0)
    scores = 100.0 * brevity * np.exp(np.log(precisions).mean(axis=1))
    return np.where(defined, scores, 0.0)


def chrf_from_statistics(sums: np.ndarray) -> np.ndarray:
    """Corpus chrF (0 to 100, β = 2, six character orders) from summed statistics.

    Args:
      sums: [m, 6 × 3]: for each order hypothesis n-grams, reference n-grams, matches.

    Returns:
      float64 [m].
    """
    by_order = sums.reshape(len(sums), -1, 3)
    hypothesis, reference, matches = by_order[..., 0], by_order[..., 1], by_order[..., 2]
    counts = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counts.sum(axis=1), 1)
    precision = np.where(counts, matches / np.maximum(hypothesis, 1.0), 0.0).sum(axis=1) / orders
    recall = np.where(counts, matches / np.maximum(reference, 1.0), 0.0).sum(axis=1) / orders
    factor = CHRF_BETA**2
    weighted = factor * precision + recall
    return 100.0 * (1 + factor) * precision * recall / np.where(weighted > 0, weighted, 1.0)


def check_parallel(**lists: Sequence[Any]) -> None:
    """Checks that named lists are not empty and equally long.

    Raises:
      DataError: they are not; the message names them and their lengths.
    """
    lengths = {name: len(values) for name, values in lists.items()}
    shown = ", ".join(f"{count} {name}" for name, count in lengths.items())
    if len(set(lengths.values())) > 1:
        raise errors.DataError(f"lists that belong together differ in length: {shown}")
    if 0 in lengths.values():
        raise errors.DataError(f"nothing to score: {shown}")
