"""Scored Grow steps as Improve sees them: D_g, read row group by row group and judged source by source.

Floor 6. A filter needs rewards, keys and flags; the tokens are read of those samples that pass it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rest_jax import errors
from rest_jax.data.candidates import CandidateReader
from rest_jax.data.whole_sources import Piece, concatenated, merged, whole_sources
from rest_jax.objectives import statistics
from rest_jax.objectives.guards import GuardConfig, GuardedColumns, taken_out
from rest_jax.objectives.kept import KeptCounts
from rest_jax.objectives.rules import Rule, source_starts
from rest_jax.objectives.selections import cap_priorities, capped
from rest_jax.objectives.statistics import Chunks
from rest_jax.phases.workspace import Workspace
from rest_jax.types import RaggedTokens

SUMMARY_NAME = "summary.json"
DATASET_REWARDS_NAME = "rewards.npy"
_BANDS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """D as a filter sees it, in the order of the train split.

    Attributes:
      ids: int64 [m], all different.
      rewards: float64 [m].
      source_tokens: int64 [m], tokens of each source, its end of sentence not counted.
    """

    ids: np.ndarray
    rewards: np.ndarray
    source_tokens: np.ndarray

    @functools.cached_property
    def by_id(self) -> np.ndarray:
        """The rows sorted by id, int64 [m]."""
        return np.argsort(self.ids, kind="stable")

    def rows_of(self, example_ids: np.ndarray) -> np.ndarray:
        """The rows at which these ids, int64 [n], stand: int64 [n].

        Raises:
          IntegrityError: one of them is not there.
        """
        rows = np.zeros(len(example_ids), np.int64)
        if len(self.ids):
            places = np.searchsorted(self.ids, example_ids, sorter=self.by_id)
            rows = self.by_id[np.minimum(places, len(self.ids) - 1)]
        unknown = self.ids[rows] != example_ids if len(self.ids) else np.ones(len(rows), bool)
        if unknown.any():
            raise errors.IntegrityError(
                f"a sample is of example {example_ids[unknown][0]}, which the train split does not have",
                remedy="Delete the Grow step's folder and run grow again",
            )
        return rows


class Judged(NamedTuple):
    """Samples of whole sources before the filter.

    Attributes:
      piece: the samples.
      rewards: float64 [n]; NaN also where a guard took the sample out.
      taken: how many each guard took.
    """

    piece: Piece
    rewards: np.ndarray
    taken: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Sieve:
    """All that decides which candidates are kept.

    Attributes:
      rule: the filter.
      guards: which samples are out before it.
      max_per_source: at most so many samples are kept of a source; None is no cap.
      seed: of the choice that the cap makes.
      dataset_competes: whether the pairs of D are among the candidates of their sources.
    """

    rule: Rule
    guards: GuardConfig = GuardConfig()
    max_per_source: int | None = None
    seed: int = 0
    dataset_competes: bool = True


@dataclasses.dataclass(frozen=True)
class Survivors:
    """What passes a filter.

    Attributes:
      example_ids: int64 [n], the source of each sample, rising.
      rewards: float64 [n].
      tokens: n token sequences.
      kept_dataset: bool [m], which pairs of D passed; none where D does not compete.
      counts: of the samples, what was kept of what; one that a guard took counts as one without a reward.
      guarded: how many samples each guard took that is on.
    """

    example_ids: np.ndarray
    rewards: np.ndarray
    tokens: RaggedTokens
    kept_dataset: np.ndarray
    counts: KeptCounts
    guarded: Mapping[str, int]


class _Bits:
    """Flags that are appended and read in order, one bit each: 16 million take 2 MB."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, np.ndarray]] = []

    def append(self, flags: np.ndarray) -> None:
        """Takes in further flags, bool [n]."""
        if len(flags):
            self._parts.append((len(flags), np.packbits(flags)))

    def reader(self) -> Callable[[int], np.ndarray]:
        """A function that gives the next n flags, bool [n], from the start."""
        parts, held = iter(self._parts), np.zeros(0, bool)

        def following(count: int) -> np.ndarray:
            nonlocal held
            while len(held) < count:
                size, packed = next(parts)
                held = np.concatenate([held, np.unpackbits(packed, count=size).view(bool)])
            given, held = held[:count], held[count:]
            return given

        return following


