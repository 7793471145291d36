"""What every filter of Improve is made of: a rule a step, made by a schedule, judging whole sources.

Floor 1, on the host, in float64. A candidate whose reward is missing (NaN) or infinite never passes, is
never ranked and never averaged; a sample that a guard took out has NaN for its reward, so it does neither.

A new filter is one frozen dataclass that is a `Selection`: it checks its schedule and returns its rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import numpy as np

from rest_jax import errors

# (rewards float64 [n], starts int64 [m]) -> bool [n]
Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The filter of one Improve step.

    Attributes:
      kind: which filter it is: "threshold", "percentile", "mean_max", "top_k", or "unfiltered".
      value: its setting in this step: τ, p, γ or k.
      said: the same for messages, such as "threshold 0.95" or "percentile 0.9 of each source".
      remedy: what to change where it keeps nothing.
      judge: which candidates pass, bool [n], from their rewards, float64 [n], and the first row of each
        source, int64 [m], rising from 0. Candidates of a source stand together, in the order in which ties
        are broken.
      threshold: τ where there is one for all sources; None where each source is judged on its own.
      quantile: the share that τ was taken from, or None.
    """

    kind: Literal["threshold", "percentile", "mean_max", "top_k", "unfiltered"]
    value: float
    said: str
    remedy: str
    judge: Judge
    threshold: float | None = None
    quantile: float | None = None


def unfiltered() -> Rule:
    """Keeps every candidate that has a reward: the paper's "I=0" (section 4)."""

    def judge(rewards: np.ndarray, starts: np.ndarray) -> np.ndarray:
        del starts
        return np.isfinite(rewards)

    return Rule("unfiltered", 0.0, "no filter", "Look at the guards, and at what the reward returned", judge)


class Selection(Protocol):
    """A schedule of filters: one rule for each Improve step of a Grow step."""

    def __len__(self) -> int:
        """I, how many Improve steps it is for."""

    def rules(self, rewards: np.ndarray | Iterable[np.ndarray]) -> tuple[Rule, ...]:
        """The rules, one an Improve step.

        Args:
          rewards: of all candidates, [n] or chunks that can be gone through again; only a schedule that
            depends on the whole set reads them.

        Raises:
          DataError: they are read and none is finite.
        """


def source_starts(source_ids: np.ndarray) -> np.ndarray:
    """The first row of each source, int64 [m], in rows [n] that stand together by source."""
    if not len(source_ids):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], source_ids[1:] != source_ids[:-1]]))


def rows_by_source(starts: np.ndarray, rows: int) -> np.ndarray:
    """For each of `rows` rows, which of the m sources it is of, int64 [n]."""
    return np.repeat(np.arange(len(starts)), np.diff(starts, append=rows))


def ranks_in_source(starts: np.ndarray, *sort_keys: np.ndarray) -> np.ndarray:
    """The place of each row among those of its source, int64 [n], from 0; equal rows keep their order.

    Args:
      starts: int64 [m], the first row of each source.
      *sort_keys: arrays [n]; the first decides, the next where it is equal, low values first.
    """
    rows = len(sort_keys[0])
    source = rows_by_source(starts, rows)
    order = np.lexsort((*reversed(sort_keys), source))
    ranks = np.empty(rows, np.int64)
    ranks[order] = np.arange(rows) - starts[source]
    return ranks


def checked_schedule(
    entries: Any,
    where: str,
    *,
    noun: str,
    one_allowed: bool = True,
    remedy: str = "Rewards are scaled to [0, 1]",
) -> tuple[float, ...]:
    """The entries of a schedule as floats in [0, 1], strictly rising.

    Args:
      entries: what was given.
      where: the class and field, for messages.
      noun: what an entry is called.
      one_allowed: whether 1 may be among them.
      remedy: said where an entry is out of range.

    Raises:
      ConfigError: it is no list of numbers, is empty, out of range, or does not rise.
    """
    try:
        checked = tuple(float(entry) for entry in entries)
    except (TypeError, ValueError) as error:
        raise errors.ConfigError(
            f"{entries!r} is not a list of numbers", where=where, remedy="Write it like (0.7, 0.8, 0.9)"
        ) from error
    if not checked:
        raise errors.ConfigError(
            f"{noun} list is empty", where=where, remedy=f"Give one {noun} an Improve step"
        )
    for entry in checked:
        if not 0.0 <= entry <= 1.0 or (entry == 1.0 and not one_allowed):
            span = "[0, 1]" if one_allowed else "[0, 1)"
            raise errors.ConfigError(f"{noun} {entry} is not in {span}", where=where, remedy=remedy)
    for before, after in zip(checked, checked[1:], strict=False):
        if after <= before:
            verb = "falls" if after < before else "does not rise"
            raise errors.ConfigError(
                f"{noun} list {verb}: {before} then {after}",
                where=where,
                remedy=f"List the {noun}s strictly rising, one an Improve step",
            )
    return checked
