"""Candidates in pieces of whole sources, of one Grow step or of several merged, in memory that stays small.

Floor 3. A filter that judges a source by its own candidates must see all of them at once, while row groups
are cut wherever they are full. Here the source at the end of a row group waits for the next, and Grow steps
are merged by example id like sorted runs. What is held is about a row group of each Grow step, or the
samples of one source where those are more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from rest_jax.data.candidate_reader import Batch
from rest_jax.types import RaggedTokens


class _Origin:
    """A row group that rows of a piece are of; its tokens are read when they are first asked for."""

    def __init__(self, batch: Batch):
        self._read = batch.more

    @functools.cached_property
    def tokens(self) -> RaggedTokens:
        return self._read(("tokens",)).tokens


@dataclasses.dataclass(frozen=True)
class Piece:
    """Candidates of whole sources, sorted by (example_id, grow_step, sample).

    Attributes:
      table: (example_id, sample) and the columns asked for, as Arrow holds them.
      rewards: float64 [n]; NaN where one is missing.
      grow_steps: int64 [n], the g of each.
    """

    table: pa.Table
    rewards: np.ndarray
    grow_steps: np.ndarray
    _batch_of: np.ndarray  # int64 [n], the row group of each row: a key of _origins
    _row_of: np.ndarray  # int64 [n], and the row in it
    _origins: Mapping[int, _Origin]

    def __len__(self) -> int:
        return len(self.rewards)

    @functools.cached_property
    def example_ids(self) -> np.ndarray:
        """The source of each, int64 [n], rising."""
        return self.table["example_id"].to_numpy()

    @functools.cached_property
    def samples(self) -> np.ndarray:
        """Number of each sample among those of its source in its Grow step, int32 [n]."""
        return self.table["sample"].to_numpy()

    def column(self, name: str) -> np.ndarray:
        """A column of numbers or flags, [n]."""
        return self.table[name].to_numpy()

    def tokens(self, rows: np.ndarray) -> RaggedTokens:
        """The tokens of these rows, int64 [m], in this order; they are read now."""
        batch_of = self._batch_of[rows]
        order = np.argsort(batch_of, kind="stable")
        parts = []
        for number in np.unique(batch_of).tolist():
            of_batch = rows[order[batch_of[order] == number]]
            parts.append(self._origins[number].tokens.take(self._row_of[of_batch]))
        return concatenated(parts).take(np.argsort(order, kind="stable"))

    def cut(self, row: int) -> tuple[Piece, Piece]:
        """The rows before this one, and those from it on."""
        return self._rows(slice(0, row)), self._rows(slice(row, len(self)))

    def _rows(self, span: slice) -> Piece:
        batch_of = self._batch_of[span]
        origins = {number: self._origins[number] for number in np.unique(batch_of).tolist()}
        table = self.table.slice(span.start, span.stop - span.start)
        return Piece(table, self.rewards[span], self.grow_steps[span], batch_of, self._row_of[span], origins)


def whole_sources(batches: Iterable[Batch], reward: str, grow_step: int = 1) -> Iterator[Piece]:
    """Regroups row groups to pieces of whole sources; none is empty.

    Args:
      batches: sorted by (example_id, sample), as `CandidateReader.batches` gives them.
      reward: name of the reward.
      grow_step: g, which the rows are marked with.
    """
    held: Piece | None = None
    for number, batch in enumerate(batches):
        if not len(batch):
            continue
        rows = len(batch)
        piece = Piece(
            batch.table,
            batch.rewards[reward],
            np.full(rows, grow_step, np.int64),
            np.full(rows, number, np.int64),
            np.arange(rows),
            {number: _Origin(batch)},
        )
        piece = piece if held is None else _joined([held, piece])
        complete, held = piece.cut(int(np.searchsorted(piece.example_ids, piece.example_ids[-1])))
        if len(complete):
            yield complete
    if held is not None:
        yield held


def merged(streams: Sequence[Iterator[Piece]]) -> Iterator[Piece]:
    """Merges pieces of whole sources by example id: a source has its candidates of all streams together.

    Args:
      streams: of whole sources with rising ids; of one source the earlier streams come first.
    """
    heads: list[Piece | None] = [next(stream, None) for stream in streams]
    while any(head is not None for head in heads):
        # No stream has more of a source at or below the least of their last ids: its pieces are whole.
        through = min(int(head.example_ids[-1]) for head in heads if head is not None)
        ready = []
        for number, head in enumerate(heads):
            if head is None:
                continue
            before, after = head.cut(int(np.searchsorted(head.example_ids, through, side="right")))
            ready.append(before)
            heads[number] = after if len(after) else next(streams[number], None)
        yield _joined([piece for piece in ready if len(piece)])


def _joined(pieces: Sequence[Piece]) -> Piece:
    """The rows of all pieces sorted by example id; those of one source stay in the order of the pieces."""
    if len(pieces) == 1:
        return pieces[0]
    origins: dict[int, _Origin] = {}
    numbers: dict[_Origin, int] = {}
    batch_of = []
    for piece in pieces:
        renamed = {}
        for old, origin in piece._origins.items():
            renamed[old] = numbers.setdefault(origin, len(numbers))
            origins[renamed[old]] = origin
        olds, which = np.unique(piece._batch_of, return_inverse=True)
        batch_of.append(np.array([renamed[old] for old in olds.tolist()], np.int64)[which])
    table = pa.concat_tables([piece.table for piece in pieces])
    order = np.argsort(table["example_id"].to_numpy(), kind="stable")
    if not np.array_equal(order, np.arange(len(order))):
        table = table.take(pa.array(order))
    return Piece(
        table,
        np.concatenate([piece.rewards for piece in pieces])[order],
        np.concatenate([piece.grow_steps for piece in pieces])[order],
        np.concatenate(batch_of)[order],
        np.concatenate([piece._row_of for piece in pieces])[order],
        origins,
    )


def concatenated(parts: Sequence[RaggedTokens]) -> RaggedTokens:
    """The sequences of all parts, in order."""
    lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
    values = np.concatenate([np.zeros(0, np.int32), *(part.values for part in parts)])
    return RaggedTokens(values, np.cumsum(lengths))
