"""The learned reward: a reference-free reward model behind the `Reward` protocol.

Floor 4. Every call has one of three fixed shapes. A pair's shape depends on that pair alone, each device
scores the same number of pairs at a time, and dummies fill the last call of a shape: so a reward depends
neither on padding nor on what else is scored, and each shape compiles once in a process.

The rule for empty output stands before the model: filters that liked the empty string are documented
accidents of best-of-N training, and no reward learned from translations has a say on it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np
from jax.sharding import Mesh

from rest_jax import errors
from rest_jax.data.batches import pad_to, reward_decoder_inputs
from rest_jax.network.config import T5Config
from rest_jax.network.heads import RewardModel
from rest_jax.network.init import abstract_reward_params
from rest_jax.network.mesh import (
    DATA_AXIS,
    MeshConfig,
    batch_sharding,
    make_mesh,
    param_shardings,
    replicated,
    use_mesh,
)
from rest_jax.rewards.protocol import RewardSpec, check_texts
from rest_jax.types import EOS_ID, PAD_ID, Params, RaggedTokens

_LOG = logging.getLogger(__name__)
# Shorter shapes, as shares of the longest: most sentences need a fraction of the limit.
_SHAPES = (0.25, 0.5, 1.0)


class TextEncoder(Protocol):
    """What the reward reads of a vocabulary."""

    digest: str

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without EOS."""


@dataclasses.dataclass(frozen=True, eq=False)
class LearnedReward:
    """R(x, y) = sigmoid of a `RewardModel`'s score logit (arXiv:2308.08998, section 4): in [0, 1].

    Attributes:
      config: the network.
      params: its parameters with the score head, unboxed; on the host or on devices.
      vocabulary: what turns text into ids; the one it was trained with.
      max_source_length: tokens of a source, EOS included; longer ones are cut, and counted in the log.
      max_hypothesis_length: tokens of a hypothesis, EOS included; longer ones are cut and counted likewise.
        The decoder's rows are one wider, for the start symbol.
      batch_size: pairs that one device scores at a time.
      mesh: pairs are divided over its "data" axis, parameters over both; None is the first device alone.
      version: digest of the checkpoint; part of the signature.
      empty_scores_zero: a hypothesis without tokens gets 0.0 by rule and is not shown to the model.

    Raises:
      ConfigError: a length or the batch size is too small.
    """

    config: T5Config
    params: Params
    vocabulary: TextEncoder
    max_source_length: int = 128
    max_hypothesis_length: int = 128
    batch_size: int = 64
    mesh: Mesh | None = None
    version: str = ""
    empty_scores_zero: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_source_length", 2), ("max_hypothesis_length", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise errors.ConfigError(
                    f"{name} is {getattr(self, name)}",
                    where="LearnedReward",
                    remedy=f"Give {least} or more",
                )
        mesh = self.mesh or make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
        object.__setattr__(self, "mesh", mesh)
        object.__setattr__(self, "params", jax.device_put(self.params, _param_shardings(self.config, mesh)))

    @property
    def spec(self) -> RewardSpec:
        """Range [0, 1], reference-free."""
        return RewardSpec(name="learned", version=self.version)

    def signature(self) -> str:
        """What the scores depend on beside the texts."""
        return (
            f"learned|version:{self.version or 'none'}|vocabulary:{self.vocabulary.digest[:12]}"
            f"|lengths:{self.max_source_length},{self.max_hypothesis_length}"
            f"|dtype:{self.config.dtype}|empty:{'0' if self.empty_scores_zero else 'model'}"
        )

    def score(
        self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str] | None = None
    ) -> np.ndarray:
        """Rewards of texts, float64 [n] in [0, 1]; references are not read.

        Raises:
          DataError: lists of different lengths.
          NonFiniteError: the model gives NaN.
        """
        check_texts(self.spec, sources, hypotheses, references)
        return self.score_tokens(
            RaggedTokens.from_lists(self.vocabulary.encode_batch(sources)),
            RaggedTokens.from_lists(self.vocabulary.encode_batch(hypotheses)),
        )

    def score_tokens(self, sources: RaggedTokens, hypotheses: RaggedTokens) -> np.ndarray:
        """Rewards of tokens, float64 [n] in [0, 1]; each sequence with or without its EOS.

        A sampled hypothesis may be cut into other pieces than its text would be: such ids are not what
        `score` sees, and get another reward.

        Raises:
          DataError: not as many hypotheses as sources.
          NonFiniteError: the model gives NaN.
        """
        check_texts(self.spec, sources, hypotheses, None)
        source_rows, cut_sources = _ended(sources, self.max_source_length)
        hypothesis_rows, cut_hypotheses = _ended(hypotheses, self.max_hypothesis_length)
        if cut_sources or cut_hypotheses:
            _LOG.info(
                "reward: %d sources longer than %d tokens and %d hypotheses longer than %d were cut",
                cut_sources,
                self.max_source_length,
                cut_hypotheses,
                self.max_hypothesis_length,
            )
        scores = np.zeros(len(hypotheses))
        judged = np.arange(len(hypotheses))
        if self.empty_scores_zero:
            judged = np.flatnonzero(hypothesis_rows.lengths > 1)
        for rows, rewards in self._run(source_rows, hypothesis_rows, judged):
            scores[rows] = rewards
        if not np.isfinite(scores).all():
            raise errors.NonFiniteError(
                f"the reward model gives NaN for {int((~np.isfinite(scores)).sum())} of {len(scores)} pairs",
                where=f"reward {self.spec.name!r}",
                remedy="Its parameters are damaged: use an earlier checkpoint",
            )
        return scores

    def _run(
        self, sources: RaggedTokens, hypotheses: RaggedTokens, judged: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, their rewards), one call's results being fetched while the next computes."""
        assert self.mesh is not None
        program = _score_program(self.config, self.mesh)
        split = batch_sharding(self.mesh)
        waiting: tuple[np.ndarray, jax.Array] | None = None
        with use_mesh(self.mesh):
            for rows, batch in self._batches(sources, hypotheses, judged):
                inputs = [
                    jax.make_array_from_callback(x.shape, split, functools.partial(np.ndarray.__getitem__, x))
                    for x in batch
                ]
                result = rows, program(self.params, *inputs)
                if waiting is not None:
                    yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]
                waiting = result
            if waiting is not None:
                yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]

    def _batches(
        self, sources: RaggedTokens, hypotheses: RaggedTokens, judged: np.ndarray
    ) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
        """(rows, (encoder input [B, L], decoder input [B, T])) with dummies after the rows."""
        assert self.mesh is not None
        size = self.batch_size * self.mesh.shape[DATA_AXIS]
        source_lengths = [math.ceil(share * self.max_source_length) for share in _SHAPES]
        hypothesis_lengths = [math.ceil(share * self.max_hypothesis_length) for share in _SHAPES]
        # The first shape with room for both sides.
        shape_of = np.maximum(
            np.searchsorted(source_lengths, sources.lengths[judged]),
            np.searchsorted(hypothesis_lengths, hypotheses.lengths[judged]),
        )
        for shape in range(len(_SHAPES)):
            of_shape = judged[shape_of == shape]
            for start in range(0, len(of_shape), size):
                rows = of_shape[start : start + size]
                encoder = np.full((size, source_lengths[shape]), PAD_ID, np.int32)
                decoder = np.full((size, hypothesis_lengths[shape] + 1), PAD_ID, np.int32)
                encoder[:, 0] = EOS_ID
                encoder[: len(rows)] = pad_to(sources.take(rows), source_lengths[shape])
                decoder[: len(rows)] = reward_decoder_inputs(hypotheses.take(rows), decoder.shape[1])
                yield rows, (encoder, decoder)


