"""Parquet shards that are committed one by one, so that a killed job makes only what is missing.

Floor 3. A shard `samples-00003-of-00016.parquet` is written first, then its record
`samples-00003-of-00016.json` with the shard's SHA-256: the record is the commit. When all are committed, the
folder's seal (`files.write_seal`) names them all; readers go by the seal and verify each shard they open.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rest_jax import errors, files


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

    def missing(self, expected: Callable[[int], Mapping[str, Any]]) -> list[int]:
        """Verifies what is committed, throws away what is damaged or foreign, and lists what is to be made.

        Args:
          expected: facts that the record of shard i must state.
        """
        self._delete_strays()
        wanted = []
        for index in range(self.count):
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

    def commit(self, index: int, table: pa.Table, facts: Mapping[str, Any]) -> None:
        """Writes a shard and then its record: the same table and facts give the same bytes.

        Raises:
          OutputError: the folder cannot be written.
        """
        path, record_path = self.path(index), self.record_path(index)
        record_path.unlink(missing_ok=True)
        with files.atomic_path(path) as temporary:
            write_table(table, temporary)
            digest = files.file_digest(temporary)
        files.failpoint(f"after-shard:{path.name}")
        files.write_json(record_path, {"rows": table.num_rows, "sha256": digest, **facts})
        files.failpoint(f"after-record:{path.name}")

    def records(self) -> list[Mapping[str, Any]]:
        """The commit records of all shards, in order.

        Raises:
          MissingInputError: a shard is not committed.
        """
        lacking = [i for i in range(self.count) if not self.record_path(i).is_file()]
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
        for name, value in expected.items():
            if record.get(name) != value:
                return f"its record states another value of {name!r}"
        if not path.is_file():
            return "it is missing"
        if files.file_digest(path) != record["sha256"]:
            return "it has other bytes than its record states"
        return None

    def _delete_strays(self) -> None:
        """Removes half-written files, and shards of a division into another number."""
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


def read_sealed(folder: Path, seal: files.Seal, name: str) -> bytes:
    """The bytes of a sealed file, verified.

    Raises:
      IntegrityError: it is missing or has other bytes than the seal states.
    """
    path = folder / name
    remedy = (
        f"Delete {folder / files.SEAL_NAME} and run the {seal.phase} phase again: only this shard is remade"
    )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise errors.IntegrityError(f"{path} cannot be read: {error.strerror}", remedy=remedy) from error
    if hashlib.sha256(content).hexdigest() != seal.files.get(name):
        raise errors.IntegrityError(f"{path} has other bytes than its seal states", remedy=remedy)
    return content


def read_table(
    content: bytes, schema: pa.Schema, name: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads columns (all by default) of a shard from its bytes, verifying the checksum of every page.

    Raises:
      IntegrityError: it is damaged, or has other columns than the schema.
    """
    remedy = "It was written by another version; delete its folder and run the phase again"
    try:
        shard = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        if not shard.schema_arrow.equals(schema):
            raise errors.IntegrityError(f"{name} has other columns than expected", remedy=remedy)
        return shard.read(columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise errors.IntegrityError(f"{name} is damaged: {error}", remedy=remedy) from error


def write_table(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Writes Parquet with zstd and page checksums. No time or name goes in: equal tables give equal bytes."""
    pq.write_table(
        table,
        path,
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=[name for name in ("source",) if name in table.column_names],
        row_group_size=max(table.num_rows, 1),
    )
