"""The fixed shapes of decoding, and which sources share a call.

Floor 4. A row's length bucket depends on that row alone, each device gets the same number of sources at a
time, and the last batch of a bucket is filled up with dummy sources. So each bucket compiles once, and what a
source's samples are does not depend on how many devices there are or on what was asked for beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from rest_jax.errors import ConfigError, DataError
from rest_jax.generation.prefixes import Tiling
from rest_jax.types import EOS_ID, PAD_ID, RaggedTokens

# Lanes of the sampler for each row of a tile, times N: enough that a tile is full most of the time although
# samples share rows, and rows of a tile are of about the same length.
_SAMPLES_PER_ROW = 9


@dataclasses.dataclass(frozen=True)
class DecodeBatching:
    """The fixed shapes that decoding runs in. They are part of the identity of what is sampled.

    Attributes:
      source_batch: sources a device encodes, or searches, at a time.
      source_lengths: length buckets, rising: a source is padded to the first that holds it, EOS included.
      sample_batch: samples of a source that are drawn at a time; more are drawn in further calls of the same
        program. 0 draws all of them at once, which shares most (see `prefixes.py`). Another number is another
        program, equal up to rounding.
      row_batch: rows that the sampler takes through the decoder at a time, on each device.
      queue_samples: samples that a device draws in one call: its queue has as many sources, in whole batches.
    """

    source_batch: int = 32
    source_lengths: tuple[int, ...] = (16, 32, 64, 128)
    sample_batch: int = 0
    row_batch: int = 256
    queue_samples: int = 16384

    def __post_init__(self) -> None:
        where = "DecodeBatching"
        object.__setattr__(self, "source_lengths", tuple(self.source_lengths))
        for name, least in (("source_batch", 1), ("sample_batch", 0), ("row_batch", 1), ("queue_samples", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}, must be {least} or more", where=where)
        steps = np.diff((0, *self.source_lengths))
        if not self.source_lengths or np.any(steps < 1):
            raise ConfigError(
                f"source_lengths are {self.source_lengths}, must rise from 1 or more", where=where
            )

    def samples_at_a_time(self, num_samples: int) -> int:
        """N of one call, where `num_samples` are wanted."""
        return self.sample_batch or num_samples

    def queue_sources(self, num_samples: int) -> int:
        """Q: sources of one device in one call of the sampler."""
        batches = self.queue_samples // (self.samples_at_a_time(num_samples) * self.source_batch)
        return self.source_batch * max(1, batches)

    def tiling(self, num_samples: int) -> Tiling:
        """The shapes of the sampler's steps."""
        lanes = -(-_SAMPLES_PER_ROW * self.row_batch // self.samples_at_a_time(num_samples))
        return Tiling(self.row_batch, min(lanes, self.queue_sources(num_samples)), self.source_batch)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sources of one call: which of the given rows they are, and their tokens with the dummies."""

    rows: np.ndarray  # int64 [<= S]
    tokens_SxL: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """False for the dummies, bool [S]."""
        return np.arange(len(self.tokens_SxL)) < len(self.rows)

    def fill(self, values: np.ndarray) -> np.ndarray:
        """The values of the batch's rows, 0 for the dummies."""
        filled = np.zeros(len(self.tokens_SxL), values.dtype)
        filled[: len(self.rows)] = values[self.rows]
        return filled


def plan_batches(sources: RaggedTokens, lengths: tuple[int, ...], num_sources: int) -> Iterator[Batch]:
    """Groups sources by length bucket, in the order given, into batches of exactly `num_sources` rows.

    Args:
      sources: n token sequences, each ending with EOS.
      lengths: the buckets, rising.
      num_sources: rows of a batch; dummy sources (a lone EOS) fill the last one of a bucket.

    Raises:
      DataError: a source is longer than the last bucket.
    """
    if len(sources) and sources.lengths.max() > lengths[-1]:
        longest = int(np.argmax(sources.lengths))
        raise DataError(
            f"source {longest} has {sources.lengths[longest]} tokens, the longest bucket holds {lengths[-1]}",
            where="DecodeBatching.source_lengths",
            remedy="Add a longer bucket, or trim the sources to the task's feature length",
        )
    for rows in plan_rows(sources.lengths, lengths, num_sources):
        chosen = sources.take(rows)
        length = lengths[int(np.searchsorted(np.asarray(lengths), chosen.lengths[0]))]
        tokens = np.full((num_sources, length), PAD_ID, np.int32)
        tokens[:, 0] = EOS_ID
        tokens[: len(rows)] = PAD_ID
        tokens[: len(rows)][np.arange(length) < chosen.lengths[:, None]] = chosen.values
        yield Batch(rows, tokens)


def plan_rows(source_lengths: np.ndarray, buckets: tuple[int, ...], num_sources: int) -> Iterator[np.ndarray]:
    """The rows of each batch: bucket by bucket, in the order given, `num_sources` at the most.

    Args:
      source_lengths: int64 [n], tokens of each source.
      buckets: lengths, rising.
      num_sources: rows of a batch.
    """
    bucket_of = np.searchsorted(np.asarray(buckets), source_lengths)
    for bucket in range(len(buckets)):
        of_bucket = np.flatnonzero(bucket_of == bucket)
        for start in range(0, len(of_bucket), num_sources):
            yield of_bucket[start : start + num_sources]
