"""Parquet shards that are committed one by one, so that a killed job makes only what is missing.

Floor 3. A shard `samples-00003-of-00016.parquet` is written first, then its record
`samples-00003-of-00016.json` with the shard's SHA-256: the record is the commit. When all are committed, the
folder's seal (`files.write_seal`) names them all; readers go by the seal and verify each shard they open.

A shard may be larger than memory. It is written and read a row group at a time, and hashed in small blocks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rest_jax import errors, files

# Of shards and records. Unfinished work of another format is made anew; sealed work stays readable.
FORMAT = 2
# Rows of a row group, all but a shard's last: what a reader holds at a time. Some 10 MB of short sentences.
ROW_GROUP_ROWS = 1 << 15
# What repeats from row to row.
_DICTIONARY = ("example_id", "sample", "source")


@dataclasses.dataclass
class ShardFolder:
    """The writing side of a folder of shards.

    Attributes:
      folder: where they are.
      stem: beginning of their names.
      count: how many shards the whole is cut into.
      discarded: after `missing`, why each shard that had been there is made anew, by name.
    """

    folder: Path
    stem: str
    count: int
    discarded: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise errors.ConfigError(
                f"{self.count} shards", where=str(self.folder), remedy="Give a positive number of shards"
            )

    def path(self, index: int) -> Path:
        """The Parquet file of a shard."""
        if not 0 <= index < self.count:
            raise ValueError(f"shard {index} of {self.count}")
        return self.folder / f"{self.stem}-{index:05d}-of-{self.count:05d}.parquet"

    def record_path(self, index: int) -> Path:
        """The commit record of a shard."""
        return self.path(index).with_suffix(".json")

    def missing(self, expected: Callable[[int], Mapping[str, Any]], among: range | None = None) -> list[int]:
        """Verifies what is committed, throws away what is damaged or foreign, and lists what is to be made.

        Args:
          expected: facts that the record of shard i must state.
          among: the shards that are the caller's own, where others make the rest at the same time: no file of
            theirs is looked at. None takes all.
        """
        self._delete_strays(among)
        wanted = []
        for index in range(self.count) if among is None else among:
            fault = self._fault(index, expected(index))
            if fault is None:
                continue
            if self.path(index).exists() or self.record_path(index).exists():
                self.discarded[self.path(index).name] = fault
                self.record_path(index).unlink(
                    missing_ok=True
                )  # first: without it the shard counts for nothing
                self.path(index).unlink(missing_ok=True)
            wanted.append(index)
        return wanted

    def commit(
        self,
        index: int,
        schema: pa.Schema,
        tables: Iterable[pa.Table],
        facts: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Writes a shard and then its record: the same rows and facts give the same bytes.

        Args:
          index: number of the shard.
          schema: of the tables.
          tables: the rows, in as many pieces as one likes; only a row group of them is held.
          facts: what the record shall state; asked for when the rows are written.

        Raises:
          OutputError: the folder cannot be written.
        """
        path, record_path = self.path(index), self.record_path(index)
        with files.atomic_path(path) as temporary:
            rows = write_tables(schema, tables, temporary)
            digest = files.file_digest(temporary)
            record_path.unlink(missing_ok=True)  # before other bytes take the place of those it is of
        files.failpoint(f"after-shard:{path.name}")
        files.write_json(record_path, {"rows": rows, "sha256": digest, "format": FORMAT, **facts()})
        files.failpoint(f"after-record:{path.name}")

    def uncommitted(self) -> list[int]:
        """Shards without a record; those that have one are not verified."""
        return [index for index in range(self.count) if not self.record_path(index).is_file()]

    def records(self) -> list[Mapping[str, Any]]:
        """The commit records of all shards, in order.

        Raises:
          MissingInputError: a shard is not committed.
        """
        lacking = self.uncommitted()
        if lacking:
            raise errors.MissingInputError(
                f"{len(lacking)} of {self.count} shards are not committed, the first {self.path(lacking[0])}",
                remedy="Run the same command again; only what is missing is made",
            )
        return [files.read_json(self.record_path(i)) for i in range(self.count)]

    def _fault(self, index: int, expected: Mapping[str, Any]) -> str | None:
        path, record_path = self.path(index), self.record_path(index)
        if not record_path.is_file():
            return "it was not committed"
        try:
            record = files.read_json(record_path)
        except errors.IntegrityError:
            return "its record is damaged"
        if not isinstance(record, dict) or "sha256" not in record:
            return "its record is damaged"
        for name, value in {"format": FORMAT, **expected}.items():
            if record.get(name) != value:
                return f"its record states another value of {name!r}"
        if not path.is_file():
            return "it is missing"
        if files.file_digest(path) != record["sha256"]:
            return "it has other bytes than its record states"
        return None

    def _delete_strays(self, among: range | None) -> None:
        """Removes half-written files, and where all shards are ours those of another division."""
        if among is not None:
            for index in among:
                for path in (self.path(index), self.record_path(index)):
                    for stray in self.folder.glob(f".{path.name}.*.tmp"):
                        stray.unlink(missing_ok=True)
            return
        ours = {path(i).name for i in range(self.count) for path in (self.path, self.record_path)}
        for path in self.folder.glob(f"{self.stem}-*-of-*"):
            if path.name not in ours:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(f".{self.stem}-*.tmp"):
            path.unlink(missing_ok=True)


