"""Candidates in memory: samples of a range of sources, column by column, and as an Arrow table.

Floor 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rest_jax import errors
from rest_jax.types import RaggedTokens

SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("sample", pa.int32()),
        ("source", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
        ("tempered_log_probs", pa.list_(pa.float32())),
        ("log_prob", pa.float32()),
        ("tempered_log_prob", pa.float32()),
        ("truncated", pa.bool_()),
        ("empty", pa.bool_()),
        ("copy_of_source", pa.bool_()),
        ("repeated_ngram", pa.bool_()),
        ("round_trip", pa.bool_()),
    ]
)
FLAGS = ("truncated", "empty", "copy_of_source", "repeated_ngram", "round_trip")
KEYS = ("example_id", "sample")
_PER_TOKEN = ("log_probs", "tempered_log_probs")


def _absent() -> Any:
    return np.zeros(0)


@dataclasses.dataclass(frozen=True)
class CandidateShard:
    """Samples of a range of sources, column by column.

    A shard that was read with some columns only has length-0 values for the others; (example_id, sample) is
    always there.

    Attributes:
      example_id: int64 [n], the source's example.
      sample: int32 [n], number of the sample among those of its source.
      source: n texts, a list or an Arrow array of strings; a list where they were read.
      text: n decoded samples, likewise.
      tokens: n sequences as they were sampled, with EOS unless truncated.
      log_probs: float32 [total tokens], aligned with tokens.values: the policy's own, at temperature 1.
      tempered_log_probs: the same under the distribution that was sampled from.
      truncated: bool [n], the sample reached the length limit before an EOS.
      empty: bool [n], the text has no visible character.
      copy_of_source: bool [n], the text is its source.
      repeated_ngram: bool [n], the text loops.
      round_trip: bool [n], encoding the text gives the tokens back.
      log_prob: float32 [n], sum of log_probs over a sample; computed where it is not given.
      tempered_log_prob: float32 [n], likewise.
    """

    example_id: np.ndarray
    sample: np.ndarray
    source: list[str] | pa.Array = dataclasses.field(default_factory=list)
    text: list[str] | pa.Array = dataclasses.field(default_factory=list)
    tokens: RaggedTokens = dataclasses.field(default_factory=lambda: RaggedTokens.from_lists([]))
    log_probs: np.ndarray = dataclasses.field(default_factory=_absent)
    tempered_log_probs: np.ndarray = dataclasses.field(default_factory=_absent)
    truncated: np.ndarray = dataclasses.field(default_factory=_absent)
    empty: np.ndarray = dataclasses.field(default_factory=_absent)
    copy_of_source: np.ndarray = dataclasses.field(default_factory=_absent)
    repeated_ngram: np.ndarray = dataclasses.field(default_factory=_absent)
    round_trip: np.ndarray = dataclasses.field(default_factory=_absent)
    log_prob: np.ndarray = dataclasses.field(default_factory=_absent)
    tempered_log_prob: np.ndarray = dataclasses.field(default_factory=_absent)

    def __post_init__(self) -> None:
        for name in _PER_TOKEN:
            values = getattr(self, name)
            if len(values) not in (0, len(self.tokens.values)):
                raise ValueError(f"{len(values)} {name} for {len(self.tokens.values)} tokens")
            total = name.removesuffix("s")
            if len(values) == len(self.tokens.values) and not len(getattr(self, total)):
                object.__setattr__(self, total, _sums(values, self.tokens.offsets))
        for field in dataclasses.fields(self):
            found = len(getattr(self, field.name))
            if field.name not in _PER_TOKEN and found not in (0, len(self)):
                raise ValueError(f"{found} values of {field.name} for {len(self)} samples")

    def __len__(self) -> int:
        return len(self.example_id)

    def take(self, rows: np.ndarray) -> CandidateShard:
        """The samples where a mask, bool [n], is true; or those of these row numbers, in this order."""
        rows = np.asarray(rows)
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise ValueError(f"a mask of shape {rows.shape} for {len(self)} samples")
            rows = np.flatnonzero(rows)
        taken: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if not len(values):
                continue
            if field.name in _PER_TOKEN:
                taken[field.name] = RaggedTokens(values, self.tokens.offsets).take(rows).values
            elif isinstance(values, RaggedTokens):
                taken[field.name] = values.take(rows)
            elif isinstance(values, list):
                taken[field.name] = [values[row] for row in rows]
            elif isinstance(values, pa.Array):
                taken[field.name] = values.take(pa.array(rows))
            else:
                taken[field.name] = values[rows]
        return CandidateShard(**{name: getattr(self, name) for name in KEYS} | taken)

    def sorted(self) -> CandidateShard:
        """The samples by (example_id, sample).

        Raises:
          DataError: a sample is there twice.
        """
        order = np.lexsort((self.sample, self.example_id))
        ids, samples = self.example_id[order], self.sample[order]
        twice = (np.diff(ids) == 0) & (np.diff(samples) == 0)
        if twice.any():
            first = int(twice.argmax())
            raise errors.DataError(
                f"sample {samples[first]} of example {ids[first]} is there twice",
                remedy="Give each example a unique id",
            )
        return self if np.array_equal(order, np.arange(len(self))) else self.take(order)


def to_table(shard: CandidateShard) -> pa.Table:
    """The shard as a table of `SCHEMA`.

    Raises:
      DataError: a column is absent.
    """
    arrays = []
    for field in SCHEMA:
        values = getattr(shard, field.name)
        rows = len(shard.tokens) if field.name in _PER_TOKEN else len(values)
        if rows != len(shard) or (field.name in _PER_TOKEN and len(values) != len(shard.tokens.values)):
            raise errors.DataError(
                f"the shard has no column {field.name}",
                remedy="Only a shard with all its columns can be written",
            )
        if field.name in ("tokens", *_PER_TOKEN):
            flat = shard.tokens.values if field.name == "tokens" else values
            arrays.append(_list_array(flat, shard.tokens.offsets, field.type))
        else:
            is_arrow = isinstance(values, pa.Array)
            arrays.append(values.cast(field.type) if is_arrow else pa.array(values, field.type))
    return pa.table(arrays, schema=SCHEMA)


def from_table(table: pa.Table) -> CandidateShard:
    """The shard of a table with some or all columns of `SCHEMA`, (example_id, sample) among them."""
    found: dict[str, Any] = {}
    for column in table.column_names:
        kind = SCHEMA.field(column).type
        if pa.types.is_list(kind):
            array = table[column].combine_chunks()
            offsets = array.offsets.to_numpy().astype(np.int64)
            values = array.values.to_numpy()
            found[column] = RaggedTokens(values, offsets) if column == "tokens" else values
        elif pa.types.is_string(kind):
            found[column] = table[column].to_pylist()
        else:
            found[column] = table[column].to_numpy()
    return CandidateShard(**found)


def with_needed_columns(columns: Sequence[str]) -> list[str]:
    """The columns with those that they cannot be read without, in the order of the schema.

    Raises:
      ConfigError: there is no such column.
    """
    unknown = sorted(set(columns) - set(SCHEMA.names))
    if unknown:
        raise errors.ConfigError(
            f"the candidate store has no column {unknown[0]!r}", remedy=f"It has {', '.join(SCHEMA.names)}"
        )
    needed = {*columns, *KEYS} | ({"tokens"} if set(columns) & set(_PER_TOKEN) else set())
    return [name for name in SCHEMA.names if name in needed]


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sum of each sequence's values, float32 [n]; each is added up in float64 on its own."""
    lengths = np.diff(offsets)
    sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), values, minlength=len(lengths))
    return sums.astype(np.float32)


def _list_array(values: np.ndarray, offsets: np.ndarray, kind: pa.ListType) -> pa.ListArray:
    if len(values) >= 2**31:
        raise errors.DataError(f"a shard of {len(values)} tokens", remedy="Cut the samples into more shards")
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind.value_type))
