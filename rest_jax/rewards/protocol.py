"""What a reward is: its direction, range, version and needs are stated, and its scores are checked.

Floor 4. Inside the package higher is better. A metric where lower is better (an error count) is turned
once, at the door, by `flipped`. A score that could not be had is NaN, never a number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Sized
from typing import Protocol, runtime_checkable

import numpy as np

from rest_jax import errors

# How far rounding may carry a score past its range, as a share of the range; it is put back on the edge.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """What a reward states of itself.

    Attributes:
      name: of the reward, used in paths and tables ("learned", "sentence_chrf").
      minimum: of the range of its scores.
      maximum: of that range.
      version: what must change when scores change (a package's version, a checkpoint's digest).
      needs_reference: whether `score` reads references.
      higher_is_better: False only for a metric that has not passed `flipped` yet.
    """

    name: str
    minimum: float = 0.0
    maximum: float = 1.0
    version: str = ""
    needs_reference: bool = False
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.name:
            raise errors.ConfigError("a reward without a name", where="RewardSpec.name", remedy="Name it")
        if not (math.isfinite(self.minimum) and math.isfinite(self.maximum) and self.minimum < self.maximum):
            raise errors.ConfigError(
                f"reward {self.name!r} states the range [{self.minimum}, {self.maximum}]",
                where="RewardSpec",
                remedy="Give a finite minimum below a finite maximum",
            )


@runtime_checkable
class Reward(Protocol):
    """Scores translations: R(x, y) of arXiv:2308.08998, section 3."""

    @property
    def spec(self) -> RewardSpec:
        """Name, range, version, direction and needs."""

    def score(
        self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str] | None = None
    ) -> np.ndarray:
        """Scores of the hypotheses, float64 [n] within the stated range; NaN is a missing score."""

    def signature(self) -> str:
        """All that the scores depend on, in sacreBLEU's manner; equal signatures, equal scores."""


def checked_scores(
    reward: Reward, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str] | None = None
) -> np.ndarray:
    """Scores from a reward, with what went in and what came out checked. Callers score through this.

    Returns:
      float64 [n] within the reward's range, higher is better; NaN is a missing score.

    Raises:
      ConfigError: lower is better and nobody flipped it.
      DataError: lists of different lengths; references needed and not given; not as many scores as
        hypotheses; a score outside the range that the reward states.
    """
    spec = reward.spec
    if not spec.higher_is_better:
        raise errors.ConfigError(
            f"reward {spec.name!r} is lower-is-better", remedy="Wrap it in rewards.protocol.flipped"
        )
    check_texts(spec, sources, hypotheses, references)
    return checked_range(spec, reward.score(sources, hypotheses, references), len(hypotheses))


def check_texts(spec: RewardSpec, sources: Sized, hypotheses: Sized, references: Sized | None) -> None:
    """Checks that the texts (or tokens) to score belong together.

    Raises:
      DataError: they differ in number, or references are needed and not given.
    """
    counts = {"sources": len(sources), "hypotheses": len(hypotheses)}
    if references is not None:
        counts["references"] = len(references)
    elif spec.needs_reference:
        raise errors.DataError(
            f"reward {spec.name!r} needs references and got none",
            remedy="Score a split that has references, or use a reference-free reward",
        )
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise errors.DataError(f"reward {spec.name!r} got {shown}", remedy="Give one of each a row")


def checked_range(spec: RewardSpec, scores: np.ndarray, count: int) -> np.ndarray:
    """Checks the shape and range of scores, and puts those that rounding carried out back on the edge.

    Raises:
      DataError: not `count` numbers, or one outside the range; infinite is outside.
    """
    found = np.asarray(scores, np.float64)
    if found.shape != (count,):
        raise errors.DataError(
            f"reward {spec.name!r} gave scores of shape {found.shape} for {count} hypotheses",
            remedy="A reward returns one number for each, NaN where it has none",
        )
    slack = _ROUNDING * (spec.maximum - spec.minimum)
    outside = (found < spec.minimum - slack) | (found > spec.maximum + slack)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise errors.DataError(
            f"reward {spec.name!r} gave {found[row]} to row {row}, outside its range "
            f"[{spec.minimum}, {spec.maximum}] ({int(outside.sum())} such rows)",
            remedy="State the reward's true range",
        )
    return np.clip(found, spec.minimum, spec.maximum)


@dataclasses.dataclass(frozen=True)
class _Flipped:
    """A lower-is-better metric as a reward in [0, 1]."""

    metric: Reward

    @property
    def spec(self) -> RewardSpec:
        return dataclasses.replace(self.metric.spec, minimum=0.0, maximum=1.0, higher_is_better=True)

    def score(
        self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str] | None = None
    ) -> np.ndarray:
        own = self.metric.spec
        check_texts(own, sources, hypotheses, references)
        scores = checked_range(own, self.metric.score(sources, hypotheses, references), len(hypotheses))
        return (own.maximum - scores) / (own.maximum - own.minimum)

    def signature(self) -> str:
        own = self.metric.spec
        return f"{self.metric.signature()}|flipped:[{own.minimum:g},{own.maximum:g}]"


def flipped(metric: Reward) -> Reward:
    """Turns a metric where lower is better into a reward: its [minimum, maximum] becomes [1, 0].

    Raises:
      ConfigError: higher is better already; flipping it would reward the worst.
    """
    if metric.spec.higher_is_better:
        raise errors.ConfigError(
            f"reward {metric.spec.name!r} is higher-is-better already", remedy="Use it as it is"
        )
    return _Flipped(metric)
