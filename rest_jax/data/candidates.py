"""The candidate store of Grow: samples with their log-probabilities, and beside them their rewards.

Floor 3; no TensorFlow, plain Parquet that pandas or polars open as it is:

    GROW/samples-00003-of-00016.parquet     rows sorted by (example_id, sample); a shard is a range of ids
    GROW/samples-00003-of-00016.json        its commit record
    GROW/SEAL.json                          written last
    GROW/rewards/NAME/rewards-00003-of-00016.parquet   one row for each row of the sample shard, in its order
    GROW/rewards/NAME/…                     record and seal likewise

Never more than one shard is in memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rest_jax import errors, files
from rest_jax.data import candidate_shard, shards
from rest_jax.data.candidate_shard import (
    FLAGS,
    KEYS,
    CandidateShard,
    from_table,
    to_table,
    with_needed_columns,
)

REWARD_SCHEMA = pa.schema([("example_id", pa.int64()), ("sample", pa.int32()), ("reward", pa.float64())])
REWARDS_FOLDER = "rewards"
_REWARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class CandidateWriter:
    """Writes the sample shards of a Grow step; a writer of a later run finds what is committed.

    Args:
      folder: of the Grow step.
      num_shards: shards the sorted example ids are cut into; the caller gives each its range of them.
      identity: digest of what the samples depend on; by default that of the folder's `files.claim`. A
        shard that states another one is made anew.
    """

    def __init__(self, folder: str | os.PathLike[str], num_shards: int, identity: str = ""):
        self.folder = Path(folder)
        self._identity = identity or _claimed_identity(self.folder)
        self._shards = shards.ShardFolder(self.folder, "samples", num_shards)

    @property
    def discarded(self) -> Mapping[str, str]:
        """Shards that `missing_shards` threw away, with the reason."""
        return self._shards.discarded

    def missing_shards(self) -> list[int]:
        """Verifies committed shards, throws away damaged and foreign ones, and lists those to be made."""
        return self._shards.missing(lambda index: {"identity": self._identity})

    def write_shard(self, index: int, shard: CandidateShard) -> None:
        """Sorts and commits one shard.

        Raises:
          DataError: a sample is there twice, or the shard lacks a column.
          NonFiniteError: a log-probability is NaN or infinite.
          OutputError: the folder cannot be written.
        """
        shard = shard.sorted()
        table = to_table(shard)
        facts = {**_id_range(shard), "identity": self._identity, "sums": _sample_sums(shard)}
        self._shards.commit(index, table, facts)

    def totals(self) -> dict[str, float]:
        """Sums over all committed shards: rows, tokens, log-probabilities, and how often each flag is set.

        Raises:
          MissingInputError: a shard is not committed.
          DataError: the ranges of ids of two shards overlap.
        """
        records = self._shards.records()
        _check_ranges([(r["first_id"], r["last_id"]) for r in records if r["rows"]], str(self.folder))
        totals: dict[str, float] = {"rows": sum(record["rows"] for record in records)}
        for name in records[0]["sums"]:
            totals[name] = sum(record["sums"][name] for record in records)
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


def read_shards(
    folder: str | os.PathLike[str], columns: Sequence[str] | None = None
) -> Iterator[CandidateShard]:
    """Reads a sealed Grow step shard by shard, verifying each.

    Args:
      folder: of the Grow step.
      columns: names in `candidate_shard.SCHEMA`; all by default. (example_id, sample) is always read.

    Raises:
      MissingInputError: the folder is missing or unfinished.
      IntegrityError: a shard is missing or damaged; the message names it and the remedy.
      ConfigError: there is no such column.
    """
    base = Path(folder)
    seal = _require_seal(base, "grow")
    last: tuple[int, int] | None = None
    for name in shards.sealed_shards(seal, "samples"):
        shard = _read_samples(base, seal, name, columns)
        if len(shard):
            span = int(shard.example_id[0]), int(shard.example_id[-1])
            _check_ranges([span] if last is None else [last, span], str(base / name))
            last = span
        yield shard


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
        self._samples = Path(folder)
        self.folder = rewards_folder(folder, reward_name)
        self._identity = identity or _claimed_identity(self.folder)
        self._samples_seal = _require_seal(self._samples, "grow")
        self._names = shards.sealed_shards(self._samples_seal, "samples")
        self._shards = shards.ShardFolder(self.folder, "rewards", len(self._names))

    @property
    def discarded(self) -> Mapping[str, str]:
        """Shards that `missing_shards` threw away, with the reason."""
        return self._shards.discarded

    def missing_shards(self) -> list[int]:
        """Verifies committed shards, throws away damaged and foreign ones, and lists those to be made."""
        return self._shards.missing(self._origin)

    def samples(self, index: int, columns: Sequence[str] | None = None) -> CandidateShard:
        """The samples of a shard, verified: what is to be scored.

        Raises:
          IntegrityError: the shard is missing or damaged.
          ConfigError: there is no such column.
        """
        return _read_samples(self._samples, self._samples_seal, self._names[index], columns)

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
        finite = rewards_n[np.isfinite(rewards_n)]
        sums = {"finite": len(finite), "reward": float(finite.sum())}
        self._shards.commit(index, table, {**_id_range(shard), **self._origin(index), "sums": sums})

    def seal(self, facts: Mapping[str, Any] | None = None) -> files.Seal:
        """Commits the rewards.

        Raises:
          MissingInputError: a shard is not committed.
        """
        self._shards.records()
        return files.write_seal(self.folder, "annotate", self._identity, facts)

    def _origin(self, index: int) -> dict[str, str]:
        return {"identity": self._identity, "samples": self._samples_seal.files[self._names[index]]}


def read_scored(
    folder: str | os.PathLike[str], reward_name: str, columns: Sequence[str] | None = None
) -> Iterator[tuple[CandidateShard, np.ndarray]]:
    """Reads a Grow step with its rewards shard by shard: (samples, rewards float64 [n]).

    Args:
      folder: of the Grow step.
      reward_name: which rewards.
      columns: as in `read_shards`.

    Raises:
      MissingInputError: the samples or these rewards are missing or unfinished.
      IntegrityError: a shard is missing or damaged, or the rewards are those of other samples.
      ConfigError: there is no such column, or the name cannot name a folder.
    """
    base, rewards_base = Path(folder), rewards_folder(folder, reward_name)
    seal, rewards_seal = _require_seal(base, "grow"), _require_seal(rewards_base, "annotate")
    names = shards.sealed_shards(seal, "samples")
    reward_names = shards.sealed_shards(rewards_seal, "rewards")
    if len(names) != len(reward_names):
        raise _misaligned(rewards_base)
    for name, reward_name_ in zip(names, reward_names, strict=True):
        table = shards.read_table(
            shards.read_sealed(rewards_base, rewards_seal, reward_name_), REWARD_SCHEMA, reward_name_
        )
        samples = _read_samples(base, seal, name, columns)
        if not all(np.array_equal(table[key].to_numpy(), getattr(samples, key)) for key in KEYS):
            raise _misaligned(rewards_base / reward_name_)
        record_name = Path(reward_name_).with_suffix(".json").name
        record = json.loads(shards.read_sealed(rewards_base, rewards_seal, record_name))
        if record["samples"] != seal.files[name]:
            raise _misaligned(rewards_base / reward_name_)
        yield samples, table["reward"].to_numpy()


def rewards_folder(folder: str | os.PathLike[str], reward_name: str) -> Path:
    """Where the rewards of this name are.

    Raises:
      ConfigError: the name cannot name a folder.
    """
    if not _REWARD_NAME.fullmatch(reward_name):
        raise errors.ConfigError(
            f"{reward_name!r} cannot name a reward",
            remedy="Use letters, digits, '_', '-' and '.', and none of the last two in front",
        )
    return Path(folder) / REWARDS_FOLDER / reward_name


def _read_samples(base: Path, seal: files.Seal, name: str, columns: Sequence[str] | None) -> CandidateShard:
    wanted = None if columns is None else with_needed_columns(columns)
    table = shards.read_table(
        shards.read_sealed(base, seal, name), candidate_shard.SCHEMA, str(base / name), wanted
    )
    return from_table(table)


def _require_seal(folder: Path, phase: str) -> files.Seal:
    seal = files.read_seal(folder)
    if seal is None:
        raise errors.MissingInputError(
            f"{folder} is missing or unfinished", remedy=f"Run the {phase} phase first"
        )
    return seal


def _claimed_identity(folder: Path) -> str:
    path = folder / files.IDENTITY_NAME
    return files.digest_of(files.read_json(path)) if path.is_file() else ""


def _sample_sums(shard: CandidateShard) -> dict[str, float]:
    sums: dict[str, float] = {"tokens": int(shard.tokens.lengths.sum())}
    for name in ("log_prob", "tempered_log_prob"):
        values = getattr(shard, name)
        if not np.isfinite(values).all():
            first = int((~np.isfinite(values)).argmax())
            sample = f"sample {shard.sample[first]} of example {shard.example_id[first]}"
            raise errors.NonFiniteError(
                f"{sample} has the {name} {values[first]}",
                remedy="Check the policy's parameters: its training may have diverged",
            )
        sums[name] = float(np.sum(values, dtype=np.float64))
    for name in FLAGS:
        sums[name] = int(np.sum(getattr(shard, name)))
    return sums


def _id_range(shard: CandidateShard) -> dict[str, int | None]:
    ids = shard.example_id
    return {"first_id": int(ids[0]) if len(ids) else None, "last_id": int(ids[-1]) if len(ids) else None}


def _check_ranges(spans: Sequence[tuple[int, int]], where: str) -> None:
    for (_, before), (after, _) in zip(spans, spans[1:], strict=False):
        if after <= before:
            raise errors.DataError(
                f"the shards' ranges of example ids overlap: {before} then {after}",
                where=where,
                remedy="Give each shard its own range of the sorted ids",
            )


def _misaligned(path: Path) -> errors.IntegrityError:
    return errors.IntegrityError(
        f"{path} holds the rewards of other samples",
        remedy="Delete its folder and run the annotate phase again",
    )
