"""Row groups become pieces of whole sources, and streams are merged, however the rows are cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.data import candidate_shard
from rest_jax.data.candidate_reader import Batch
from rest_jax.data.whole_sources import Piece, merged, whole_sources
from rest_jax.types import RaggedTokens

_SIZES = st.lists(st.integers(0, 5), max_size=8)  # samples of the sources 100, 101, …; 0: it is not there
_CUTS = st.lists(st.integers(0, 40), max_size=6)


def rows_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(example id, sample) of all rows."""
    return [(100 + k, sample) for k, size in enumerate(sizes) for sample in range(size)]


def batches_of(
    sizes: Sequence[int], cuts: Sequence[int], mark: int, read: list[int] | None = None
) -> Iterator[Batch]:
    """Batches of the rows, cut there; row k has the reward k and the tokens [mark, k, 1]."""
    rows = rows_of(sizes)
    ends = sorted(min(cut, len(rows)) for cut in cuts)
    for first, last in itertools.pairwise([0, *ends, len(rows)]):
        numbers = list(range(first, last))
        keys = pa.table(
            {
                "example_id": pa.array([rows[k][0] for k in numbers], pa.int64()),
                "sample": pa.array([rows[k][1] for k in numbers], pa.int32()),
            }
        )

        def more(columns: Sequence[str], numbers: list[int] = numbers, keys: pa.Table = keys) -> pa.Table:
            assert "tokens" in columns
            if read is not None:
                read.append(len(numbers))
            tokens = pa.array([[mark, k, 1] for k in numbers], candidate_shard.SCHEMA.field("tokens").type)
            return keys.append_column("tokens", tokens)

        yield Batch(keys, {"r": np.array(numbers, np.float64)}, more)


def told(pieces: Sequence[Piece]) -> list[tuple[int, int, int, int]]:
    """(example id, g, sample, reward) of all rows."""
    return [
        row
        for piece in pieces
        for row in zip(
            piece.example_ids.tolist(),
            piece.grow_steps.tolist(),
            piece.samples.tolist(),
            piece.rewards.astype(int).tolist(),
            strict=True,
        )
    ]


def lists(tokens: RaggedTokens) -> list[list[int]]:
    return [tokens[k].tolist() for k in range(len(tokens))]


def check_whole(pieces: Sequence[Piece]) -> None:
    """No source is in two pieces, and none is empty."""
    spans = [(int(piece.example_ids[0]), int(piece.example_ids[-1])) for piece in pieces]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))


@settings(deadline=None)
@given(_SIZES, _CUTS)
def test_a_stream_becomes_whole_sources(sizes, cuts):
    pieces = list(whole_sources(batches_of(sizes, cuts, 7), "r", 3))
    check_whole(pieces)
    rows = rows_of(sizes)
    assert told(pieces) == [(i, 3, sample, k) for k, (i, sample) in enumerate(rows)]


@settings(deadline=None)
@given(st.lists(st.tuples(_SIZES, _CUTS), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_streams_are_merged_by_source_and_keep_their_tokens(given_, random):
    streams = [
        whole_sources(batches_of(sizes, cuts, mark), "r", mark) for mark, (sizes, cuts) in enumerate(given_)
    ]
    pieces = list(merged(streams))
    check_whole(pieces)
    wanted = sorted(
        (example_id, mark, sample, k)
        for mark, (sizes, _) in enumerate(given_)
        for k, (example_id, sample) in enumerate(rows_of(sizes))
    )
    assert told(pieces) == wanted
    for piece in pieces:
        rows = np.array(random.sample(range(len(piece)), random.randint(0, len(piece))), np.int64)
        marks, numbers = piece.grow_steps[rows].tolist(), piece.rewards[rows].astype(int).tolist()
        assert lists(piece.tokens(rows)) == [[m, k, 1] for m, k in zip(marks, numbers, strict=True)]


def test_no_more_row_groups_are_held_than_a_source_spans():
    """Sources of 3 samples in row groups of 2: a piece knows the row groups of its own rows alone."""
    pieces = list(whole_sources(batches_of([3] * 50, range(0, 150, 2), 0), "r"))
    assert len(pieces) == 50
    assert max(len(piece._origins) for piece in pieces) <= 3


def test_tokens_are_read_once_a_row_group_and_only_where_asked_for():
    read: list[int] = []
    first, second = list(whole_sources(batches_of([3, 3], [4], 0, read), "r"))
    assert read == []
    assert lists(first.tokens(np.array([1]))) == [[0, 1, 1]]
    assert lists(first.tokens(np.array([2, 0]))) == [[0, 2, 1], [0, 0, 1]]
    assert read == [4]
    assert lists(second.tokens(np.array([0, 1, 2]))) == [[0, 3, 1], [0, 4, 1], [0, 5, 1]]
    assert read == [4, 2]