@dataclasses.dataclass(frozen=True)
class GrowSet:
    """D_g as files: the samples of one or several Grow steps on disk, the rewards of D in memory.

    Attributes:
      readers: the samples by g, with the rewards of this name.
      reward: the rewards' name.
      dataset: D.
    """

    readers: Mapping[int, CandidateReader]
    reward: str
    dataset: Dataset
    _known: dict[GuardConfig, Mapping[int, _Bits]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def rewards(self) -> Chunks:
        """The rewards of the samples, in the order of the stores."""
        chunks = [reader.reward_chunks(self.reward) for reader in self.readers.values()]
        return Chunks(lambda: itertools.chain.from_iterable(chunks))

    def usable_rewards(self, guards: GuardConfig, with_dataset: bool = False) -> Chunks:
        """The rewards that a filter sees, NaN where a guard took the sample out; those of D at the end.

        They are gone through several times. What the guards look at is read for the first pass alone; then it
        is known by a bit a sample.
        """

        def once() -> Iterator[np.ndarray]:
            for number, reader in self.readers.items():
                chunks = reader.reward_chunks(self.reward)
                if not guards.names:
                    yield from chunks
                    continue
                bits = self._without_reward(guards)[number].reader()
                yield from (np.where(bits(len(rewards)), np.nan, rewards) for rewards in chunks)
            if with_dataset:
                yield self.dataset.rewards

        return Chunks(once)

    def _without_reward(self, guards: GuardConfig) -> Mapping[int, _Bits]:
        """By g, which samples have no reward after the guards, in the order of the store."""
        if guards not in self._known:
            found = {number: _Bits() for number in self.readers}
            for piece, rewards, _ in self.judged(guards):
                for number, bits in found.items():
                    bits.append(np.isnan(rewards[piece.grow_steps == number]))
            self._known[guards] = found
        return self._known[guards]

    def judged(self, guards: GuardConfig) -> Iterator[Judged]:
        """The samples in pieces of whole sources, those of several Grow steps merged, behind the guards.

        Raises:
          IntegrityError: a shard is damaged, or a sample is of no source of D.
        """
        columns = (*guards.flags, *(("text",) if guards.distinct else ()))
        if guards.length_ratio is not None and "truncated" not in columns:
            columns = (*columns, "truncated")
        streams = [
            whole_sources(reader.batches(columns), self.reward, number)
            for number, reader in self.readers.items()
        ]
        for piece in merged(streams):
            taken = taken_out(guards, self._guarded_columns(piece, guards), len(piece))
            out = np.zeros(len(piece), bool)
            for mask in taken.values():
                out |= mask
            counts = {guard: int(mask.sum()) for guard, mask in taken.items()}
            yield Judged(piece, np.where(out, np.nan, piece.rewards), counts)

    def survivors(self, sieve: Sieve, bands: Sequence[tuple[float, float]] = ()) -> Survivors:
        """What passes: samples with their tokens, and pairs of D if they compete.

        Args:
          sieve: what decides.
          bands: quantiles that the counts are divided by, see `reward_bands`.
        """
        counts, guarded = KeptCounts(bands), dict.fromkeys(sieve.guards.names, 0)
        found: list[tuple[np.ndarray, np.ndarray, RaggedTokens]] = []
        rivals = _Rivals(self.dataset, sieve.dataset_competes)
        for piece, rewards, taken in self.judged(sieve.guards):
            kept = rivals.judge(sieve.rule, piece.example_ids, rewards)
            starts = source_starts(piece.example_ids)
            if sieve.max_per_source is not None:
                address = piece.grow_steps, piece.example_ids, piece.samples
                kept = capped(kept, cap_priorities(sieve.seed, *address), starts, sieve.max_per_source)
            counts.add(rewards, kept, starts)
            guarded = {guard: guarded[guard] + number for guard, number in taken.items()}
            rows = np.flatnonzero(kept)
            if rows.size:
                found.append((piece.example_ids[rows], rewards[rows], piece.tokens(rows)))
        rivals.judge_rest(sieve.rule)
        return Survivors(
            np.concatenate([np.zeros(0, np.int64), *(ids for ids, _, _ in found)]),
            np.concatenate([np.zeros(0), *(rewards for _, rewards, _ in found)]),
            concatenated([tokens for _, _, tokens in found]),
            rivals.kept,
            counts,
            guarded,
        )

    def reward_bands(self, guards: GuardConfig) -> list[tuple[float, float]]:
        """The rewards that shares of the samples lie at or below, as (share, reward); of none, nothing."""
        try:
            found = statistics.quantiles(self.usable_rewards(guards), _BANDS)
        except errors.DataError:
            return []
        return list(zip(_BANDS, found, strict=True))

    def _guarded_columns(self, piece: Piece, guards: GuardConfig) -> GuardedColumns:
        tokens = source_tokens = source_and_text = None
        if guards.length_ratio is not None:
            lengths = piece.tokens(np.arange(len(piece))).lengths
            tokens = lengths - ~piece.column("truncated")  # a sample that is not truncated ends with EOS
            source_tokens = self.dataset.source_tokens[self.dataset.rows_of(piece.example_ids)]
        if guards.distinct:
            codes = piece.table["text"].combine_chunks().dictionary_encode().indices.to_numpy()
            source_and_text = np.stack([piece.example_ids, codes.astype(np.int64)], axis=1)
        flags = {name: piece.column(name) for name in guards.flags}
        return GuardedColumns(flags, tokens, source_tokens, source_and_text)


class _Rivals:
    """The pairs of D, each brought in among the candidates of its source when that source comes by.

    Of equal rewards the pair of D stands first: it was written by people.
    """

    def __init__(self, dataset: Dataset, compete: bool):
        self.kept = np.zeros(len(dataset.ids), bool)
        self._order = dataset.by_id if compete else np.zeros(0, np.int64)
        self._ids, self._rewards = dataset.ids[self._order], dataset.rewards[self._order]
        self._next = 0

    def judge(self, rule: Rule, example_ids: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Which of the samples of whole sources pass, bool [n]; the pairs of D up to there are judged too."""
        end = int(np.searchsorted(self._ids, example_ids[-1], side="right"))
        return self._judge(rule, end, example_ids, rewards)

    def judge_rest(self, rule: Rule) -> None:
        """The pairs of D behind the last source that has samples."""
        self._judge(rule, len(self._ids), np.zeros(0, np.int64), np.zeros(0))

    def _judge(self, rule: Rule, end: int, example_ids: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        pairs = slice(self._next, end)
        self._next = end
        count = end - pairs.start
        ids = np.concatenate([self._ids[pairs], example_ids])
        order = np.argsort(ids, kind="stable")  # of one source the pair of D first
        passed = np.zeros(len(ids), bool)
        together = np.concatenate([self._rewards[pairs], rewards])[order]
        passed[order] = rule.judge(together, source_starts(ids[order]))
        self.kept[self._order[pairs]] = passed[:count]
        return passed[count:]


def dataset_rewards(workspace: Workspace) -> np.ndarray:
    """The rewards of D, float64 [m], in the order of the train split."""
    workspace.require(workspace.dataset_rewards_folder, "annotate")
    return np.load(workspace.dataset_rewards_folder / DATASET_REWARDS_NAME, allow_pickle=False)


def open_grow_set(workspace: Workspace, *numbers: int) -> GrowSet:
    """The samples of Grow steps with their rewards; no more than the seals is read of them here."""
    kind = workspace.experiment.reward.kind
    readers = {}
    for number in numbers:
        workspace.require(workspace.grow_rewards_folder(number), "annotate")
        readers[number] = CandidateReader(workspace.grow_folder(number), [kind])
    rewards = dataset_rewards(workspace)
    examples = workspace.split("train")
    source_tokens = examples.tokens.sources.lengths - 1  # each ends with EOS
    return GrowSet(readers, kind, Dataset(examples.ids, rewards, source_tokens))
