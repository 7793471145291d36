"""The candidate store of Grow: samples with their log-probabilities, and beside them their rewards.

Floor 3; no TensorFlow, plain Parquet that pandas or polars open as it is:

    GROW/samples-00003-of-00016.parquet     rows sorted by (example_id, sample); a shard is a range of ids
    GROW/samples-00003-of-00016.json        its commit record
    GROW/SEAL.json                          written last
    GROW/rewards/NAME/rewards-00003-of-00016.parquet   one row for each row of the sample shard, in its order
    GROW/rewards/NAME/…                     record and seal likewise

A shard may be larger than memory: it can be written in pieces, and `read_batches` reads it by row groups. The
seal names every shard with its digest; a shard's record tells what is in it and where it comes from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rest_jax import errors, files
from rest_jax.data import shards
from rest_jax.data.candidate_reader import (
    REWARD_SCHEMA,
    REWARDS_FOLDER,
    Batch,
    CandidateReader,
    overlap,
    rewards_folder,
)
from rest_jax.data.candidate_shard import FLAGS, SCHEMA, CandidateShard, to_table
from rest_jax.objectives.statistics import ExactSum, Summary

__all__ = [
    "FLAGS",
    "REWARDS_FOLDER",
    "REWARD_SCHEMA",
    "Batch",
    "CandidateReader",
    "CandidateShard",
    "CandidateWriter",
    "RewardWriter",
    "read_batches",
    "read_scored",
    "read_shards",
    "rewards_folder",
]


class CandidateWriter:
    """Writes the sample shards of a Grow step; a writer of a later run finds what is committed.

    Args:
      folder: of the Grow step.
      num_shards: shards the sorted example ids are cut into; the caller gives each its range of them.
      identity: digest of what the samples depend on; by default that of the folder's `files.claim`. A
        shard that states another one is made anew.
      origin: what the samples come from (the policy's digest, the sampling), JSON-able; each shard's record
        repeats it, so that a shard explains itself.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_shards: int,
        identity: str = "",
        origin: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder)
        self._identity = identity or _claimed_identity(self.folder)
        self._origin = {"origin": dict(origin)} if origin else {}
        self._shards = shards.ShardFolder(self.folder, "samples", num_shards)

    @property
    def discarded(self) -> Mapping[str, str]:
        """Shards that `missing_shards` threw away, with the reason."""
        return self._shards.discarded

    def missing_shards(self, among: range | None = None) -> list[int]:
        """Verifies committed shards, throws away damaged and foreign ones, and lists those to be made.

        Args:
          among: the shards to look at, where other jobs make the rest; None takes all.
        """
        return self._shards.missing(lambda index: {"identity": self._identity}, among)

    def uncommitted(self) -> list[int]:
        """Shards that are not committed yet, by whichever job."""
        return self._shards.uncommitted()

    def write_shard(self, index: int, samples: CandidateShard | Iterable[CandidateShard]) -> None:
        """Sorts and commits one shard.

        Args:
          index: number of the shard.
          samples: all of them; or pieces, each with samples that come after those of the piece before. The
            bytes are the same, but of pieces only one and a row group are in memory.

        Raises:
          DataError: a sample is there twice, the pieces are not in order, or a column is missing.
          NonFiniteError: a log-probability is NaN or infinite.
          OutputError: the folder cannot be written.
        """
        pieces = [samples] if isinstance(samples, CandidateShard) else samples
        tally = _SampleTally()

        def facts() -> dict[str, Any]:
            return {**tally.facts(), "identity": self._identity, **self._origin}

        self._shards.commit(index, SCHEMA, map(tally.table, pieces), facts)

    def totals(self) -> dict[str, float]:
        """Sums over all committed shards: rows, tokens, log-probabilities, and how often each flag is set.

        Raises:
          MissingInputError: a shard is not committed.
          DataError: the ranges of ids of two shards overlap.
        """
        records = self._shards.records()
        spans = [(record["first_id"], record["last_id"]) for record in records if record["rows"]]
        for (_, before), (after, _) in zip(spans, spans[1:], strict=False):
            if after <= before:
                raise overlap(before, after, str(self.folder))
        totals: dict[str, float] = {"rows": sum(record["rows"] for record in records)}
        for name in records[0]["sums"]:
            values = [record["sums"][name] for record in records]
            totals[name] = sum(values) if isinstance(values[0], int) else math.fsum(values)
        return totals

    def seal(self, facts: Mapping[str, Any] | None = None, skip: Sequence[str] = ()) -> files.Seal:
        """Commits the whole Grow step; `totals` are among the seal's facts.

        Args:
          facts: further facts.
          skip: names in the folder that are no part of the artefact; the rewards never are.

        Raises:
          MissingInputError: a shard is not committed.
          DataError: the ranges of ids of two shards overlap.
        """
        facts = {**self.totals(), **(facts or {})}
        return files.write_seal(self.folder, "grow", self._identity, facts, skip=(REWARDS_FOLDER, *skip))


