"""Fixed-shape host batches whose content is a pure function of (seed, step).

Floor 3. The endless stream of rows of `packing.py` is cut into batches: epoch 0's rows, then epoch 1's, and
so on. The last batch of an epoch is filled from the next one, so no example is lost. Nothing here depends on
processes, on devices or on what was asked before, so a resumed run sees what an unbroken one would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from rest_jax import errors
from rest_jax.data.packing import PackedRows, RowStream, one_pair_a_row, pack_rows
from rest_jax.types import RaggedTokens, RewardBatch, Seq2SeqBatch, TokenPairs


@dataclasses.dataclass(frozen=True)
class FillRates:
    """How much of the rows is text: shares in (0, 1], and the mean number of pairs in a row."""

    source: float
    target: float
    pairs_per_row: float


def pad_to(rows: RaggedTokens, length: int) -> np.ndarray:
    """Pads every sequence with PAD on the right: int32 [n, length].

    Raises:
      DataError: a sequence is longer than `length`.
    """
    lengths = rows.lengths
    if len(rows) and lengths.max() > length:
        longest = int(lengths.argmax())
        raise errors.DataError(
            f"sequence {longest} has {lengths[longest]} tokens, more than the {length} of a row",
            remedy="Raise the row length, or drop or trim the sequence where it is made",
        )
    padded = np.zeros((len(rows), length), np.int32)
    padded[np.arange(length) < lengths[:, None]] = rows.values[rows.offsets[0] : rows.offsets[-1]]
    return padded


def reward_decoder_inputs(hypotheses: RaggedTokens, length: int) -> np.ndarray:
    """What the reward model's decoder reads: [PAD, hypothesis…, EOS, PAD…], int32 [n, length].

    The first PAD is the start symbol, so a row holds hypotheses of up to length - 1 tokens with their EOS.

    Raises:
      DataError: a hypothesis is longer than that.
    """
    started = np.zeros((len(hypotheses), length), np.int32)
    started[:, 1:] = pad_to(hypotheses, length - 1)
    return started


class PackedBatches:
    """Training batches of pairs.

    Args:
      pairs: what to train on; sources and targets end with EOS (a truncated sample's target does not).
      batch_size: rows of a batch, over all devices and processes.
      source_length: tokens of a row's source side.
      target_length: tokens of a row's target side.
      seed: of the epochs' permutations.
      pack: several pairs a row; otherwise one, and batches have no segment ids.

    Raises:
      ConfigError: a size is not positive or the seed is negative.
      DataError: there are no pairs, or one is empty or longer than a row; the message names its id.
    """

    def __init__(
        self,
        pairs: TokenPairs,
        batch_size: int,
        source_length: int,
        target_length: int,
        seed: int,
        pack: bool = True,
    ):
        _check_sizes(batch_size=batch_size, source_length=source_length, target_length=target_length)
        _check_seed(seed)
        _check_pairs(pairs, source_length, target_length)
        self._pairs, self._pack, self.batch_size = pairs, pack, batch_size
        self._row_lengths = (source_length, target_length)
        source_lengths, target_lengths = pairs.sources.lengths, pairs.targets.lengths

        def pack_epoch(order: np.ndarray) -> PackedRows:
            if not pack:
                return one_pair_a_row(order)
            return pack_rows(source_lengths, target_lengths, order, self._row_lengths)

        self._stream = RowStream(len(pairs), seed, pack_epoch)

    def at(self, step: int) -> Seq2SeqBatch:
        """The batch of a step: batch_size full rows, never a padded one."""
        rows = self._stream.rows(step * self.batch_size, self.batch_size)
        return _materialise(self._pairs, rows, self._row_lengths, self._pack)

    def ids_at(self, step: int) -> np.ndarray:
        """Ids of the examples in the batch of a step, int64, row after row."""
        return self._pairs.ids[self._stream.rows(step * self.batch_size, self.batch_size).pairs]

    def rows_per_epoch(self, epoch: int = 0) -> int:
        """Rows of one epoch; with packing it differs a little from epoch to epoch."""
        return len(self._stream.epoch(epoch))

    def epoch_of(self, step: int) -> int:
        """The epoch that the first row of a step's batch belongs to."""
        return self._stream.locate(step * self.batch_size)[0]

    def examples_seen(self, step: int) -> int:
        """Examples in all batches before this step."""
        epoch, row = self._stream.locate(step * self.batch_size)
        return epoch * len(self._pairs) + int(self._stream.epoch(epoch).starts[row])

    def fill_rates(self, epoch: int = 0) -> FillRates:
        """How full the rows of an epoch are."""
        rows = self.rows_per_epoch(epoch)
        source_length, target_length = self._row_lengths
        return FillRates(
            source=float(self._pairs.sources.lengths.sum() / (rows * source_length)),
            target=float(self._pairs.targets.lengths.sum() / (rows * target_length)),
            pairs_per_row=len(self._pairs) / rows,
        )


def eval_batches(
    pairs: TokenPairs, batch_size: int, source_length: int, target_length: int, pack: bool = False
) -> list[Seq2SeqBatch]:
    """All pairs once, in their order, as batches of one shape; rows that fill the last one have weight 0.

    Raises:
      ConfigError: a size is not positive.
      DataError: there are no pairs, or one is empty or longer than a row; the message names its id.
    """
    return list(iterate_batches(pairs, batch_size, source_length, target_length, pack))


def iterate_batches(
    pairs: TokenPairs, batch_size: int, source_length: int, target_length: int, pack: bool = False
) -> Iterator[Seq2SeqBatch]:
    """The batches of `eval_batches` one after the other, for pairs whose batches are too many for memory."""
    _check_sizes(batch_size=batch_size, source_length=source_length, target_length=target_length)
    _check_pairs(pairs, source_length, target_length)
    order, row_lengths = np.arange(len(pairs)), (source_length, target_length)
    rows = (
        pack_rows(pairs.sources.lengths, pairs.targets.lengths, order, row_lengths)
        if pack
        else one_pair_a_row(order)
    )
    for first in range(0, len(rows), batch_size):
        starts = rows.starts[np.minimum(np.arange(first, first + batch_size + 1), len(rows))]
        part = PackedRows(rows.pairs[starts[0] : starts[-1]], starts - starts[0])
        yield _materialise(pairs, part, row_lengths, pack)


class RewardBatches:
    """Training batches for the reward model: one scored pair a row.

    Args:
      pairs: sources and hypotheses (as targets), each ending with EOS.
      scores: float [n], in [0, 1].
      batch_size: rows of a batch, over all devices and processes.
      source_length: tokens of a row's source.
      target_length: tokens of a row's decoder input, which is one longer than the hypothesis.
      seed: of the epochs' permutations.

    Raises:
      ConfigError: a size is not positive or the seed is negative.
      DataError: no pairs, an empty or too long one, or a score that is missing or outside [0, 1].
    """

    def __init__(
        self,
        pairs: TokenPairs,
        scores: np.ndarray,
        batch_size: int,
        source_length: int,
        target_length: int,
        seed: int,
    ):
        _check_sizes(batch_size=batch_size, source_length=source_length, target_length=target_length)
        _check_seed(seed)
        _check_pairs(pairs, source_length, target_length - 1)
        self._pairs, self._scores, self.batch_size = pairs, _checked_scores(scores, pairs), batch_size
        self._row_lengths = (source_length, target_length)
        self._stream = RowStream(len(pairs), seed, one_pair_a_row)

    def at(self, step: int) -> RewardBatch:
        """The batch of a step."""
        rows = self._stream.rows(step * self.batch_size, self.batch_size).pairs
        return _reward_batch(self._pairs, self._scores, rows, self.batch_size, self._row_lengths)

    def epoch_of(self, step: int) -> int:
        """The epoch that the first row of a step's batch belongs to."""
        return self._stream.locate(step * self.batch_size)[0]

    def examples_seen(self, step: int) -> int:
        """Examples in all batches before this step."""
        return step * self.batch_size


def reward_eval_batches(
    pairs: TokenPairs, scores: np.ndarray, batch_size: int, source_length: int, target_length: int
) -> list[RewardBatch]:
    """All scored pairs once, in their order; rows that fill the last batch have weight 0.

    Raises:
      ConfigError: a size is not positive.
      DataError: as `RewardBatches`.
    """
    _check_sizes(batch_size=batch_size, source_length=source_length, target_length=target_length)
    _check_pairs(pairs, source_length, target_length - 1)
    scores, order = _checked_scores(scores, pairs), np.arange(len(pairs))
    return [
        _reward_batch(
            pairs, scores, order[first : first + batch_size], batch_size, (source_length, target_length)
        )
        for first in range(0, len(pairs), batch_size)
    ]


def _materialise(
    pairs: TokenPairs, rows: PackedRows, row_lengths: tuple[int, int], segments: bool
) -> Seq2SeqBatch:
    """Writes the tokens of packed rows into padded arrays."""
    source_length, target_length = row_lengths
    sources, source_segments, _ = _scatter(pairs.sources, rows, source_length)
    targets, target_segments, first_tokens = _scatter(pairs.targets, rows, target_length)
    inputs = np.zeros_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    inputs.reshape(-1)[first_tokens] = 0
    inputs[target_segments == 0] = 0  # the token after a row's last target
    columns = {
        name: _scatter(RaggedTokens(values, pairs.targets.offsets), rows, target_length)[0]
        for name, values in pairs.token_columns.items()
    }
    return Seq2SeqBatch(
        encoder_input_tokens=sources,
        decoder_input_tokens=inputs,
        decoder_target_tokens=targets,
        decoder_loss_weights=(target_segments > 0).astype(np.float32),
        encoder_segment_ids=source_segments if segments else None,
        decoder_segment_ids=target_segments if segments else None,
        token_columns=columns,
    )


def _scatter(side: RaggedTokens, rows: PackedRows, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segment ids (int32 [rows, length]), and the flat position of each segment's first token.

    The tokens may be numbers of any kind, one for each token.
    """
    taken = side.take(rows.pairs)
    sizes = np.diff(rows.starts)
    row_of = np.repeat(np.arange(len(rows)), sizes)
    segment_of = np.arange(len(rows.pairs)) - np.repeat(rows.starts[:-1], sizes) + 1
    first_in_row = np.repeat(taken.offsets[rows.starts[:-1]], sizes)
    first_tokens = row_of * length + taken.offsets[:-1] - first_in_row
    positions = np.arange(len(taken.values)) + np.repeat(first_tokens - taken.offsets[:-1], taken.lengths)
    tokens = np.zeros((len(rows), length), side.values.dtype)
    segments = np.zeros((len(rows), length), np.int32)
    tokens.reshape(-1)[positions] = taken.values
    segments.reshape(-1)[positions] = np.repeat(segment_of, taken.lengths)
    return tokens, segments, first_tokens


def _reward_batch(
    pairs: TokenPairs, scores: np.ndarray, rows: np.ndarray, batch_size: int, row_lengths: tuple[int, int]
) -> RewardBatch:
    source_length, target_length = row_lengths
    fill = ((0, batch_size - len(rows)), (0, 0))
    return RewardBatch(
        encoder_input_tokens=np.pad(pad_to(pairs.sources.take(rows), source_length), fill),
        decoder_input_tokens=np.pad(reward_decoder_inputs(pairs.targets.take(rows), target_length), fill),
        scores=np.pad(scores[rows], fill[0]),
        row_weights=np.pad(np.ones(len(rows), np.float32), fill[0]),
    )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise errors.ConfigError(f"{name} is {size}", where="batches", remedy="Give a positive number")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise errors.ConfigError(
            f"seed {seed} is not an unsigned 64-bit number",
            where="batches",
            remedy="Give one from 0 to 2**64 - 1",
        )


def _check_pairs(pairs: TokenPairs, source_limit: int, target_limit: int) -> None:
    if not len(pairs):
        raise errors.DataError("0 examples to make batches of", remedy="Check the split or its filter")
    sides = (("source", pairs.sources, source_limit), ("target", pairs.targets, target_limit))
    for side, rows, limit in sides:
        lengths = rows.lengths
        for wrong, why in ((lengths > limit, f"a row holds {limit}"), (lengths == 0, "not even an EOS")):
            if wrong.any():
                first = int(wrong.argmax())
                raise errors.DataError(
                    f"example {pairs.ids[first]} has a {side} of {lengths[first]} tokens; {why} "
                    f"({int(wrong.sum())} such examples)",
                    remedy="Raise the row's length, or trim or drop the examples where they are tokenised",
                )


def _checked_scores(scores: np.ndarray, pairs: TokenPairs) -> np.ndarray:
    scores = np.asarray(scores, np.float32)
    if scores.shape != (len(pairs),):
        raise errors.DataError(
            f"{scores.size} scores for {len(pairs)} pairs", remedy="Give each pair one score"
        )
    wrong = ~((scores >= 0) & (scores <= 1))  # NaN is wrong too
    if wrong.any():
        first = int(wrong.argmax())
        raise errors.DataError(
            f"example {pairs.ids[first]} has the score {scores[first]}, not one in [0, 1] "
            f"({int(wrong.sum())} such examples)",
            remedy="Scale the scores, and drop pairs without one",
        )
    return scores
