"""The records that cross walls, and the letters of the dimensions.

Floor 0.

Dimensions, as they appear in the names of arrays (`logits_BxTxV`):
  B rows of a batch          S sources (in generation)      N samples a source
  L tokens of a source       T tokens of a target           V vocabulary
  E model width              H attention heads              D width of a head       F width of the MLP

Token ids are T5's: padding 0 (also the decoder's start symbol), end of sentence 1, unknown 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2

Params = Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seq2SeqBatch:
    """A batch of (packed) source-target rows, with T5X's feature names.

    Segment ids number the pairs packed into one row from 1; 0 is padding. None means one pair a row.
    """

    encoder_input_tokens: jax.Array | np.ndarray  # int32 [B, L]
    decoder_input_tokens: jax.Array | np.ndarray  # int32 [B, T], targets shifted right within a segment
    decoder_target_tokens: jax.Array | np.ndarray  # int32 [B, T]
    decoder_loss_weights: jax.Array | np.ndarray  # float32 [B, T]; 0 on padding, 1 up to and with EOS
    encoder_segment_ids: jax.Array | np.ndarray | None = None  # int32 [B, L]
    decoder_segment_ids: jax.Array | np.ndarray | None = None  # int32 [B, T]
    # Further numbers of each target token that a loss asks for (its reward, a value): float32 [B, T] by name.
    token_columns: Mapping[str, jax.Array | np.ndarray] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardBatch:
    """A batch of scored translations for the reward model: one pair a row."""

    encoder_input_tokens: jax.Array | np.ndarray  # int32 [B, L]
    decoder_input_tokens: jax.Array | np.ndarray  # int32 [B, T], start symbol, hypothesis, EOS
    scores: jax.Array | np.ndarray  # float32 [B], in [0, 1]
    row_weights: jax.Array | np.ndarray  # float32 [B]; 0 on rows that only fill the batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """What a loss function returns: sums, so that micro-batches and devices add up exactly.

    Attributes:
      loss: sum of the loss over what it is averaged over (target tokens, rows), float32 [].
      weight: how many there were, float32 [].
      metrics: further (sum, weight) pairs to be averaged the same way.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


# (params, batch, dropout key or None for evaluation) -> LossSums
LossFn = Callable[[Params, Any, jax.Array | None], LossSums]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossContext:
    """What a loss may read beside the parameters that it trains; nothing here gets a gradient.

    Attributes:
      frozen: parameters of networks that never change, by name.
      lagging: earlier values of trained parts, by name.
      progress: the share of the training's steps that lies behind, float32 [] in [0, 1).
    """

    frozen: Mapping[str, Params]
    lagging: Mapping[str, Params]
    progress: jax.Array


# The same for a loss with further networks or a schedule of its own.
ContextLossFn = Callable[[Params, Any, jax.Array | None, LossContext], LossSums]


@dataclasses.dataclass(frozen=True)
class RaggedTokens:
    """Many token sequences of different lengths in two flat arrays.

    Attributes:
      values: int32 [total tokens].
      offsets: int64 [n + 1]; sequence i is values[offsets[i] : offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lists(cls, sequences: list[list[int]] | list[np.ndarray]) -> RaggedTokens:
        """Builds the flat arrays from n sequences."""
        lengths = np.fromiter((len(s) for s in sequences), dtype=np.int64, count=len(sequences))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        values = np.concatenate([np.asarray(s, np.int32) for s in sequences] or [np.zeros(0, np.int32)])
        return cls(values.astype(np.int32), offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each sequence, int64 [n]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: np.ndarray) -> RaggedTokens:
        """The sequences of these rows, in this order."""
        rows = np.asarray(rows, np.int64)
        lengths = self.lengths[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        positions = (
            np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) + np.repeat(self.offsets[rows], lengths)
        )
        return RaggedTokens(self.values[positions], offsets)


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """Token pairs to train on: sources and targets, each ending with EOS, and the ids of their examples."""

    ids: np.ndarray  # int64 [n]
    sources: RaggedTokens
    targets: RaggedTokens
    # Further numbers of each target token, by name: float32 [total target tokens], as `targets.values` lies.
    token_columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> TokenPairs:
        """The pairs of these rows, in this order."""
        columns = {
            name: RaggedTokens(values, self.targets.offsets).take(rows).values
            for name, values in self.token_columns.items()
        }
        return TokenPairs(self.ids[rows], self.sources.take(rows), self.targets.take(rows), columns)

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> TokenPairs:
        """The same pairs with these numbers of each target token, beside those that are there.

        Raises:
          ValueError: a column has not one number a target token.
        """
        for name, values in columns.items():
            if values.shape != self.targets.values.shape:
                raise ValueError(f"column {name}: {values.shape} for {self.targets.values.shape} tokens")
        return dataclasses.replace(self, token_columns={**self.token_columns, **columns})


@dataclasses.dataclass(frozen=True)
class Examples:
    """Parallel text of one split with its tokens."""

    sources: list[str]
    targets: list[str]
    tokens: TokenPairs

    @property
    def ids(self) -> np.ndarray:
        """Example ids, int64 [n]: unique over all splits of a corpus, stable over runs."""
        return self.tokens.ids

    def __len__(self) -> int:
        return len(self.sources)

    def take(self, rows: np.ndarray) -> Examples:
        """The examples of these rows, in this order."""
        return Examples(
            [self.sources[i] for i in rows], [self.targets[i] for i in rows], self.tokens.take(rows)
        )