def read_batches(
    folder: str | os.PathLike[str], columns: Sequence[str] | None = None, rewards: Sequence[str] = ()
) -> Iterator[Batch]:
    """Reads a sealed Grow step a row group at a time, with as many rewards beside it as one likes.

    Args:
      folder: of the Grow step.
      columns: names in `candidate_shard.SCHEMA`; all by default. (example_id, sample) is always read.
      rewards: names of the rewards.

    Raises:
      MissingInputError: the samples or these rewards are missing or unfinished.
      IntegrityError: a shard is missing or damaged, or rewards are those of other samples.
      ConfigError: there is no such column, or a name cannot name a folder.
    """
    yield from CandidateReader(folder, rewards).batches(columns)


def read_shards(
    folder: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[CandidateShard]:
    """Reads a sealed Grow step shard by shard, each as a whole: for shards that fit in memory.

    Args:
      folder: of the Grow step.
      columns: as in `read_batches`.

    Raises:
      MissingInputError: the folder is missing or unfinished.
      IntegrityError: a shard is missing or damaged; the message names it and the remedy.
      ConfigError: there is no such column.
    """
    yield from (batch.samples() for batch in CandidateReader(folder).batches(columns, whole=True))


def read_scored(
    folder: str | os.PathLike[str], reward_name: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[CandidateShard, np.ndarray]]:
    """Reads a Grow step with its rewards shard by shard: (samples, rewards float64 [n]).

    Args:
      folder: of the Grow step.
      reward_name: which rewards.
      columns: as in `read_batches`.

    Raises:
      MissingInputError: the samples or these rewards are missing or unfinished.
      IntegrityError: a shard is missing or damaged, or the rewards are those of other samples.
      ConfigError: there is no such column, or the name cannot name a folder.
    """
    for batch in CandidateReader(folder, [reward_name]).batches(columns, whole=True):
        yield batch.samples(), batch.rewards[reward_name]


class RewardWriter:
    """Writes the rewards of a sealed Grow step, aligned row by row with its shards.

    Args:
      folder: of the Grow step.
      reward_name: names the rewards' folder.
      identity: digest of what the rewards depend on (the reward's signature, its weights); by default that of
        the `files.claim` of the rewards' folder.

    Raises:
      MissingInputError: the Grow step is missing or unfinished.
      ConfigError: the name cannot name a folder.
    """

    def __init__(self, folder: str | os.PathLike[str], reward_name: str, identity: str = ""):
        self.folder = rewards_folder(folder, reward_name)
        self._identity = identity or _claimed_identity(self.folder)
        self._reader = CandidateReader(folder)
        self._shards = shards.ShardFolder(self.folder, "rewards", len(self._reader.shards))

    @property
    def discarded(self) -> Mapping[str, str]:
        """Shards that `missing_shards` threw away, with the reason."""
        return self._shards.discarded

    def missing_shards(self, among: range | None = None) -> list[int]:
        """Verifies committed shards, throws away damaged and foreign ones, and lists those to be made.

        Args:
          among: the shards to look at, where other jobs make the rest; None takes all.
        """
        return self._shards.missing(self._origin, among)

    def uncommitted(self) -> list[int]:
        """Shards that are not committed yet, by whichever job."""
        return self._shards.uncommitted()

    @property
    def num_shards(self) -> int:
        """Shards of the Grow step."""
        return len(self._reader.shards)

    def samples(self, index: int, columns: Sequence[str] | None = None) -> CandidateShard:
        """The samples of a shard, verified: what is to be scored.

        Raises:
          IntegrityError: the shard is missing or damaged.
          ConfigError: there is no such column.
        """
        (batch,) = self._reader.batches(columns, shard=index, whole=True)
        return batch.samples()

    def batches(self, index: int, columns: Sequence[str] | None = None) -> Iterator[CandidateShard]:
        """The same samples, a row group at a time."""
        return (batch.samples() for batch in self._reader.batches(columns, shard=index))

    def write_shard(self, index: int, shard: CandidateShard, rewards_n: np.ndarray) -> None:
        """Commits the rewards of one shard.

        Args:
          index: number of the shard.
          shard: the samples that were scored, as `samples` gave them.
          rewards_n: float64, higher is better; NaN where the reward is missing.

        Raises:
          DataError: not one reward a sample.
          OutputError: the folder cannot be written.
        """
        rewards_n = np.asarray(rewards_n, np.float64)
        if rewards_n.shape != (len(shard),):
            raise errors.DataError(
                f"{rewards_n.size} rewards for the {len(shard)} samples of shard {index}",
                where=str(self.folder),
                remedy="A reward returns one number a sample, NaN where it has none",
            )
        columns = [shard.example_id, shard.sample, rewards_n]
        table = pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, REWARD_SCHEMA, strict=True)], schema=REWARD_SCHEMA
        )
        facts = {**_id_range(shard.example_id), **self._origin(index), "sums": _reward_sums(rewards_n)}
        self._shards.commit(index, REWARD_SCHEMA, [table], lambda: facts)

    def totals(self) -> dict[str, float | None]:
        """Over all committed shards: rows, how many rewards are finite, their mean and their extremes.

        Raises:
          MissingInputError: a shard is not committed.
        """
        records = self._shards.records()
        sums = [record["sums"] for record in records if record["sums"]["finite"]]
        finite = sum(each["finite"] for each in sums)
        return {
            "rows": sum(record["rows"] for record in records),
            "finite": finite,
            "mean": math.fsum(each["reward"] for each in sums) / finite if finite else None,
            "minimum": min((each["minimum"] for each in sums), default=None),
            "maximum": max((each["maximum"] for each in sums), default=None),
        }

    def seal(self, facts: Mapping[str, Any] | None = None) -> files.Seal:
        """Commits the rewards; `totals` are among the seal's facts.

        Raises:
          MissingInputError: a shard is not committed.
        """
        facts = {**self.totals(), **(facts or {})}
        return files.write_seal(self.folder, "annotate", self._identity, facts)

    def _origin(self, index: int) -> dict[str, str]:
        return {"identity": self._identity, "samples": self._reader.sample_digest(index)}


