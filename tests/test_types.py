from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.types import Examples, LossSums, RaggedTokens, TokenPairs

SEQUENCES = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=8)


@st.composite
def sequences_and_rows(draw):
    sequences = draw(SEQUENCES.filter(len))
    rows = draw(st.lists(st.integers(0, len(sequences) - 1), max_size=12))
    return sequences, rows


def as_lists(ragged: RaggedTokens) -> list[list[int]]:
    return [ragged[row].tolist() for row in range(len(ragged))]


@given(SEQUENCES)
@settings(deadline=None)
def test_ragged_tokens_hold_what_was_put_in(sequences):
    ragged = RaggedTokens.from_lists(sequences)
    assert as_lists(ragged) == sequences
    assert ragged.lengths.tolist() == [len(s) for s in sequences]
    assert (ragged.values.dtype, ragged.offsets.dtype) == (np.int32, np.int64)


@given(sequences_and_rows())
@settings(deadline=None)
def test_take_is_indexing_of_lists(drawn):
    sequences, rows = drawn
    taken = RaggedTokens.from_lists(sequences).take(np.array(rows, np.int64))
    assert as_lists(taken) == [sequences[row] for row in rows]
    assert (taken.values.dtype, taken.offsets.dtype) == (np.int32, np.int64)


@given(sequences_and_rows())
@settings(deadline=None)
def test_examples_take_keeps_texts_ids_and_tokens_together(drawn):
    sequences, rows = drawn
    count = len(sequences)
    ragged = RaggedTokens.from_lists(sequences)
    backwards = RaggedTokens.from_lists([s[::-1] for s in sequences])
    examples = Examples(
        [f"source {k}" for k in range(count)],
        [f"target {k}" for k in range(count)],
        TokenPairs(np.arange(count) + 10**12, ragged, backwards),
    )
    taken = examples.take(np.array(rows, np.int64))
    assert len(taken) == len(taken.tokens) == len(rows)
    assert taken.ids.tolist() == [row + 10**12 for row in rows]
    assert taken.sources == [f"source {row}" for row in rows]
    assert taken.targets == [f"target {row}" for row in rows]
    assert as_lists(taken.tokens.sources) == [sequences[row] for row in rows]
    assert as_lists(taken.tokens.targets) == [sequences[row][::-1] for row in rows]


def test_sums_of_losses_are_a_tree_of_arrays():
    sums = LossSums(np.float32(3), np.float32(2), {"z": (np.float32(1), np.float32(2))})
    doubled = jax.tree.map(lambda x, y: x + y, sums, sums)
    assert (doubled.loss, doubled.weight, doubled.metrics) == (6, 4, {"z": (2, 4)})
