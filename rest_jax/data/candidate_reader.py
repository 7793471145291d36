"""Reading a sealed Grow step with its rewards, a row group at a time.

Floor 3. The memory that this takes depends on the columns asked for, and not on the number of samples: a
shard is hashed in blocks when it is first opened, then its row groups are read one by one, each page against
its checksum.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from rest_jax import errors, files
from rest_jax.data import candidate_shard, shards
from rest_jax.data.candidate_shard import KEYS, CandidateShard, from_table, with_needed_columns
from rest_jax.objectives.statistics import Chunks

REWARD_SCHEMA = pa.schema([("example_id", pa.int64()), ("sample", pa.int32()), ("reward", pa.float64())])
REWARDS_FOLDER = "rewards"
_REWARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of a row group with their rewards.

    Attributes:
      table: the columns asked for, and (example_id, sample), as Arrow holds them.
      rewards: float64 [n] by the reward's name; NaN where one is missing.
      read: reads columns of these rows.
    """

    table: pa.Table
    rewards: Mapping[str, np.ndarray]
    read: Callable[[Sequence[str]], pa.Table]

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def example_id(self) -> np.ndarray:
        """The source of each sample, int64 [n], rising."""
        return self.table["example_id"].to_numpy()

    def samples(self) -> CandidateShard:
        """The same rows as NumPy arrays and lists of strings."""
        return from_table(self.table)

    def more(self, columns: Sequence[str]) -> CandidateShard:
        """Other columns of the same rows, read now: for what only some batches need.

        Raises:
          IntegrityError: the shard is damaged.
          ConfigError: there is no such column.
        """
        return from_table(self.read(with_needed_columns(columns)))


class CandidateReader:
    """A sealed Grow step and rewards of it. Each file is verified when it is first opened, once.

    Args:
      folder: of the Grow step.
      rewards: names of the rewards that are read beside the samples.

    Raises:
      MissingInputError: the samples or these rewards are missing or unfinished.
      IntegrityError: the rewards are those of other samples.
      ConfigError: the name cannot name a folder.
    """

    def __init__(self, folder: str | os.PathLike[str], rewards: Sequence[str] = ()):
        self.folder = Path(folder)
        self._seal = require_seal(self.folder, "grow")
        self.shards = shards.sealed_shards(self._seal, "samples")
        self._rewards: dict[str, tuple[Path, files.Seal]] = {}
        self._verified: set[Path] = set()
        for name in rewards:
            base = rewards_folder(folder, name)
            seal = require_seal(base, "annotate")
            if len(shards.sealed_shards(seal, "rewards")) != len(self.shards):
                raise _misaligned(base)
            self._rewards[name] = base, seal

    def sample_digest(self, index: int) -> str:
        """SHA-256 of a shard of samples, as the seal states it."""
        return self._seal.files[self.shards[index]]

    def samples(self, index: int) -> shards.ShardFile:
        """A shard of samples, verified.

        Raises:
          IntegrityError: it is missing or damaged; the message names it and the remedy.
        """
        path = self._verify(self.folder, self._seal, self.shards[index])
        return shards.ShardFile(path, candidate_shard.SCHEMA, str(path))

    def rewards_of(self, name: str, index: int) -> shards.ShardFile:
        """The rewards of a shard, verified, and that they are those of its samples.

        Raises:
          IntegrityError: they are missing or damaged, or those of other samples.
        """
        base, seal = self._rewards[name]
        path = self._verify(base, seal, f"rewards-{index:05d}-of-{len(self.shards):05d}.parquet")
        record = files.read_json(self._verify(base, seal, path.with_suffix(".json").name))
        if record["samples"] != self.sample_digest(index):
            raise _misaligned(path)
        return shards.ShardFile(path, REWARD_SCHEMA, str(path))

    def reward_chunks(self, name: str) -> Chunks:
        """The rewards alone, float64 [n] a row group, in the order of the samples; for several passes."""

        def once() -> Iterator[np.ndarray]:
            for index in range(len(self.shards)):
                for table in self.rewards_of(name, index).read_groups(["reward"]):
                    yield table["reward"].to_numpy()

        return Chunks(once)

    def batches(
        self, columns: Sequence[str] | None = None, *, shard: int | None = None, whole: bool = False
    ) -> Iterator[Batch]:
        """The samples with their rewards, sorted by (example_id, sample).

        Args:
          columns: names in `candidate_shard.SCHEMA`; all by default. (example_id, sample) is always read.
          shard: one shard only.
          whole: a batch is a shard, and not a row group.

        Raises:
          IntegrityError: a shard is missing or damaged, or rewards are those of other samples.
          DataError: the ranges of ids of two shards overlap.
          ConfigError: there is no such column.
        """
        wanted = None if columns is None else with_needed_columns(columns)
        before: int | None = None  # the last id of the shard before
        for index in range(len(self.shards)) if shard is None else [shard]:
            last = before
            for batch in self._batches_of(index, wanted, whole):
                ids = batch.example_id
                if len(ids):
                    if before is not None and ids[0] <= before:
                        raise overlap(before, int(ids[0]), str(self.folder / self.shards[index]))
                    last = int(ids[-1])
                yield batch
            before = last

    def _batches_of(self, index: int, columns: Sequence[str] | None, whole: bool) -> Iterator[Batch]:
        samples = self.samples(index)
        groups = [functools.partial(samples.group, group) for group in range(samples.groups)]
        rewards = {name: _Aligned(self.rewards_of(name, index)) for name in self._rewards}
        for read in [samples.read] if whole else groups:
            table = read(columns)
            yield Batch(table, {name: beside.take(table) for name, beside in rewards.items()}, read)
        for beside in rewards.values():
            beside.end()

    def _verify(self, folder: Path, seal: files.Seal, name: str) -> Path:
        path = folder / name
        if path not in self._verified:
            self._verified.add(shards.verified(folder, seal, name))
        return path


