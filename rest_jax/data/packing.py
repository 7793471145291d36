"""Which pairs share a row, and which rows follow each other: integers only, no tokens.

Floor 3. Each epoch visits every example once, in the order of its own Philox permutation. Packing puts
several pairs into a row, as T5 does (Raffel et al. 2020, arXiv:1910.10683); segment ids keep their attention
apart.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import threading
from collections.abc import Callable

import numpy as np

# Rows that stay open while an epoch is packed: more fill better and cost more time a pair.
PACKING_WINDOW = 16
# Packed epochs kept in memory: a batch may span the end of one and the start of the next.
_EPOCHS_KEPT = 2


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Which pairs share which row.

    Attributes:
      pairs: int64 [n], indices of pairs, row after row, in their order within the row.
      starts: int64 [rows + 1]; row r holds pairs[starts[r] : starts[r + 1]].
    """

    pairs: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def one_pair_a_row(order: np.ndarray) -> PackedRows:
    """The rows of pairs that are not packed, in this order."""
    return PackedRows(np.asarray(order, np.int64), np.arange(len(order) + 1, dtype=np.int64))


def pack_rows(
    source_lengths_n: np.ndarray,
    target_lengths_n: np.ndarray,
    order_n: np.ndarray,
    row_lengths: tuple[int, int],
    window: int = PACKING_WINDOW,
) -> PackedRows:
    """Packs pairs into rows by first fit over a window of open rows.

    A pair goes into the oldest open row with room for both of its sides, else into a new one; when `window`
    rows are open the oldest is closed. Rows come in the order in which they were opened.

    Args:
      source_lengths_n: tokens of each source, at most row_lengths[0].
      target_lengths_n: tokens of each target, at most row_lengths[1].
      order_n: the order in which pairs are placed.
      row_lengths: tokens of a row, (source, target).
      window: how many rows stay open.
    """
    row_of = np.empty(len(order_n), np.int64)
    shortest_source, shortest_target = int(source_lengths_n.min()), int(target_lengths_n.min())
    room: list[tuple[int, int, int]] = []  # (row, source room, target room), oldest first
    rows = 0
    sides = zip(source_lengths_n[order_n].tolist(), target_lengths_n[order_n].tolist(), strict=True)
    for place, (source, target) in enumerate(sides):
        slot = _first_fit(room, source, target)
        if slot is None:
            if len(room) == window:
                del room[0]
            room.append((rows, *row_lengths))
            slot, rows = len(room) - 1, rows + 1
        row, source_room, target_room = room[slot]
        row_of[place] = row
        source_room, target_room = source_room - source, target_room - target
        if source_room < shortest_source or target_room < shortest_target:
            del room[slot]  # no pair fits any more
        else:
            room[slot] = (row, source_room, target_room)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(row_of, minlength=rows))])
    return PackedRows(np.asarray(order_n, np.int64)[np.argsort(row_of, kind="stable")], starts)


def _first_fit(room: list[tuple[int, int, int]], source: int, target: int) -> int | None:
    for slot, (_, source_room, target_room) in enumerate(room):
        if source <= source_room and target <= target_room:
            return slot
    return None


class RowStream:
    """Rows of epoch 0, 1, 2 …, each packed from its own permutation, with an address for each row.

    Only the index of two epochs is kept; row counts of all earlier ones are remembered, since the address of
    a row is a sum of them.
    """

    def __init__(self, count: int, seed: int, pack: Callable[[np.ndarray], PackedRows]):
        self._count, self._seed, self._pack = count, seed, pack
        self._row_ends: list[int] = []  # rows in epochs 0 … e, by e
        self._packed: collections.OrderedDict[int, PackedRows] = collections.OrderedDict()
        self._lock = threading.Lock()  # a prefetching thread and the main one may both ask

    def epoch(self, epoch: int) -> PackedRows:
        """The packed rows of an epoch."""
        with self._lock:
            return self._epoch(epoch)

    def _epoch(self, epoch: int) -> PackedRows:
        if epoch not in self._packed:
            generator = np.random.Generator(np.random.Philox(key=np.array([self._seed, epoch], np.uint64)))
            self._packed[epoch] = self._pack(generator.permutation(self._count))
            if len(self._packed) > _EPOCHS_KEPT:
                self._packed.popitem(last=False)
        self._packed.move_to_end(epoch)
        return self._packed[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """(epoch, row within it) of a row of the stream."""
        if row < 0:
            raise ValueError(f"there is no row {row}: steps count from 0")
        with self._lock:
            while not self._row_ends or self._row_ends[-1] <= row:
                before = self._row_ends[-1] if self._row_ends else 0
                self._row_ends.append(before + len(self._epoch(len(self._row_ends))))
            epoch = bisect.bisect_right(self._row_ends, row)
            return epoch, row - (self._row_ends[epoch - 1] if epoch else 0)

    def rows(self, first: int, count: int) -> PackedRows:
        """`count` rows of the stream from row `first` on."""
        epoch, row = self.locate(first)
        pairs, sizes, missing = [], [], count
        while missing:
            packed = self.epoch(epoch)
            end = min(row + missing, len(packed))
            pairs.append(packed.pairs[packed.starts[row] : packed.starts[end]])
            sizes.append(np.diff(packed.starts[row : end + 1]))
            missing -= end - row
            epoch, row = epoch + 1, 0
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(sizes))])
        return PackedRows(np.concatenate(pairs), starts)
