"""A scored Grow step as Improve sees it: D_g, read row group by row group.

Floor 6. The threshold needs the rewards alone, and the tokens are read of those samples that pass it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from rest_jax.data.candidates import Batch, CandidateReader
from rest_jax.objectives.filters import StreamedFilter
from rest_jax.objectives.statistics import Chunks
from rest_jax.phases.workspace import Workspace
from rest_jax.types import RaggedTokens

SUMMARY_NAME = "summary.json"
DATASET_REWARDS_NAME = "rewards.npy"


@dataclasses.dataclass(frozen=True)
class Survivors:
    """The samples that pass a threshold, in the order of the store.

    Attributes:
      example_ids: int64 [n], the source of each.
      tokens: n token sequences.
      counts: what was kept of what; a truncated sample that is left out counts as one without a reward.
      truncated_left_out: how many those are.
    """

    example_ids: np.ndarray
    tokens: RaggedTokens
    counts: StreamedFilter
    truncated_left_out: int


@dataclasses.dataclass(frozen=True)
class GrowSet:
    """D_g as files: the samples and their rewards on disk, the rewards of D in memory.

    Attributes:
      reader: the samples, with the rewards of this name.
      reward: the rewards' name.
      dataset_rewards: float64 [m], in the order of the train split.
    """

    reader: CandidateReader
    reward: str
    dataset_rewards: np.ndarray

    @property
    def rewards(self) -> Chunks:
        """The rewards of the samples, in the order of the store."""
        return self.reader.reward_chunks(self.reward)

    @property
    def all_rewards(self) -> Chunks:
        """The rewards of D_g and D together."""
        return Chunks(lambda: itertools.chain(self.rewards, [self.dataset_rewards]))

    def usable_rewards(self, drop_truncated: bool) -> Chunks:
        """The rewards of the samples, NaN where a truncated sample is left out."""
        return Chunks(
            lambda: (self._usable(batch, drop_truncated)[0] for batch in self.reader.batches(("truncated",)))
        )

    def survivors(self, tau: float, drop_truncated: bool) -> Survivors:
        """The samples with a reward above `tau`.

        Args:
          tau: absolute threshold.
          drop_truncated: truncated samples do not survive.

        Raises:
          ConfigError: tau is NaN.
        """
        passes, left_out = StreamedFilter(tau), 0
        ids, tokens = [np.zeros(0, np.int64)], [RaggedTokens.from_lists([])]
        for batch in self.reader.batches(("truncated",)):
            rewards, dropped = self._usable(batch, drop_truncated)
            left_out += dropped
            rows = np.flatnonzero(passes(rewards, batch.example_id))
            if rows.size:
                ids.append(batch.example_id[rows])
                tokens.append(batch.more(("tokens",)).tokens.take(rows))
        return Survivors(np.concatenate(ids), concatenated(tokens), passes, left_out)

    def _usable(self, batch: Batch, drop_truncated: bool) -> tuple[np.ndarray, int]:
        """The rewards of a batch, and how many of them were made NaN."""
        left_out = batch.samples().truncated & drop_truncated
        return np.where(left_out, np.nan, batch.rewards[self.reward]), int(left_out.sum())


def dataset_rewards(workspace: Workspace) -> np.ndarray:
    """The rewards of D, float64 [m], in the order of the train split."""
    workspace.require(workspace.dataset_rewards_folder, "annotate")
    return np.load(workspace.dataset_rewards_folder / DATASET_REWARDS_NAME, allow_pickle=False)


def open_grow_set(workspace: Workspace, number: int) -> GrowSet:
    """The samples of a Grow step with their rewards; no more than the seals is read here."""
    workspace.require(workspace.grow_rewards_folder(number), "annotate")
    kind = workspace.experiment.reward.kind
    reader = CandidateReader(workspace.grow_folder(number), [kind])
    return GrowSet(reader, kind, dataset_rewards(workspace))


def concatenated(parts: Sequence[RaggedTokens]) -> RaggedTokens:
    """The sequences of all parts, in order."""
    lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
    return RaggedTokens(np.concatenate([part.values for part in parts]), np.cumsum(lengths))
