"""Greedy search and beam search: the decoders that leave nothing to chance.

Floor 4. Beam search keeps K live prefixes and a pool of the K best finished translations of each source,
ranked by log-probability over ((5 + length) / 6)^alpha (Wu et al. 2016, arXiv:1609.08144, eq. 14, without the
coverage term), and stops when no live prefix can still enter any pool.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.errors import ConfigError
from rest_jax.generation.contract import Decoded, DecoderFns, State, mask_unused, pick
from rest_jax.types import EOS_ID, PAD_ID, Params


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """How beam search searches.

    Attributes:
      beam_size: live prefixes, and translations returned, a source; 1 is greedy search.
      length_penalty: alpha; 0 ranks by log-probability alone, more favours longer translations.
      max_length: tokens of a translation at most, EOS included.
    """

    beam_size: int = 4
    length_penalty: float = 0.6
    max_length: int = 128

    def __post_init__(self) -> None:
        for name, least in (("beam_size", 1), ("length_penalty", 0), ("max_length", 1)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ConfigError(f"{name} is {value}, must be {least} or more", where="BeamConfig")


class _GreedyLoop(NamedTuple):
    position: jax.Array
    last_Sx1: jax.Array
    ended_Sx1: jax.Array
    tokens_TxSx1: jax.Array
    log_probs_TxSx1: jax.Array
    state: State


def greedy(
    fns: DecoderFns,
    params: Params,
    source_tokens_SxL: jax.Array,
    max_length: int,
    *,
    allowed_vocab_size: int | None = None,
    active_S: jax.Array | None = None,
) -> Decoded:
    """Takes the likeliest token at each position; the lowest id where several tie.

    Args:
      fns: the model.
      params: its parameters.
      source_tokens_SxL: int32, padded with 0.
      max_length: T, EOS included.
      allowed_vocab_size: ids from here on are never taken; None allows all but padding.
      active_S: sources that are False only fill the batch and come back empty; None is all True.

    Returns:
      `Decoded` with N = 1.
    """

    def step(loop: _GreedyLoop) -> _GreedyLoop:
        logits, state = fns.step(params, loop.last_Sx1, loop.position, loop.state)
        best = jnp.argmax(mask_unused(logits, allowed_vocab_size), axis=-1).astype(jnp.int32)
        log_probs = pick(jax.nn.log_softmax(logits.astype(jnp.float32)), best)
        at, ended = loop.position, loop.ended_Sx1
        tokens = jnp.where(ended, PAD_ID, best)
        return _GreedyLoop(
            position=at + 1,
            last_Sx1=tokens,
            ended_Sx1=ended | (tokens == EOS_ID),
            tokens_TxSx1=loop.tokens_TxSx1.at[at].set(tokens),
            log_probs_TxSx1=loop.log_probs_TxSx1.at[at].set(jnp.where(ended, 0.0, log_probs)),
            state=state,
        )

    num_sources = source_tokens_SxL.shape[0]
    active = jnp.ones(num_sources, bool) if active_S is None else active_S
    first = _GreedyLoop(
        position=jnp.int32(0),
        last_Sx1=jnp.full((num_sources, 1), PAD_ID, jnp.int32),
        ended_Sx1=~active[:, None],
        tokens_TxSx1=jnp.full((max_length, num_sources, 1), PAD_ID, jnp.int32),
        log_probs_TxSx1=jnp.zeros((max_length, num_sources, 1), jnp.float32),
        state=fns.start(params, source_tokens_SxL, 1, max_length),
    )
    last = jax.lax.while_loop(
        lambda loop: (loop.position < max_length) & ~jnp.all(loop.ended_Sx1), step, first
    )
    return Decoded(
        tokens_SxNxT=jnp.moveaxis(last.tokens_TxSx1, 0, -1),
        log_probs_SxNxT=jnp.moveaxis(last.log_probs_TxSx1, 0, -1),
        tempered_log_probs_SxNxT=jnp.zeros((num_sources, 1, max_length), jnp.float32),
        finished_SxN=last.ended_Sx1 & active[:, None],
        scores_SxN=jnp.sum(last.log_probs_TxSx1, axis=0),
    )


def length_penalty(length: jax.Array | int, alpha: float) -> jax.Array:
    """((5 + length) / 6)^alpha, what the log-probability of `length` tokens (EOS included) is divided by."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


