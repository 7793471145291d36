from __future__ import annotations

import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.data import batches, packing
from rest_jax.types import EOS_ID, RaggedTokens, TokenPairs

SOURCE_LENGTH, TARGET_LENGTH = 12, 10


def _pairs(count: int, seed: int = 0, longest: int = 9) -> TokenPairs:
    """Pairs of random lengths; token values tell pair and position, so a mix-up cannot go unseen."""
    rng = np.random.default_rng(seed)

    def side(offset: int) -> RaggedTokens:
        lengths = rng.integers(1, longest + 1, count)
        return RaggedTokens.from_lists(
            [
                [1000 * (row + 1) + offset + k for k in range(n - 1)] + [EOS_ID]
                for row, n in enumerate(lengths)
            ]
        )

    return TokenPairs(np.arange(count, dtype=np.int64) * 7 + 3, side(2), side(502))


def _packed(
    pairs: TokenPairs, batch_size: int = 4, seed: int = 0, pack: bool = True
) -> batches.PackedBatches:
    return batches.PackedBatches(pairs, batch_size, SOURCE_LENGTH, TARGET_LENGTH, seed, pack)


def _pairs_in(batch, row: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(source, target) tokens of every segment of a row, read back from the padded arrays."""
    found = []
    sources, targets = batch.encoder_segment_ids[row], batch.decoder_segment_ids[row]
    for segment in range(1, max(sources.max(), targets.max()) + 1):
        found.append(
            (
                tuple(batch.encoder_input_tokens[row][sources == segment].tolist()),
                tuple(batch.decoder_target_tokens[row][targets == segment].tolist()),
            )
        )
    return found


def _all_pairs(pairs: TokenPairs) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(pairs.sources[i].tolist()), tuple(pairs.targets[i].tolist())) for i in range(len(pairs))]


def _leaves_equal(left, right) -> bool:
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def test_a_packed_row_by_hand():
    pairs = TokenPairs(
        np.array([1, 2]),
        RaggedTokens.from_lists([[5, 6, 1], [7, 1]]),
        RaggedTokens.from_lists([[8, 1], [9, 10, 1]]),
    )
    (batch,) = batches.eval_batches(pairs, 1, 6, 6, pack=True)
    np.testing.assert_array_equal(batch.encoder_input_tokens, [[5, 6, 1, 7, 1, 0]])
    np.testing.assert_array_equal(batch.encoder_segment_ids, [[1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(batch.decoder_target_tokens, [[8, 1, 9, 10, 1, 0]])
    np.testing.assert_array_equal(batch.decoder_input_tokens, [[0, 8, 0, 9, 10, 0]])
    np.testing.assert_array_equal(batch.decoder_segment_ids, [[1, 1, 2, 2, 2, 0]])
    np.testing.assert_array_equal(batch.decoder_loss_weights, [[1, 1, 1, 1, 1, 0]])


def test_an_unpacked_batch_by_hand():
    pairs = TokenPairs(
        np.array([1]), RaggedTokens.from_lists([[5, 6, 1]]), RaggedTokens.from_lists([[8, 9, 1]])
    )
    (batch,) = batches.eval_batches(pairs, 2, 4, 5)
    np.testing.assert_array_equal(batch.encoder_input_tokens, [[5, 6, 1, 0], [0] * 4])
    np.testing.assert_array_equal(batch.decoder_target_tokens, [[8, 9, 1, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.decoder_input_tokens, [[0, 8, 9, 0, 0], [0] * 5])
    np.testing.assert_array_equal(batch.decoder_loss_weights, [[1, 1, 1, 0, 0], [0] * 5])
    assert batch.encoder_segment_ids is None and batch.decoder_segment_ids is None


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**64 - 1), st.booleans())
def test_every_epoch_holds_every_example_once(count, batch_size, seed, pack):
    pairs = _pairs(count, seed=seed % 1000)
    data = _packed(pairs, batch_size, seed, pack)
    rows = sum(data.rows_per_epoch(epoch) for epoch in range(3))
    steps = -(-rows // batch_size)
    ids = np.concatenate([data.ids_at(step) for step in range(steps)])
    for epoch in range(3):
        part = ids[epoch * count : (epoch + 1) * count]
        np.testing.assert_array_equal(np.sort(part), pairs.ids)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 25), st.integers(1, 5), st.integers(0, 100))
def test_tokens_in_a_batch_are_those_of_its_ids(count, batch_size, seed):
    pairs = _pairs(count, seed)
    data = _packed(pairs, batch_size, seed)
    row_of = {int(example_id): row for row, example_id in enumerate(pairs.ids)}
    expected = _all_pairs(pairs)
    for step in range(4):
        batch = data.at(step)
        found = [pair for row in range(batch_size) for pair in _pairs_in(batch, row)]
        assert found == [expected[row_of[int(i)]] for i in data.ids_at(step)]
        weights = batch.decoder_loss_weights
        np.testing.assert_array_equal(weights > 0, batch.decoder_segment_ids > 0)
        assert weights.sum() == sum(len(target) for _, target in found)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 25), st.integers(0, 100))
def test_decoder_inputs_are_targets_shifted_within_their_segment(count, seed):
    batch = _packed(_pairs(count, seed), 3, seed).at(1)
    for row in range(3):
        segments, targets = batch.decoder_segment_ids[row], batch.decoder_target_tokens[row]
        for position in range(TARGET_LENGTH):
            first = position == 0 or segments[position] != segments[position - 1]
            expected = 0 if first or segments[position] == 0 else targets[position - 1]
            assert batch.decoder_input_tokens[row][position] == expected


def test_a_batch_depends_on_seed_and_step_only():
    pairs = _pairs(31)
    unbroken = _packed(pairs)
    walked = [unbroken.at(step) for step in range(60)]
    for step in (0, 59, 7, 58, 23):  # a fresh loader, and one that jumps about
        assert _leaves_equal(_packed(pairs).at(step), walked[step])
        assert _leaves_equal(unbroken.at(step), walked[step])
    assert not _leaves_equal(_packed(pairs, seed=1).at(0), walked[0])


def test_epochs_have_different_orders():
    data = _packed(_pairs(30), pack=False, batch_size=30)
    assert not np.array_equal(data.ids_at(0), data.ids_at(1))


def test_batches_have_one_shape_over_the_end_of_an_epoch():
    data = _packed(_pairs(9), batch_size=5)
    shapes = {data.at(step).encoder_input_tokens.shape for step in range(12)}
    assert shapes == {(5, SOURCE_LENGTH)}
    assert all((data.at(step).encoder_segment_ids.max(axis=1) > 0).all() for step in range(12))


@pytest.mark.parametrize("pack", [True, False])
def test_examples_seen_and_epoch_count_what_was_given(pack):
    pairs = _pairs(17)
    data = _packed(pairs, batch_size=3, pack=pack)
    seen = 0
    for step in range(25):
        assert data.examples_seen(step) == seen
        rows_before = step * 3
        epoch = 0
        while rows_before >= data.rows_per_epoch(epoch):
            rows_before -= data.rows_per_epoch(epoch)
            epoch += 1
        assert data.epoch_of(step) == epoch
        seen += len(data.ids_at(step))


def test_fill_rates_count_tokens_over_places():
    pairs = _pairs(50)
    data = _packed(pairs, batch_size=50)
    rates, rows = data.fill_rates(), data.rows_per_epoch()
    sources = np.concatenate([data.at(step).encoder_segment_ids for step in range(2)])[:rows]
    targets = np.concatenate([data.at(step).decoder_segment_ids for step in range(2)])[:rows]
    assert rates.source == pytest.approx((sources > 0).mean())
    assert rates.target == pytest.approx((targets > 0).mean())
    assert rates.pairs_per_row == pytest.approx(50 / rows)
    assert _packed(pairs, pack=False).fill_rates().pairs_per_row == 1


def test_packing_fills_rows_well_and_fast():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.5, 0.6, 50_000).astype(np.int64) + 2, 2, 64)
    others = np.clip((lengths * rng.uniform(0.8, 1.2, 50_000)).astype(np.int64), 2, 64)
    before = time.perf_counter()
    rows = packing.pack_rows(lengths, others, rng.permutation(50_000), (128, 128))
    assert time.perf_counter() - before < 2  # about 0.05 s on an idle core
    assert lengths.sum() / (len(rows) * 128) > 0.9
    np.testing.assert_array_equal(np.sort(rows.pairs), np.arange(50_000))
    for side in (lengths, others):
        assert np.add.reduceat(side[rows.pairs], rows.starts[:-1]).max() <= 128


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=30), st.integers(1, 4))
def test_packing_is_first_fit_over_the_open_rows(sides, window):
    lengths, room = np.array(sides), np.array([6, 8])
    least = lengths.min(axis=0)
    rows: list[list[int]] = []
    still_open: list[int] = []
    for pair in range(len(sides)):
        fitting = [r for r in still_open if (lengths[[*rows[r], pair]].sum(axis=0) <= room).all()]
        if not fitting:
            rows.append([])
            still_open = [*still_open, len(rows) - 1][-window:]
        row = fitting[0] if fitting else len(rows) - 1
        rows[row].append(pair)
        if (room - lengths[rows[row]].sum(axis=0) < least).any():
            still_open.remove(row)
    found = packing.pack_rows(lengths[:, 0], lengths[:, 1], np.arange(len(sides)), (6, 8), window)
    assert [found.pairs[a:b].tolist() for a, b in zip(found.starts, found.starts[1:], strict=False)] == rows


@pytest.mark.parametrize("pack", [True, False])
def test_eval_batches_hold_every_pair_once_in_order(pack):
    pairs = _pairs(11)
    made = batches.eval_batches(pairs, 4, SOURCE_LENGTH, TARGET_LENGTH, pack)
    assert all(batch.encoder_input_tokens.shape == (4, SOURCE_LENGTH) for batch in made)
    assert sum(batch.decoder_loss_weights.sum() for batch in made) == pairs.targets.lengths.sum()
    tokens = np.concatenate([b.decoder_target_tokens[b.decoder_loss_weights > 0] for b in made])
    if pack:
        np.testing.assert_array_equal(np.sort(tokens), np.sort(pairs.targets.values))
    else:
        np.testing.assert_array_equal(tokens, pairs.targets.values)
        assert len(made) == 3
        assert not made[-1].decoder_loss_weights[3:].any()


def test_too_long_and_empty_pairs_are_named_never_cut():
    pairs = _pairs(5, longest=6)
    longer = RaggedTokens.from_lists([*[pairs.targets[i] for i in range(4)], np.arange(2, 13)])
    with pytest.raises(errors.DataError, match="example 31 has a target of 11 tokens; a row holds 10"):
        _packed(TokenPairs(pairs.ids, pairs.sources, longer))
    with pytest.raises(errors.DataError, match="example 31 has a source of 11 tokens"):
        batches.eval_batches(TokenPairs(pairs.ids, longer, pairs.targets), 2, 10, 20)
    empty = RaggedTokens.from_lists([*[pairs.targets[i] for i in range(4)], []])
    with pytest.raises(errors.DataError, match="example 31 has a target of 0 tokens"):
        _packed(TokenPairs(pairs.ids, pairs.sources, empty))
    with pytest.raises(errors.DataError, match="0 examples"):
        _packed(pairs.take(np.zeros(0, np.int64)))


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"source_length": 0}, {"target_length": -1}, {"seed": -1}, {"seed": 2**64}]
)
def test_wrong_sizes_are_named(wrong):
    sizes = {"batch_size": 2, "source_length": 12, "target_length": 12, "seed": 0} | wrong
    with pytest.raises(errors.ConfigError, match=next(iter(wrong))):
        batches.PackedBatches(_pairs(3), **sizes)


def test_steps_before_the_first_are_refused():
    with pytest.raises(ValueError, match="steps count from 0"):
        _packed(_pairs(3)).at(-1)


def test_pad_to():
    rows = RaggedTokens.from_lists([[4, 5], [], [6, 7, 8]])
    np.testing.assert_array_equal(batches.pad_to(rows, 3), [[4, 5, 0], [0, 0, 0], [6, 7, 8]])
    assert batches.pad_to(rows.take(np.zeros(0, np.int64)), 3).shape == (0, 3)
    with pytest.raises(errors.DataError, match="sequence 2 has 3 tokens, more than the 2"):
        batches.pad_to(rows, 2)


def test_reward_decoder_inputs_begin_with_the_start_symbol():
    rows = RaggedTokens.from_lists([[4, 1], [1]])
    np.testing.assert_array_equal(batches.reward_decoder_inputs(rows, 4), [[0, 4, 1, 0], [0, 1, 0, 0]])
    with pytest.raises(errors.DataError, match="more than the 1"):
        batches.reward_decoder_inputs(rows, 2)


def test_reward_batches_hold_every_scored_pair_once_an_epoch():
    pairs, scores = _pairs(10), np.linspace(0, 1, 10)
    data = batches.RewardBatches(pairs, scores, 4, SOURCE_LENGTH, TARGET_LENGTH, seed=3)
    seen = np.concatenate([data.at(step).scores for step in range(5)])
    for epoch in range(2):
        np.testing.assert_allclose(np.sort(seen[epoch * 10 : epoch * 10 + 10]), scores, rtol=1e-6)
    assert (data.epoch_of(2), data.epoch_of(3), data.examples_seen(3)) == (0, 1, 12)
    again = batches.RewardBatches(pairs, scores, 4, SOURCE_LENGTH, TARGET_LENGTH, seed=3)
    assert _leaves_equal(again.at(4), data.at(4))


def test_reward_rows_hold_source_hypothesis_and_score():
    pairs, scores = _pairs(5), np.linspace(0, 1, 5)
    first, last = batches.reward_eval_batches(pairs, scores, 4, SOURCE_LENGTH, TARGET_LENGTH)
    np.testing.assert_array_equal(first.encoder_input_tokens[2][: len(pairs.sources[2])], pairs.sources[2])
    np.testing.assert_array_equal(
        first.decoder_input_tokens[2][1 : 1 + len(pairs.targets[2])], pairs.targets[2]
    )
    assert not first.decoder_input_tokens[:, 0].any()
    np.testing.assert_array_equal(first.row_weights, [1, 1, 1, 1])
    np.testing.assert_array_equal(last.row_weights, [1, 0, 0, 0])
    np.testing.assert_allclose(np.concatenate([first.scores, last.scores]), [0, 0.25, 0.5, 0.75, 1, 0, 0, 0])
    assert last.encoder_input_tokens.shape == first.encoder_input_tokens.shape


@pytest.mark.parametrize("score", [np.nan, -0.01, 1.01])
def test_scores_must_be_there_and_in_range(score):
    with pytest.raises(errors.DataError, match="example 10 has the score"):
        batches.reward_eval_batches(_pairs(3), np.array([0.5, score, 0.5]), 2, 12, 12)
    with pytest.raises(errors.DataError, match="2 scores for 3 pairs"):
        batches.RewardBatches(_pairs(3), np.ones(2), 2, 12, 12, seed=0)


def test_the_stream_of_examples_is_that_of_earlier_versions():
    """A run begun with one version and resumed with another must not see other batches."""
    data = _packed(_pairs(12), batch_size=2, seed=2**63)
    assert data.ids_at(0).tolist() + data.ids_at(4).tolist() == [10, 59, 24, 80, 17, 66]


def test_numbers_of_tokens_lie_beside_their_tokens():
    """Each column is the token's id times a factor, packed or not, in training and in evaluation."""
    sources = RaggedTokens.from_lists([[5, 1], [6, 7, 1], [8, 1], [9, 3, 1]])
    targets = RaggedTokens.from_lists([[11, 1], [12, 13, 14, 1], [15, 1], [1]])
    pairs = TokenPairs(np.arange(4), sources, targets).with_columns(
        {"half": targets.values.astype(np.float32) / 2, "place": np.arange(len(targets.values))}
    )
    for batch in (
        *(
            batches.PackedBatches(pairs, 2, 8, 8, seed=3, pack=p).at(k)
            for p in (True, False)
            for k in range(3)
        ),
        *batches.eval_batches(pairs, 2, 8, 8, pack=True),
        *batches.eval_batches(pairs, 3, 8, 8),
    ):
        np.testing.assert_array_equal(batch.token_columns["half"], batch.decoder_target_tokens / 2)
        assert batch.token_columns["half"].dtype == np.float32
        counted = batch.decoder_loss_weights > 0
        places = batch.token_columns["place"][counted]
        np.testing.assert_array_equal(targets.values[places], batch.decoder_target_tokens[counted])
    taken = pairs.take(np.array([3, 1]))
    np.testing.assert_array_equal(taken.token_columns["half"], taken.targets.values / 2)
    with pytest.raises(ValueError, match="half"):
        pairs.with_columns({"half": np.zeros(3, np.float32)})
