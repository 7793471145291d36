"""The sources that `inspect` shows, with their samples by reward: by id, by text, found, or evenly chosen.

Floor 7. Row groups are gone through one at a time; what is kept is what is shown.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rest_jax import errors
from rest_jax.data import examples
from rest_jax.report.inspect_data import FLAG_COLUMNS, Piece, flags_of, pieces, source_starts

_COLUMNS = ("source", "text", "tokens", "log_prob", "tempered_log_prob", *FLAG_COLUMNS)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One translation that was sampled.

    Attributes:
      number: which of its source's.
      text: as it was decoded.
      rewards: by name; None where one is missing.
      log_prob: the policy's own, nats, summed over its tokens.
      tempered_log_prob: that under the distribution which was sampled from.
      tokens: how many, with the end of sentence.
      flags: names in `inspect_data.FLAGS`.
    """

    number: int
    text: str
    rewards: dict[str, float | None]
    log_prob: float
    tempered_log_prob: float
    tokens: int
    flags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A source with its samples, those with the highest reward first.

    Attributes:
      example_id: of the source.
      text: the source.
      reference: its translation in the training data, or None where that is not at hand.
      samples: by the first reward, else by log-probability; samples without reward come last.
    """

    example_id: int
    text: str
    reference: str | None
    samples: list[Sample]

    @property
    def different(self) -> int:
        """How many different texts the samples have."""
        return len({sample.text for sample in self.samples})

    def rewards(self, name: str) -> list[float]:
        """The rewards of this name that are not missing."""
        found = (sample.rewards[name] for sample in self.samples)
        return [reward for reward in found if reward is not None]


def by_id_or_text(folder: Path, names: Sequence[str], wanted: str) -> Source | None:
    """The source with this example id, else the first one with exactly this text, else None."""
    is_number = wanted.removeprefix("-").isdecimal()
    with_text = None
    for piece, first, end in _spans(folder, names):
        if is_number and int(piece.samples.example_id[first]) == int(wanted):
            return _source(piece, first, end)
        if with_text is None and piece.samples.source[first] == wanted:
            with_text = _source(piece, first, end)
            if not is_number:
                break
    return with_text


def containing(folder: Path, names: Sequence[str], text: str, limit: int) -> tuple[list[Source], int, int]:
    """Sources that contain a text, or of which a sample does, whatever the case of letters.

    Args:
      folder: of the Grow step.
      names: of its rewards.
      text: what to look for.
      limit: how many are returned.

    Returns:
      the first of them; how many there are in all; how many samples contain the text.
    """
    wanted = text.casefold()
    kept: list[Source] = []
    total = samples = 0
    for piece, first, end in _spans(folder, names):
        hits = sum(wanted in sample.casefold() for sample in piece.samples.text[first:end])
        if hits or wanted in piece.samples.source[first].casefold():
            total, samples = total + 1, samples + hits
            if len(kept) < limit:
                kept.append(_source(piece, first, end))
    return kept, total, samples


def evenly(folder: Path, names: Sequence[str], total: int, limit: int) -> list[Source]:
    """At most `limit` of the `total` sources of a Grow step, evenly spaced by their ids."""
    chosen = set(np.linspace(0, total - 1, min(limit, total)).astype(int).tolist())
    spans = enumerate(_spans(folder, names))
    return [_source(piece, first, end) for place, (piece, first, end) in spans if place in chosen]


def with_references(run_dir: Path, sources: Sequence[Source]) -> list[Source]:
    """The same sources with their translations in the training data, where the run still has that."""
    path = run_dir / "data" / "train.parquet"
    targets = examples.targets_of(path, [s.example_id for s in sources]) if path.is_file() else {}
    return [dataclasses.replace(source, reference=targets.get(source.example_id)) for source in sources]


def check_limit(limit: int) -> None:
    """A number of sources to show.

    Raises:
      ConfigError: it is less than 1.
    """
    if limit < 1:
        raise errors.ConfigError(f"{limit} sources cannot be shown", where="--limit", remedy="Give 1 or more")


def _spans(folder: Path, names: Sequence[str]) -> Iterator[tuple[Piece, int, int]]:
    """Each source as (piece, first row, end)."""
    for piece in pieces(folder, names, _COLUMNS):
        starts = source_starts(piece.samples).tolist()
        for first, end in zip(starts, [*starts[1:], len(piece.samples)], strict=True):
            yield piece, first, end


def _source(piece: Piece, first: int, end: int) -> Source:
    samples = piece.samples
    flags = flags_of(samples)
    lengths = samples.tokens.lengths
    found = [
        Sample(
            number=int(samples.sample[row]),
            text=samples.text[row],
            rewards={name: _finite(rewards[row]) for name, rewards in piece.rewards.items()},
            log_prob=float(samples.log_prob[row]),
            tempered_log_prob=float(samples.tempered_log_prob[row]),
            tokens=int(lengths[row]),
            flags=tuple(name for name, where in flags.items() if where[row]),
        )
        for row in range(first, end)
    ]
    return Source(
        int(samples.example_id[first]), samples.source[first], None, sorted(found, key=_rank(piece))
    )


def _rank(piece: Piece) -> Callable[[Sample], tuple[bool, float, int]]:
    leading = next(iter(piece.rewards), None)

    def rank(sample: Sample) -> tuple[bool, float, int]:
        value = sample.log_prob if leading is None else sample.rewards[leading]
        return value is None, -(value or 0.0), sample.number

    return rank


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