class _Hypotheses(NamedTuple):
    """Prefixes or translations of each source; a score of -inf marks an empty place."""

    scores_SxK: jax.Array
    tokens_SxKxT: jax.Array
    log_probs_SxKxT: jax.Array

    def take(self, places_SxK: jax.Array) -> _Hypotheses:
        return _Hypotheses(*(_take_rows(field, places_SxK) for field in self))


def _take_rows(values_SxKx: jax.Array, places_SxM: jax.Array) -> jax.Array:
    indices = places_SxM.reshape(*places_SxM.shape, *[1] * (values_SxKx.ndim - 2))
    return jnp.take_along_axis(values_SxKx, indices, axis=1)


def _best(hypotheses: _Hypotheses, number: int) -> tuple[_Hypotheses, jax.Array]:
    """The `number` best of each source, best first, and their places; of equals the first."""
    _, places = jax.lax.top_k(hypotheses.scores_SxK, number)
    return hypotheses.take(places), places


class _BeamLoop(NamedTuple):
    position: jax.Array
    live: _Hypotheses  # scores are sums of log-probabilities
    finished: _Hypotheses  # scores are divided by the length penalty
    state: State


def _extend(
    live: _Hypotheses, logits_SxKxV: jax.Array, position: jax.Array, allowed_vocab_size: int | None
) -> tuple[_Hypotheses, jax.Array, jax.Array]:
    """The 2K best one-token extensions of the live prefixes, their parents [S, 2K] and tokens [S, 2K].

    Each parent ends in one way only, so at least K of the 2K go on.
    """
    num_sources, beam_size, vocab_size = logits_SxKxV.shape
    log_probs = jax.nn.log_softmax(logits_SxKxV.astype(jnp.float32))
    scores = live.scores_SxK[..., None] + mask_unused(log_probs, allowed_vocab_size)
    best_scores, flat = jax.lax.top_k(scores.reshape(num_sources, -1), 2 * beam_size)
    parents, tokens = flat // vocab_size, (flat % vocab_size).astype(jnp.int32)
    token_log_probs = jnp.take_along_axis(log_probs.reshape(num_sources, -1), flat, axis=1)
    grown = _Hypotheses(
        best_scores,
        _take_rows(live.tokens_SxKxT, parents).at[:, :, position].set(tokens),
        _take_rows(live.log_probs_SxKxT, parents).at[:, :, position].set(token_log_probs),
    )
    return grown, parents, tokens