@functools.lru_cache(maxsize=16)
def _score_program(config: T5Config, mesh: Mesh) -> Any:
    """The jitted reward, shared by all rewards of a configuration: parameters are an argument."""

    def run(params: Params, encoder_BxL: jax.Array, decoder_BxT: jax.Array) -> jax.Array:
        logits_B = RewardModel(config).apply({"params": params}, encoder_BxL, decoder_BxT)
        return jax.nn.sigmoid(cast(jax.Array, logits_B))

    return jax.jit(run, out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=16)
def _param_shardings(config: T5Config, mesh: Mesh) -> Any:
    return param_shardings(mesh, abstract_reward_params(config))


def _ended(rows: RaggedTokens, limit: int) -> tuple[RaggedTokens, int]:
    """Each row up to its first EOS, cut to limit - 1 tokens, then EOS; and how many had to be cut."""
    is_end = rows.values == EOS_ID
    position = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
    ends = rows.lengths.copy()
    np.minimum.at(ends, np.repeat(np.arange(len(rows)), rows.lengths)[is_end], position[is_end])
    kept = np.minimum(ends, limit - 1)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept + 1)])
    values = np.full(offsets[-1], EOS_ID, np.int32)
    is_text = np.ones(offsets[-1], bool)
    is_text[offsets[1:] - 1] = False
    values[is_text] = rows.values[position < np.repeat(kept, rows.lengths)]
    return RaggedTokens(values, offsets), int((ends > limit - 1).sum())
