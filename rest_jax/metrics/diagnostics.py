"""Signs of a policy that games its reward: wrong lengths, copies, empty or looping output, little variety.

Floor 4. They stand beside the reward at every step, since a reward can rise while the text decays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from rest_jax.metrics import corpus, words

REPEATED_ORDER = 4


def diagnostics(
    hypotheses: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    truncated: Sequence[bool] | np.ndarray | None = None,
) -> dict[str, float]:
    """Diagnostics of translations, all JSON-able numbers.

    A word is what stands between spaces, or one Chinese or Japanese character.

    Args:
      hypotheses: translations [n].
      references: [n].
      sources: [n].
      truncated: whether each translation [n] reached the length limit before its end of sentence.

    Returns:
      length_ratio: words of the hypotheses over words of the references.
      copy_rate: share of hypotheses equal to their source, but for case and spaces.
      empty_rate: share without any text.
      truncated_rate: share cut off at the length limit (0 where not given).
      distinct_1, distinct_2: different over all 1-grams and 2-grams of the corpus (Li et al. 2016).
      repeated_ngram_rate: share of hypotheses with a 4-gram that occurs twice in them.

    Raises:
      DataError: the lists are empty or differ in length.
    """
    flags = [False] * len(hypotheses) if truncated is None else list(truncated)
    corpus.check_parallel(hypotheses=hypotheses, references=references, sources=sources, truncated=flags)
    split = [words.split_words(text) for text in hypotheses]
    produced = sum(map(len, split))
    expected = sum(len(words.split_words(text)) for text in references)
    copies = [is_copy(s, h) for s, h in zip(sources, hypotheses, strict=True)]
    return {
        "length_ratio": produced / max(expected, 1),
        "copy_rate": _share(copies),
        "empty_rate": _share([not text.strip() for text in hypotheses]),
        "truncated_rate": _share([bool(flag) for flag in flags]),
        "distinct_1": distinct(split, 1),
        "distinct_2": distinct(split, 2),
        "repeated_ngram_rate": _share([has_repeated_ngram(text) for text in split]),
    }


def is_copy(source: str, hypothesis: str) -> bool:
    """Whether a hypothesis that has text is its source, but for case and spaces."""
    return bool(hypothesis.strip()) and hypothesis.casefold().split() == source.casefold().split()


def distinct(texts: Iterable[Sequence[str]], order: int) -> float:
    """Different n-grams over all n-grams of the word sequences together; 0 where there are none."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(_ngrams(text, order))
    total = counts.total()
    return len(counts) / total if total else 0.0


def has_repeated_ngram(text: Sequence[str], order: int = REPEATED_ORDER) -> bool:
    """Whether some n-gram of the words occurs more than once: the mark of a loop."""
    grams = _ngrams(text, order)
    return len(set(grams)) < len(grams)


def _ngrams(text: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + order]) for i in range(len(text) - order + 1)]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