def beam_search(
    fns: DecoderFns,
    params: Params,
    source_tokens_SxL: jax.Array,
    config: BeamConfig,
    *,
    allowed_vocab_size: int | None = None,
    active_S: jax.Array | None = None,
) -> Decoded:
    """Searches the K best translations of each source.

    Args:
      fns: the model.
      params: its parameters.
      source_tokens_SxL: int32, padded with 0.
      config: beam size K, length penalty, longest translation T.
      allowed_vocab_size: ids from here on are never taken; None allows all but padding.
      active_S: sources that are False only fill the batch and come back empty; None is all True.

    Returns:
      `Decoded` with N = K, best first: finished translations by score, then, where fewer than K finished
      within T tokens, live prefixes cut off at T. A place that no hypothesis filled (a vocabulary smaller
      than the beam) is empty with score -inf.
    """
    if config.beam_size == 1:  # one prefix has nothing to be weighed against: it ends where it likes best
        options: dict[str, Any] = {"allowed_vocab_size": allowed_vocab_size, "active_S": active_S}
        decoded = greedy(fns, params, source_tokens_SxL, config.max_length, **options)
        length = jnp.sum(decoded.tokens_SxNxT != PAD_ID, axis=-1)
        penalised = decoded.scores_SxN / length_penalty(length, config.length_penalty)
        return dataclasses.replace(decoded, scores_SxN=penalised)

    num_sources, beam_size = source_tokens_SxL.shape[0], config.beam_size

    def step(loop: _BeamLoop) -> _BeamLoop:
        last = loop.live.tokens_SxKxT[:, :, jnp.maximum(loop.position - 1, 0)]  # all PAD, the start, at first
        logits, state = fns.step(params, last, loop.position, loop.state)
        grown, parents, tokens = _extend(loop.live, logits, loop.position, allowed_vocab_size)
        ends = tokens == EOS_ID
        penalised = grown.scores_SxK / length_penalty(loop.position + 1, config.length_penalty)
        ending = grown._replace(scores_SxK=jnp.where(ends, penalised, -jnp.inf))
        ongoing = grown._replace(scores_SxK=jnp.where(ends, -jnp.inf, grown.scores_SxK))
        finished, _ = _best(_concatenate(loop.finished, ending), beam_size)
        live, places = _best(ongoing, beam_size)
        return _BeamLoop(loop.position + 1, live, finished, fns.reorder(state, _take_rows(parents, places)))

    def going_on(loop: _BeamLoop) -> jax.Array:
        # Log-probabilities only fall, and the penalty is mildest at the longest: no prefix can do better.
        attainable = loop.live.scores_SxK[:, 0] / length_penalty(config.max_length, config.length_penalty)
        return (loop.position < config.max_length) & jnp.any(attainable > loop.finished.scores_SxK[:, -1])

    start = fns.start(params, source_tokens_SxL, beam_size, config.max_length)
    live, finished = _first_hypotheses(num_sources, config, active_S)
    loop = jax.lax.while_loop(going_on, step, _BeamLoop(jnp.int32(0), live, finished, start))
    return _ranked(loop, config)


def _first_hypotheses(
    num_sources: int, config: BeamConfig, active_S: jax.Array | None
) -> tuple[_Hypotheses, _Hypotheses]:
    """One empty live prefix for each active source, and empty pools."""
    shape = (num_sources, config.beam_size, config.max_length)
    empty = _Hypotheses(
        jnp.full(shape[:2], -jnp.inf, jnp.float32),
        jnp.full(shape, PAD_ID, jnp.int32),
        jnp.zeros(shape, jnp.float32),
    )
    first = jnp.zeros(num_sources, jnp.float32)
    if active_S is not None:
        first = jnp.where(active_S, first, -jnp.inf)
    return empty._replace(scores_SxK=empty.scores_SxK.at[:, 0].set(first)), empty


def _concatenate(left: _Hypotheses, right: _Hypotheses) -> _Hypotheses:
    return _Hypotheses(*(jnp.concatenate(pair, axis=1) for pair in zip(left, right, strict=True)))


def _ranked(loop: _BeamLoop, config: BeamConfig) -> Decoded:
    """Finished translations first; live prefixes fill the places that are left."""
    penalty = length_penalty(config.max_length, config.length_penalty)
    both = _concatenate(loop.finished, loop.live._replace(scores_SxK=loop.live.scores_SxK / penalty))
    is_finished = jnp.isfinite(both.scores_SxK) & (jnp.arange(2 * config.beam_size) < config.beam_size)
    # The pools come sorted, so a stable sort on "finished, live, empty" keeps each in order of score.
    kind = jnp.where(is_finished, 0, jnp.where(jnp.isfinite(both.scores_SxK), 1, 2))
    places = jnp.argsort(kind, axis=1, stable=True)[:, : config.beam_size]
    best = both.take(places)
    filled = jnp.isfinite(best.scores_SxK)[..., None]
    return Decoded(
        tokens_SxNxT=jnp.where(filled, best.tokens_SxKxT, PAD_ID),
        log_probs_SxNxT=jnp.where(filled, best.log_probs_SxKxT, 0.0),
        tempered_log_probs_SxNxT=jnp.zeros_like(best.log_probs_SxKxT),
        finished_SxN=_take_rows(is_finished, places),
        scores_SxN=best.scores_SxK,
    )
