"""Ratings: what a reward model is trained on. Read from a file, or made by an automatic rater.

Floor 4. A file has the columns `source<TAB>hypothesis<TAB>score`, UTF-8, one rating a line, `.gz` if its name
says so; a first line of these words names the columns, and then `kind` and `example_id` may follow.

The automatic rater stands in where there are no human ratings, and is said to be automatic. Its scores are
sentence chrF against a reference; to those it adds damaged translations (appendix A.5 of
arXiv:2308.08998), which must lie below what they were made from; chrF alone would not see to that: a
permuted sentence keeps most of its character n-grams. Good translations of other sources teach the model to
read the source: without them it can do well by judging fluency alone.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from rest_jax import errors, files
from rest_jax.metrics.diagnostics import is_copy
from rest_jax.rewards.corruptions import Corruption, corrupt
from rest_jax.rewards.overlap import SentenceChrf

RATED, REFERENCE, SAMPLE, UNRELATED = "rated", "reference", "sample", "unrelated"
COLUMNS = ("source", "hypothesis", "score", "kind", "example_id")
_REQUIRED = 3
_TRANSFORMS = ("none", "rank")
# What the rater draws for an example, by its address.
_REFERENCE_DRAW, _CORRUPTION_DRAW, _UNRELATED_DRAW = 1, 2, 3
# The variant of a corruption says what was damaged; samples count from 1.
_REFERENCE_VARIANT = 0


@dataclasses.dataclass(frozen=True)
class Rating:
    """A scored translation.

    Attributes:
      source: what was translated.
      hypothesis: the translation; may be empty.
      score: in [0, 1], higher is better.
      kind: "rated" (by people), "reference", "sample", "unrelated" (another source's reference), or the
        name of a corruption.
      example_id: of the example; -1 where there is none.
    """

    source: str
    hypothesis: str
    score: float
    kind: str = RATED
    example_id: int = -1


@dataclasses.dataclass(frozen=True)
class RaterConfig:
    """How the automatic rater makes its ratings.

    Attributes:
      samples_per_source: different samples of the policy that are rated for each source, at most.
      corruptions_per_source: damaged translations added for each source, at most.
      corruption_kinds: which damage, in turn; names of `corruptions.Corruption`.
      unrelated_per_source: references of other sources rated as translations of each, at most.
      corruption_factor: a damaged translation scores at most this share of its original.
      reference_share: share of the sources whose reference is rated too. A reference scores 1 by
        definition; some are needed, since the reward also ranks the dataset D, and with all of them a model
        does well by telling people from machines instead of good from bad.
      score_transform: "none" keeps the scores. "rank" replaces each by its mean rank among all of them,
        scaled to [0, 1]: the same order, evenly spread, so that a reward trained on it tells translations
        apart where chrF crowds them, and a threshold t lets about 1 - t of such translations pass.
    """

    samples_per_source: int = 4
    corruptions_per_source: int = 2
    unrelated_per_source: int = 1
    corruption_kinds: tuple[str, ...] = tuple(kind.value for kind in Corruption)
    corruption_factor: float = 0.5
    reference_share: float = 0.5
    score_transform: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "corruption_kinds", tuple(self.corruption_kinds))
        unknown = [kind for kind in self.corruption_kinds if kind not in list(Corruption)]
        checks = (
            (self.samples_per_source >= 0, "samples_per_source", "Give 0 or more"),
            (self.corruptions_per_source >= 0, "corruptions_per_source", "Give 0 or more"),
            (self.unrelated_per_source >= 0, "unrelated_per_source", "Give 0 or more"),
            (not unknown, "corruption_kinds", f"Choose from {', '.join(Corruption)}"),
            (
                bool(self.corruption_kinds) or not self.corruptions_per_source,
                "corruption_kinds",
                "Name some, or set corruptions_per_source = 0",
            ),
            (0.0 <= self.corruption_factor < 1.0, "corruption_factor", "Give a share in [0, 1)"),
            (0.0 <= self.reference_share <= 1.0, "reference_share", "Give a share in [0, 1]"),
            (self.score_transform in _TRANSFORMS, "score_transform", f"Choose {' or '.join(_TRANSFORMS)}"),
        )
        for holds, name, remedy in checks:
            if not holds:
                raise errors.ConfigError(
                    f"{name} is {getattr(self, name)!r}", where=f"RaterConfig.{name}", remedy=remedy
                )


def rate_automatically(
    sources: Sequence[str],
    references: Sequence[str],
    samples: Sequence[Sequence[str]],
    example_ids: Sequence[int] | np.ndarray,
    seed: int,
    config: RaterConfig,
) -> list[Rating]:
    """Rates samples and references by sentence chrF, and adds damaged ones below their originals.

    For each source: its reference (for a share of the sources), its first different samples, corruptions of
    the reference and of samples in turn, and references of other sources. Scores: chrF / 100 against the
    reference; a damaged translation the smaller of its own chrF and `corruption_factor` times its original's
    score; an empty translation and a copy of the source 0, whether made here or sampled (unless the reference
    is a copy, too). An original that scores 0 is not damaged, as nothing can lie below it. What one example
    gives does not depend on the others, but for unrelated references and the ranks of score_transform.

    Args:
      sources: [n].
      references: [n].
      samples: for each source, its samples from the policy.
      example_ids: unsigned 64-bit numbers [n].
      seed: of the corruptions, and of which references are kept.
      config: how many of what.

    Returns:
      Ratings, source by source: the reference, samples, corruptions, unrelated references.

    Raises:
      DataError: the lists are empty or differ in length.
    """
    counts = {len(sources), len(references), len(samples), len(example_ids)}
    if len(counts) > 1 or counts == {0}:
        raise errors.DataError(
            f"cannot rate {len(sources)} sources with {len(references)} references, {len(samples)} lists of "
            f"samples and {len(example_ids)} ids",
            remedy="Give one of each for every source, and at least one source",
        )
    rater = _Rater(seed, config)
    ratings = []
    for row, (source, reference) in enumerate(zip(sources, references, strict=True)):
        example_id = int(example_ids[row])
        ratings += rater.rate(source, reference, samples[row], example_id)
        ratings += rater.rate_unrelated(source, reference, references, example_id)
    if config.score_transform == "rank":
        ranks = rank_scores(np.array([rating.score for rating in ratings]))
        ratings = [dataclasses.replace(r, score=float(s)) for r, s in zip(ratings, ranks, strict=True)]
    return ratings


def rank_scores(scores: np.ndarray) -> np.ndarray:
    """Mean rank of each score, from 0 for a lone lowest to 1 for a lone highest, float64 [n]; ties share."""
    if len(scores) < 2:
        return np.full(len(scores), 0.5)
    return (stats.rankdata(scores) - 1.0) / (len(scores) - 1.0)


class _Rater:
    """Rates one source at a time."""

    def __init__(self, seed: int, config: RaterConfig):
        self._seed, self._config, self._chrf = seed, config, SentenceChrf()

    def rate(self, source: str, reference: str, samples: Sequence[str], example_id: int) -> list[Rating]:
        config = self._config
        generator = self._generator(example_id, _REFERENCE_DRAW)
        different = [text for text in dict.fromkeys(samples) if text != reference]
        originals = [reference, *different[: config.samples_per_source]]
        scores = self._natural_scores(source, reference, originals)
        kinds = [REFERENCE] + [SAMPLE] * (len(originals) - 1)
        ratings = [
            Rating(source, text, score, kind, example_id)
            for text, score, kind in zip(originals, scores, kinds, strict=True)
        ]
        if generator.random() >= config.reference_share:
            del ratings[0]
        return ratings + self._corruptions(source, reference, originals, scores, example_id)

    def rate_unrelated(
        self, source: str, reference: str, references: Sequence[str], example_id: int
    ) -> list[Rating]:
        """Rates other references, drawn with replacement; one that is this reference is passed over."""
        count = self._config.unrelated_per_source
        drawn = self._generator(example_id, _UNRELATED_DRAW).integers(len(references), size=count)
        texts = [references[row] for row in dict.fromkeys(drawn.tolist()) if references[row] != reference]
        scores = self._natural_scores(source, reference, texts)
        rated = zip(texts, scores, strict=True)
        return [Rating(source, text, score, UNRELATED, example_id) for text, score in rated]

    def _generator(self, example_id: int, draw: int) -> np.random.Generator:
        # The upper counter words keep these draws apart from the corruptions' own, which leave word 1 at 0.
        key, counter = np.array([self._seed, example_id], np.uint64), np.array([0, draw, 0, 0], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _natural_scores(self, source: str, reference: str, texts: Sequence[str]) -> list[float]:
        scores = self._chrf.score([source] * len(texts), texts, [reference] * len(texts))
        # A name or a number may be rightly translated by itself.
        copied = [is_copy(source, text) and not is_copy(source, reference) for text in texts]
        return [0.0 if copy else float(score) for score, copy in zip(scores, copied, strict=True)]

    def _corruptions(
        self, source: str, reference: str, originals: Sequence[str], scores: Sequence[float], example_id: int
    ) -> list[Rating]:
        """Damages the reference first, then samples in turn; the kinds take turns over sources."""
        config = self._config
        damageable = [i for i, score in enumerate(scores) if score > 0.0]
        if not damageable or not config.corruptions_per_source:
            return []
        generator = self._generator(example_id, _CORRUPTION_DRAW)
        ratings: list[Rating] = []
        for kind in generator.permutation(np.array(config.corruption_kinds)):
            if len(ratings) == config.corruptions_per_source:
                break
            chosen = damageable[len(ratings) % len(damageable)]
            variant = _REFERENCE_VARIANT + chosen
            text = corrupt(str(kind), source, originals[chosen], self._seed, example_id, variant)
            if text is None:
                continue
            score = min(
                self._natural_scores(source, reference, [text])[0], config.corruption_factor * scores[chosen]
            )
            ratings.append(Rating(source, text, score, str(kind), example_id))
        return ratings


def write_ratings(path: str | os.PathLike[str], ratings: Sequence[Rating]) -> None:
    """Writes ratings as TSV with a first line that names the columns, atomically; `.gz` is compressed.

    Tabs and line breaks within texts become spaces, since the format has no other place for them.
    """
    lines = ["\t".join(COLUMNS)]
    lines += [
        f"{_one_field(r.source)}\t{_one_field(r.hypothesis)}\t{r.score!r}\t{r.kind}\t{r.example_id}"
        for r in ratings
    ]
    content = ("\n".join(lines) + "\n").encode()
    with files.atomic_path(path) as temporary:
        # Without a time stamp, equal ratings are equal bytes.
        temporary.write_bytes(gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content)


def read_ratings(
    path: str | os.PathLike[str], minimum: float = 0.0, maximum: float = 1.0, higher_is_better: bool = True
) -> list[Rating]:
    """Reads ratings and maps their scale to [0, 1], higher is better.

    Args:
      path: TSV as the module describes it, `.gz` or not.
      minimum: lowest score of the file's scale (0 for direct assessment, -25 for negated MQM errors).
      maximum: highest score of the scale (100; 0).
      higher_is_better: False for a scale of errors.

    Raises:
      MissingInputError: there is no such file.
      DataError: the file is empty, not UTF-8, has a line of too few columns, an empty source, or a score
        that is no number or off the scale; the message names file and line.
      ConfigError: minimum is not below maximum.
    """
    if not minimum < maximum:
        raise errors.ConfigError(
            f"ratings on the scale [{minimum}, {maximum}]", remedy="Give a minimum below the maximum"
        )
    lines = _lines(Path(path))
    columns: Sequence[str] = COLUMNS
    first = 0
    if lines and tuple(lines[0].split("\t")[:_REQUIRED]) == COLUMNS[:_REQUIRED]:
        columns, first = lines[0].split("\t"), 1
    ratings = []
    for number, line in enumerate(lines[first:], start=first + 1):
        rating = _parse(line, columns, f"{path}:{number}")
        if not minimum <= rating.score <= maximum:
            raise errors.DataError(
                f"score {rating.score} is not within [{minimum}, {maximum}]",
                where=f"{path}:{number}",
                remedy="Correct the line, or state the scale of the file",
            )
        share = (rating.score - minimum) / (maximum - minimum)
        ratings.append(dataclasses.replace(rating, score=share if higher_is_better else 1.0 - share))
    if not ratings:
        raise errors.DataError(f"{path} holds no ratings", remedy="Give lines of source, hypothesis, score")
    return ratings


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError as error:
        raise errors.MissingInputError(f"no ratings file {path}", remedy="Check the path") from error
    except (OSError, EOFError) as error:
        raise errors.DataError(f"cannot read {path}: {error}", remedy="Fetch or write it again") from error
    raw = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if raw[-1] == b"":
        raw.pop()
    lines = []
    for number, line in enumerate(raw, start=1):
        try:
            lines.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise errors.DataError(
                "not UTF-8", where=f"{path}:{number}", remedy="Convert the file to UTF-8"
            ) from error
    return lines


def _parse(line: str, columns: Sequence[str], where: str) -> Rating:
    fields = line.split("\t")
    if len(fields) < _REQUIRED:
        raise errors.DataError(
            f"{len(fields)} of the columns source, hypothesis, score",
            where=where,
            remedy="Separate them with tabs",
        )
    if "\0" in line:
        raise errors.DataError("a NUL character", where=where, remedy="Remove it")
    named = dict(zip(columns, fields, strict=False))
    if not named["source"].strip():
        raise errors.DataError("an empty source", where=where, remedy="Remove the line")
    score = _number(named["score"], "score", where)
    example_id = int(_number(named.get("example_id", "-1"), "example_id", where))
    return Rating(named["source"], named["hypothesis"], score, named.get("kind", RATED), example_id)


def _number(text: str, what: str, where: str) -> float:
    try:
        value = int(text) if what == "example_id" else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise errors.DataError(f"{what} {text!r} is not a number", where=where, remedy="Correct the line")
    return value


def _one_field(text: str) -> str:
    return " ".join(text.replace("\t", "\n").splitlines()) if not text.isprintable() else text
