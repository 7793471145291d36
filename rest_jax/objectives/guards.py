"""Guards: which samples are out before any reward is looked at.

Floor 1, on the host. A reward model can be fooled by outputs that a simple check would refuse: fine-tuning
translators on their best samples drifts to wrong lengths and repetitions (He et al. 2024, arXiv:2401.12873,
whose remedy is a reward of minus infinity for such outputs). Here a guarded-out sample counts as one without
a reward: it is never ranked, never averaged, and never passes.

Guards are for samples. The original data D is not guarded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from rest_jax import errors

# The guards that are a flag of the candidate store: the column, and the value that takes a sample out.
_FLAGS = {
    "truncated": ("truncated", True),
    "empty": ("empty", True),
    "copy_of_source": ("copy_of_source", True),
    "repeated_ngram": ("repeated_ngram", True),
    "no_round_trip": ("round_trip", False),
}


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which samples are out whatever their reward; each guard is on by choice.

    Attributes:
      truncated: hit the length limit, so that they have no end to learn.
      empty: have no visible character.
      copy_of_source: are their source.
      repeated_ngram: loop.
      no_round_trip: their text encodes to other tokens than were sampled.
      length_ratio: (low, high); out is what has fewer than low or more than high tokens for each token of
        its source, ends of sentence not counted. He et al. take (0.89, 1.17) for Chinese-English and (0.73,
        0.95) for German-English; it depends on languages and vocabulary, so look at your own D first. None is
        off.
      distinct: the text is that of an earlier sample of the source which the other guards let pass.

    Raises:
      ConfigError: the length ratio is no pair 0 <= low < high.
    """

    truncated: bool = True
    empty: bool = False
    copy_of_source: bool = False
    repeated_ngram: bool = False
    no_round_trip: bool = False
    length_ratio: tuple[float, float] | None = None
    distinct: bool = False

    def __post_init__(self) -> None:
        if self.length_ratio is None:
            return
        try:
            low, high = (float(end) for end in self.length_ratio)
        except (TypeError, ValueError):
            low, high = math.nan, math.nan
        if not (0.0 <= low < high):
            raise errors.ConfigError(
                f"length ratio {self.length_ratio!r} is not a pair (low, high) with 0 <= low < high",
                where="GuardConfig.length_ratio",
                remedy="Give tokens of the output for each token of the source, like (0.5, 2.0), or None",
            )
        object.__setattr__(self, "length_ratio", (low, high))

    @property
    def flags(self) -> tuple[str, ...]:
        """The columns of flags in the candidate store that the guards need."""
        return tuple(column for guard, (column, _) in _FLAGS.items() if getattr(self, guard))

    @property
    def names(self) -> tuple[str, ...]:
        """The guards that are on, in the order in which they are asked."""
        others = [("length_ratio", self.length_ratio is not None), ("distinct", self.distinct)]
        return tuple(guard for guard in _FLAGS if getattr(self, guard)) + tuple(n for n, on in others if on)


@dataclasses.dataclass(frozen=True)
class GuardedColumns:
    """What the guards look at, for n samples of whole sources; what no guard needs may be absent.

    Attributes:
      flags: bool [n] by their column in the candidate store.
      tokens: int64 [n], tokens of each sample, its end of sentence not counted.
      source_tokens: int64 [n], the same of its source.
      source_and_text: int64 [n, 2], the source and a number that is equal for equal texts.
    """

    flags: Mapping[str, np.ndarray]
    tokens: np.ndarray | None = None
    source_tokens: np.ndarray | None = None
    source_and_text: np.ndarray | None = None


def taken_out(guards: GuardConfig, columns: GuardedColumns, rows: int) -> dict[str, np.ndarray]:
    """Which samples each guard takes out, bool [n] by guard; a sample is out by the first that objects.

    Args:
      guards: which are on.
      columns: what they look at.
      rows: n.
    """
    left = np.ones(rows, bool)
    taken = {}
    for guard in guards.names:
        objects = left & _objects(guard, guards, columns, left)
        taken[guard] = objects
        left = left & ~objects
    return taken


def _objects(guard: str, guards: GuardConfig, columns: GuardedColumns, left: np.ndarray) -> np.ndarray:
    """What one guard objects to, bool [n]; `left` are the samples that no guard before took."""
    if guard in _FLAGS:
        column, bad = _FLAGS[guard]
        return columns.flags[column] == bad
    if guard == "length_ratio":
        assert guards.length_ratio is not None
        assert columns.tokens is not None
        assert columns.source_tokens is not None
        low, high = guards.length_ratio
        return (columns.tokens < low * columns.source_tokens) | (
            columns.tokens > high * columns.source_tokens
        )
    assert columns.source_and_text is not None
    candidates = np.flatnonzero(left)
    _, first = np.unique(columns.source_and_text[candidates], axis=0, return_index=True)
    again = np.ones(len(candidates), bool)
    again[first] = False
    objects = np.zeros(len(left), bool)
    objects[candidates] = again
    return objects
