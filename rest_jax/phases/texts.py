"""Small steps between tokens and text that several phases take.

Floor 6.
"""

from __future__ import annotations

from collections.abc import Sequence

from rest_jax.data.vocabulary import Vocabulary
from rest_jax.types import RaggedTokens


def decode_rows(vocabulary: Vocabulary, tokens: RaggedTokens) -> list[str]:
    """The text of each token sequence."""
    return vocabulary.decode_batch([tokens[row] for row in range(len(tokens))])


def repeat_each(texts: Sequence[str], times: int) -> list[str]:
    """Each text `times` times in a row, as the N samples of a source lie."""
    return [text for text in texts for _ in range(times)]
