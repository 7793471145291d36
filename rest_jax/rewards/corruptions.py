"""Corruptions of translations: the unit tests that a reward model has to pass.

Floor 4. The paper tests its reward model on hand-made damage such as permuted and repeated sentences, and
found that repeating a sentence could raise the reward (arXiv:2308.08998, appendix A.5). Each corruption is
a function of (seed, example id, variant) alone, and differs from its original by more than spaces.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import numpy as np

from rest_jax.metrics.words import join_words, split_words


class Corruption(enum.StrEnum):
    """How a translation is damaged. The order is part of what is drawn: add at the end only."""

    PERMUTED = "permuted"
    """Its words in another order."""
    REPEATED = "repeated"
    """The sentence twice, or a phrase of it several times over."""
    TRUNCATED = "truncated"
    """Its first words only, at most two thirds of them."""
    COPIED = "copied"
    """The source in place of the translation."""
    EMPTY = "empty"
    """Nothing."""


def corrupt(
    kind: Corruption | str, source: str, text: str, seed: int, example_id: int, variant: int = 0
) -> str | None:
    """Damages a translation.

    Args:
      kind: which damage.
      source: what was translated.
      text: the translation. Words are what stands between spaces, or Chinese and Japanese characters.
      seed: of the run.
      example_id: of the example, an unsigned 64-bit number.
      variant: tells several translations of one example apart.

    Returns:
      The damaged text, or None where this damage is none (a single word cannot be permuted).
    """
    kind = Corruption(kind)
    kind_number = list(Corruption).index(kind)
    # The address is the key and the upper words of the counter; draws advance the lowest.
    counter = np.array([0, 0, kind_number, variant], np.uint64)
    key = np.array([seed, example_id], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    words = split_words(text)
    damaged = source if kind is Corruption.COPIED else _DAMAGE[kind](words, generator)
    if damaged is None or split_words(damaged) == words:
        return None
    if kind is Corruption.COPIED and not source.strip():
        return None
    return damaged


def _permuted(words: list[str], generator: np.random.Generator) -> str | None:
    order = generator.permutation(len(words))
    shuffled = [words[i] for i in order]
    # Where the draw is the identity, a rotation differs unless all words are equal.
    return join_words(shuffled if shuffled != words else words[1:] + words[:1])


def _repeated(words: list[str], generator: np.random.Generator) -> str | None:
    if generator.random() < 0.5 or len(words) < 2:
        return join_words(words + words)
    length = int(generator.integers(1, min(3, len(words) - 1) + 1))
    start = int(generator.integers(0, len(words) - length + 1))
    phrase = words[start : start + length]
    times = int(generator.integers(1, 4))
    return join_words(words[: start + length] + phrase * times + words[start + length :])


def _truncated(words: list[str], generator: np.random.Generator) -> str | None:
    if len(words) < 2:
        return None
    longest = max(1, 2 * len(words) // 3)
    return join_words(words[: int(generator.integers(1, longest + 1))])


def _empty(words: list[str], generator: np.random.Generator) -> str | None:
    return ""


_DAMAGE: dict[Corruption, Callable[[list[str], np.random.Generator], str | None]] = {
    Corruption.PERMUTED: _permuted,
    Corruption.REPEATED: _repeated,
    Corruption.TRUNCATED: _truncated,
    Corruption.EMPTY: _empty,
}