class _Aligned:
    """Rewards of a shard, taken in the portions in which its samples are read."""

    def __init__(self, file: shards.ShardFile):
        self._path, self._queue = Path(file.name), shards.RowQueue()
        self._tables = file.read_groups()

    def take(self, samples: pa.Table) -> np.ndarray:
        """The rewards of the next samples, float64 [n]."""
        while len(self._queue) < samples.num_rows:
            table = next(self._tables, None)
            if table is None:
                raise _misaligned(self._path)
            self._queue.put(table)
        if not samples.num_rows:
            return np.zeros(0)
        rewards = self._queue.take(samples.num_rows)
        if not all(rewards[key].equals(samples[key]) for key in KEYS):
            raise _misaligned(self._path)
        return rewards["reward"].to_numpy()

    def end(self) -> None:
        """Checks that no reward is left over."""
        if len(self._queue) or any(table.num_rows for table in self._tables):
            raise _misaligned(self._path)


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


def require_seal(folder: Path, phase: str) -> files.Seal:
    """The seal of a folder.

    Raises:
      MissingInputError: the folder is missing or unfinished.
    """
    seal = files.read_seal(folder)
    if seal is None:
        raise errors.MissingInputError(
            f"{folder} is missing or unfinished", remedy=f"Run the {phase} phase first"
        )
    return seal


def overlap(before: int, after: int, where: str) -> errors.DataError:
    """The error that a shard begins at an id that is not above the last of the shard before."""
    return errors.DataError(
        f"the shards' ranges of example ids overlap: {before} then {after}",
        where=where,
        remedy="Give each shard its own range of the sorted ids",
    )


def _misaligned(path: Path) -> errors.IntegrityError:
    return errors.IntegrityError(
        f"{path} holds the rewards of other samples",
        remedy="Delete its folder and run the annotate phase again",
    )
