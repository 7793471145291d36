"""Is a reward any good? Its rank correlation with ratings, and whether it sees damage.

Floor 4. Two questions on sources that the reward was not trained on: does it order translations as their
ratings do, over all of them and among those of one source (what a filter and best-of-N live on); and does
it rank each corruption (appendix A.5 of arXiv:2308.08998) strictly below the translation it was made from?
A good correlation alone is not enough: a policy finds what the reward does not see. That a good translation
of another source is ranked below the own one shows that the reward reads the source at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rest_jax import errors
from rest_jax.metrics import rank
from rest_jax.rewards.corruptions import Corruption, corrupt
from rest_jax.rewards.protocol import Reward, checked_scores
from rest_jax.rewards.ratings import REFERENCE, UNRELATED, Rating

AUTOMATIC_RATER = "automatic: sentence chrF against references"
SCATTER_POINTS = 500


def validate_reward(
    reward: Reward, ratings: Sequence[Rating], seed: int, rater: str = AUTOMATIC_RATER
) -> dict[str, Any]:
    """Judges a reward on held-out ratings.

    Correlations are over translations alone: references, which an overlap metric gives 1 by definition,
    corruptions and unrelated references among the ratings are left out, as they are easy and would raise the
    figure. Corruptions are made anew here, of every kind: of the reference of each source or, where a source
    has none, of its best rated translation ("corruptions"); and of one further translation of each
    ("corruptions_of_samples"), which is harder, since that may be bad to begin with. "unrelated" compares the
    same best translations with those of the next source. Pairs with a missing reward are not counted.

    Args:
      reward: what is judged; one that needs references finds them among the ratings.
      ratings: of sources that it was not trained on.
      seed: of the corruptions and of the choice of points for the scatter plot.
      rater: where the ratings come from, in words; it goes into the report.

    Returns:
      JSON-able: spearman, kendall (pooled), spearman_within_source, kendall_within_source (means over
      sources), n, sources, missing, corruptions and corruptions_of_samples ({kind: {"share_below", "n"}}),
      unrelated ({"share_below", "n"}), rater, signature, scatter ([[score, reward], …], at most 500). What
      does not exist is None.

    Raises:
      DataError: no translation is rated; or the reward needs references and one is missing.
    """
    kinds = {*Corruption, REFERENCE, UNRELATED}
    judged = [rating for rating in ratings if rating.kind not in kinds]
    if not judged:
        raise errors.DataError(
            f"no translation among {len(ratings)} ratings to validate reward {reward.spec.name!r} on",
            remedy="Hold out some sources with their samples",
        )
    references = {_source_key(r): r.hypothesis for r in ratings if r.kind == REFERENCE}
    rewards = _rewards(reward, judged, references)
    scores = np.array([rating.score for rating in judged])
    groups = [_source_key(rating) for rating in judged]
    present = ~np.isnan(rewards)
    best, others = _originals(ratings, judged)
    return {
        "spearman": rank.spearman(scores, rewards),
        "kendall": rank.kendall(scores, rewards),
        "spearman_within_source": rank.mean_within(scores, rewards, groups, rank.spearman),
        "kendall_within_source": rank.mean_within(scores, rewards, groups, rank.kendall),
        "n": int(present.sum()),
        "sources": len({group for group, here in zip(groups, present, strict=True) if here}),
        "missing": int((~present).sum()),
        "corruptions": corruption_report(reward, best, seed, references),
        "corruptions_of_samples": corruption_report(reward, others, seed, references),
        "unrelated": _unrelated_report(reward, best, references),
        "rater": rater,
        "signature": reward.signature(),
        "scatter": _scatter(scores[present], rewards[present], seed),
    }


def corruption_report(
    reward: Reward, originals: Sequence[Rating], seed: int, references: dict[Any, str] | None = None
) -> dict[str, dict[str, Any]]:
    """How often each corruption of these translations is rewarded strictly less than its original.

    Args:
      reward: what is judged.
      originals: translations to damage.
      seed: of the damage.
      references: by source, for a reward that needs them.

    Returns:
      {kind: {"share_below": in [0, 1] or None where n is 0, "n": comparisons}} for every kind.
    """
    pairs: list[tuple[Corruption, int, Rating]] = []
    for row, original in enumerate(originals):
        for kind in Corruption:
            text = corrupt(
                kind, original.source, original.hypothesis, seed, max(original.example_id, 0), variant=row
            )
            if text is not None:
                damaged = Rating(original.source, text, 0.0, kind.value, original.example_id)
                pairs.append((kind, row, damaged))
    known = references or {}
    of_original = _rewards(reward, originals, known)
    of_damaged = _rewards(reward, [damaged for _, _, damaged in pairs], known)
    below: dict[Corruption, list[bool]] = {kind: [] for kind in Corruption}
    for (kind, row, _), value in zip(pairs, of_damaged, strict=True):
        if not np.isnan([value, of_original[row]]).any():
            below[kind].append(bool(value < of_original[row]))
    return {kind.value: _share_below(flags) for kind, flags in below.items()}


def _unrelated_report(
    reward: Reward, originals: Sequence[Rating], references: dict[Any, str]
) -> dict[str, Any]:
    """How often the translation of the next source is rewarded strictly less than the own one."""
    pairs = [
        (own, dataclasses.replace(own, hypothesis=other.hypothesis))
        for own, other in zip(originals, [*originals[1:], *originals[:1]], strict=True)
        if own.hypothesis != other.hypothesis
    ]
    of_own = _rewards(reward, [own for own, _ in pairs], references)
    of_other = _rewards(reward, [other for _, other in pairs], references)
    present = ~(np.isnan(of_own) | np.isnan(of_other))
    return _share_below((of_other < of_own)[present].tolist())


def _share_below(flags: Sequence[bool]) -> dict[str, Any]:
    return {"share_below": float(np.mean(flags)) if flags else None, "n": len(flags)}


def _rewards(reward: Reward, rated: Sequence[Rating], references: dict[Any, str]) -> np.ndarray:
    if not rated:
        return np.zeros(0)
    wanted: list[str] | None = None
    if reward.spec.needs_reference:
        missing = next((r for r in rated if _source_key(r) not in references), None)
        if missing is not None:
            raise errors.DataError(
                f"reward {reward.spec.name!r} needs references and example {missing.example_id} "
                f"({missing.source[:40]!r}) has none",
                remedy="Hold out ratings with references (reference_share = 1)",
            )
        wanted = [references[_source_key(r)] for r in rated]
    return checked_scores(reward, [r.source for r in rated], [r.hypothesis for r in rated], wanted)


def _originals(ratings: Sequence[Rating], judged: Sequence[Rating]) -> tuple[list[Rating], list[Rating]]:
    """For each source what is best, its reference or best rated translation; and its first other one."""
    best: dict[Any, Rating] = {}
    for rating in [r for r in ratings if r.kind == REFERENCE] + sorted(judged, key=lambda r: -r.score):
        if rating.hypothesis.strip():
            best.setdefault(_source_key(rating), rating)
    others: dict[Any, Rating] = {}
    for rating in judged:
        key = _source_key(rating)
        if key in best and rating is not best[key] and rating.hypothesis.strip():
            others.setdefault(key, rating)
    return list(best.values()), list(others.values())


def _source_key(rating: Rating) -> Any:
    """What groups the translations of one source: its id, or its text where it has no id."""
    return rating.example_id if rating.example_id >= 0 else rating.source


def _scatter(scores: np.ndarray, rewards: np.ndarray, seed: int) -> list[list[float]]:
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(scores))
    rows = np.sort(order[:SCATTER_POINTS])
    points = np.stack([scores[rows], rewards[rows]], axis=1)
    return [[round(score, 6), round(value, 6)] for score, value in points.tolist()]