def sealed_shards(seal: files.Seal, stem: str) -> list[str]:
    """Names of the Parquet shards that a seal names, in order.

    Raises:
      IntegrityError: there are none, or not the number that their names state.
    """
    names = sorted(name for name in seal.files if name.startswith(f"{stem}-") and name.endswith(".parquet"))
    if not names or names != [f"{stem}-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]:
        raise errors.IntegrityError(
            f"the seal names {len(names)} {stem} shards that are not a whole set",
            remedy=f"Delete the folder and run the {seal.phase} phase again",
        )
    return names


def verified(folder: Path, seal: files.Seal, name: str) -> Path:
    """The path of a sealed file, whose bytes are compared with the seal without loading them whole.

    Raises:
      IntegrityError: it is missing or has other bytes than the seal states.
    """
    path = folder / name
    remedy = (
        f"Delete {folder / files.SEAL_NAME} and run the {seal.phase} phase again: only this shard is remade"
    )
    try:
        digest = files.file_digest(path)
    except OSError as error:
        raise errors.IntegrityError(f"{path} cannot be read: {error.strerror}", remedy=remedy) from error
    if digest != seal.files.get(name):
        raise errors.IntegrityError(f"{path} has other bytes than its seal states", remedy=remedy)
    return path


class ShardFile:
    """A shard open for reading, whole or by row groups; the checksum of every page is verified.

    Args:
      source: a path, or an Arrow file.
      schema: the columns that it must have.
      name: how errors call it.

    Raises:
      IntegrityError: it is damaged, or has other columns than the schema.
    """

    def __init__(self, source: Path | pa.NativeFile, schema: pa.Schema, name: str):
        self.name = name
        self._file = self._guarded(lambda: pq.ParquetFile(source, page_checksum_verification=True))
        if not self._file.schema_arrow.equals(schema):
            raise errors.IntegrityError(
                f"{name} has other columns than expected",
                remedy="It was written by another version; delete its folder and run the phase again",
            )

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    @property
    def groups(self) -> int:
        """How many row groups there are."""
        return self._file.num_row_groups

    def group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns (all by default) of a row group.

        Raises:
          IntegrityError: it is damaged.
        """
        names = None if columns is None else list(columns)
        return self._guarded(lambda: self._file.read_row_group(index, columns=names))

    def read_groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Columns of one row group after another."""
        return (self.group(index, columns) for index in range(self.groups))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns (all by default) of all rows.

        Raises:
          IntegrityError: it is damaged.
        """
        names = None if columns is None else list(columns)
        return self._guarded(lambda: self._file.read(columns=names))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (pa.ArrowException, OSError) as error:
            raise errors.IntegrityError(
                f"{self.name} is damaged: {error}", remedy="Delete it and run the phase that writes it again"
            ) from error


class RowQueue:
    """Rows that come in tables of any sizes and leave in tables of the size that is asked for."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def put(self, table: pa.Table) -> None:
        """Adds rows at the end."""
        self._tables.append(table)
        self._rows += table.num_rows

    def take(self, rows: int) -> pa.Table:
        """Removes the first rows, each column of them in one chunk.

        Raises:
          ValueError: there are not that many, or none at all was put in.
        """
        if rows > self._rows or not self._tables:
            raise ValueError(f"{rows} of {self._rows} rows")
        held = pa.concat_tables(self._tables)
        self._tables = [held.slice(rows)]
        self._rows -= rows
        return held.slice(0, rows).combine_chunks()


def write_tables(schema: pa.Schema, tables: Iterable[pa.Table], path: str | os.PathLike[str]) -> int:
    """Writes Parquet with zstd and page checksums, and returns the number of rows.

    Row groups and pages are cut by row numbers, and no time or name goes in: equal rows give equal bytes,
    in whatever pieces they come.
    """
    queue, rows = RowQueue(), 0
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=[name for name in _DICTIONARY if name in schema.names],
    ) as writer:

        def write_group(size: int) -> None:
            writer.write_table(queue.take(size), row_group_size=ROW_GROUP_ROWS)

        for table in tables:
            queue.put(table)
            rows += table.num_rows
            while len(queue) >= ROW_GROUP_ROWS:
                write_group(ROW_GROUP_ROWS)
        if len(queue):
            write_group(len(queue))
    return rows