def _claimed_identity(folder: Path) -> str:
    path = folder / files.IDENTITY_NAME
    return files.digest_of(files.read_json(path)) if path.is_file() else ""


class _SampleTally:
    """Checks the pieces of a shard as they pass, and adds up what its record states."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._last: tuple[int, int] | None = None
        self._counts = dict.fromkeys(("tokens", *FLAGS), 0)
        self._log_probs = {name: ExactSum() for name in ("log_prob", "tempered_log_prob")}

    def table(self, piece: CandidateShard) -> pa.Table:
        """The next samples, sorted, as a table.

        Raises:
          DataError: a sample is there twice, belongs before the last piece, or lacks a column.
          NonFiniteError: a log-probability is NaN or infinite.
        """
        piece = piece.sorted()
        table = to_table(piece)
        if len(piece):
            first, last = [(int(piece.example_id[row]), int(piece.sample[row])) for row in (0, -1)]
            if self._last is not None and first <= self._last:
                raise errors.DataError(
                    f"sample {first[1]} of example {first[0]} comes after sample {self._last[1]} of example "
                    f"{self._last[0]}",
                    remedy="Give the pieces of a shard in the order of (example_id, sample), none twice",
                )
            self._first = first[0] if self._first is None else self._first
            self._last = last
        self._counts["tokens"] += int(piece.tokens.lengths.sum())
        for name in FLAGS:
            self._counts[name] += int(np.sum(getattr(piece, name)))
        for name, total in self._log_probs.items():
            _check_finite(name, piece)
            total.add(getattr(piece, name))
        return table

    def facts(self) -> dict[str, Any]:
        """The range of ids and the sums."""
        sums = {name: total.total for name, total in self._log_probs.items()}
        counts = dict(self._counts)
        return {
            "first_id": self._first,
            "last_id": None if self._last is None else self._last[0],
            "sums": {"tokens": counts.pop("tokens"), **sums, **counts},
        }


def _check_finite(name: str, piece: CandidateShard) -> None:
    values = getattr(piece, name)
    if not np.isfinite(values).all():
        row = int((~np.isfinite(values)).argmax())
        raise errors.NonFiniteError(
            f"sample {piece.sample[row]} of example {piece.example_id[row]} has the {name} {values[row]}",
            remedy="Check the policy's parameters: its training may have diverged",
        )


def _reward_sums(rewards: np.ndarray) -> dict[str, float | None]:
    found = Summary()
    found.add(rewards)
    extremes = (found.minimum, found.maximum) if found.finite else (None, None)
    return {"finite": found.finite, "reward": found.sum, "minimum": extremes[0], "maximum": extremes[1]}


def _id_range(ids: np.ndarray) -> dict[str, int | None]:
    return {"first_id": int(ids[0]) if len(ids) else None, "last_id": int(ids[-1]) if len(ids) else None}
