"""Sampling of whole translations, where samples that begin alike are computed once.

Floor 4. Samples of one source that have the same tokens so far have the same next-token distribution: they
are one row of the decoder, and each draws from it with its own uniform number. A row ends when its last
sample has drawn EOS; where its samples draw different tokens, it becomes several.

One call works off a queue of Q sources. K of them at a time have a lane; a source that is done leaves its
lane to the next of the queue. Each step takes R rows through the decoder, whatever their lengths and lanes,
so there is no work for what has ended, and a tile is full as long as the queue lasts. A step sees keys and
values of T positions, the smallest of a few lengths that all of its rows need.

What the rows of a step are is a function of the queue and of what was drawn, never of the machine: so are the
bits that come out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rest_jax import keys
from rest_jax.generation.contract import Decoded, PrefixFns
from rest_jax.generation.sampler import Distributions, SamplingConfig
from rest_jax.network.decoding import PrefixRows
from rest_jax.types import EOS_ID, PAD_ID, Params

SHORTEST_MEMORY = 16  # positions a step looks back to at the least; each longer memory is four times as long
WORTH_A_WIDE_TILE = 0.6  # share of its rows; a narrow tile takes more than a quarter of a wide one's time


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The shapes of the sampler's steps.

    Attributes:
      rows: R, prefixes that go one position further in a step. Where there are far fewer to compute, a step
        takes a narrow tile of a quarter of them.
      lanes: K, sources in work at a time: enough that R rows of about the same length are there to compute.
      sources: E, sources that are encoded at a time.
    """

    rows: int = 256
    lanes: int = 32
    sources: int = 32

    @property
    def widths(self) -> tuple[int, ...]:
        """Sizes of tiles, rising."""
        return (self.rows // 4, self.rows) if self.rows >= 64 else (self.rows,)


def memory_lengths(max_length: int) -> tuple[int, ...]:
    """How many positions a step can look back to: 16, 64 … and what the longest translation needs."""
    lengths = []
    length = SHORTEST_MEMORY
    while length < max_length:
        lengths.append(length)
        length *= 4
    return (*lengths, max_length)


def pool_places(tiling: Tiling, num_sources: int, num_samples: int, max_length: int) -> int:
    """Places of the pool that `sample` works in: one for each token that the sources in work could have."""
    return min(tiling.lanes, num_sources) * num_samples * max_length


class _Lanes(NamedTuple):
    """The sources in work; idle lanes have no sample alive."""

    queue_index_K: jax.Array  # int32: which source of the queue
    sources: Any  # leaves [K, ...]
    used_K: jax.Array  # int32: places of its part of the pool that are taken
    alive_KxN: jax.Array  # bool: the sample has not ended
    leader_KxN: jax.Array  # int32: the first sample of the same prefix, which stands for the row
    positions_KxN: jax.Array  # int32: tokens drawn
    last_KxN: jax.Array  # int32: the last of them, PAD before the first
    ancestors_KxNxT: jax.Array  # int32: places in the pool of the positions computed


class _Output(NamedTuple):
    """What was drawn, flat: sample n of source q at position t stands at (q * N + n) * T + t."""

    tokens: jax.Array
    log_probs: jax.Array
    tempered: jax.Array
    finished_QN: jax.Array


class _Loop(NamedTuple):
    next_source: jax.Array  # int32: first of the queue that has had no lane yet
    encoded: Any  # leaves [E, ...]: the part of the queue in which it is, encoded
    rows_computed: jax.Array
    slots_computed: jax.Array
    lanes: _Lanes
    pool: Any
    output: _Output


class _Tile(NamedTuple):
    """The rows of one step."""

    memory: jax.Array  # index into `memory_lengths`
    num_rows: jax.Array  # rows to compute
    samples_R: jax.Array  # int32: flat index of each row's leader
    places_R: jax.Array  # int32: where its entry goes in the pool; beyond it for rows that only fill the tile
    row_KxN: jax.Array  # int32: the row of each sample
    is_in_KxN: jax.Array  # bool: the sample's row is in this tile
    first_K: jax.Array  # int32: first row of each lane


@dataclasses.dataclass(frozen=True)
class _Problem:
    """One call of the sampler: what does not change in its loop."""

    fns: PrefixFns
    params: Params
    config: SamplingConfig
    tiling: Tiling
    allowed_vocab_size: int | None
    source_tokens_QxL: jax.Array
    keys_QxN: jax.Array
    active_QxN: jax.Array

    @property
    def num_sources(self) -> int:
        return self.keys_QxN.shape[0]

    @property
    def num_samples(self) -> int:
        return self.keys_QxN.shape[1]

    @property
    def num_lanes(self) -> int:
        return min(self.tiling.lanes, self.num_sources)

    @property
    def num_encoded(self) -> int:
        return min(self.tiling.sources, self.num_sources)

    @property
    def memories(self) -> tuple[int, ...]:
        return memory_lengths(self.config.max_length)

    @property
    def places_in_lane(self) -> int:
        """Places of the pool that a lane can need: that of every token, if no two samples begin alike."""
        return self.num_samples * self.config.max_length


class Queue(NamedTuple):
    """What one call of the sampler works off.

    Attributes:
      source_tokens_QxL: int32, padded with 0.
      keys_QxN: one addressed key a sample, from `keys.sample_keys`.
      active_QxN: samples that are False only fill the batch and come back empty; None is all True.
    """

    source_tokens_QxL: jax.Array
    keys_QxN: jax.Array
    active_QxN: jax.Array | None = None


def sample(
    fns: PrefixFns,
    params: Params,
    queue: Queue,
    config: SamplingConfig,
    *,
    tiling: Tiling | None = None,
    allowed_vocab_size: int | None = None,
    pool: Any = None,
) -> tuple[Decoded, Any]:
    """Draws N translations of each source; one program, to be called under jit.

    Args:
      fns: the model.
      params: its parameters.
      queue: the sources, and the samples of each.
      config: temperature, truncation, longest translation T.
      tiling: shapes of the steps; they do not change what is drawn but for rounding.
      allowed_vocab_size: ids from here on are never drawn; None allows all but padding.
      pool: with `pool_places` places, whatever finite numbers stand there; None makes one. A caller that
        donates the pool of the last call saves filling gigabytes with zeros.

    Returns:
      `Decoded`, with `rows_computed_D` of length 1, and the pool.
    """
    keys_QxN = queue.keys_QxN
    active_QxN = jnp.ones(keys_QxN.shape, bool) if queue.active_QxN is None else jnp.asarray(queue.active_QxN)
    tiling = tiling or Tiling()
    # The queue is encoded in parts of E; what fills its last part is never admitted.
    parts = -(-len(keys_QxN) // min(tiling.sources, len(keys_QxN)))
    filled = _lengthened(parts * min(tiling.sources, len(keys_QxN)), jnp.asarray(queue.source_tokens_QxL))
    problem = _Problem(fns, params, config, tiling, allowed_vocab_size, filled, keys_QxN, active_QxN)
    if pool is None:
        pool = fns.empty(pool_places(tiling, problem.num_sources, problem.num_samples, config.max_length))
    # Sources without an active sample fill the end of the queue.
    used = jnp.max(jnp.where(jnp.any(active_QxN, axis=1), jnp.arange(len(active_QxN)) + 1, 0))
    last = jax.lax.while_loop(
        lambda loop: jnp.any(loop.lanes.alive_KxN) | (loop.next_source < used),
        functools.partial(_advance, problem, used),
        _start(problem, pool),
    )
    return _result(problem, last), last.pool


def _start(problem: _Problem, pool: Any) -> _Loop:
    lanes, samples, longest = problem.num_lanes, problem.num_samples, problem.config.max_length
    tokens = problem.num_sources * samples * longest

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    encoded = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(functools.partial(_encode, problem), 0)
    )
    return _Loop(
        next_source=jnp.int32(0),
        encoded=encoded,
        rows_computed=jnp.int32(0),
        slots_computed=jnp.int32(0),
        lanes=_Lanes(
            queue_index_K=zeros(lanes),
            sources=jax.tree.map(lambda leaf: jnp.zeros((lanes, *leaf.shape[1:]), leaf.dtype), encoded),
            used_K=zeros(lanes),
            alive_KxN=jnp.zeros((lanes, samples), bool),
            leader_KxN=zeros(lanes, samples),
            positions_KxN=zeros(lanes, samples),
            last_KxN=zeros(lanes, samples),
            ancestors_KxNxT=zeros(lanes, samples, longest),
        ),
        pool=pool,
        output=_Output(
            tokens=jnp.full(tokens, PAD_ID, jnp.int32),
            log_probs=jnp.zeros(tokens, jnp.float32),
            tempered=jnp.zeros(tokens, jnp.float32),
            finished_QN=jnp.zeros(problem.num_sources * samples, bool),
        ),
    )


def _result(problem: _Problem, last: _Loop) -> Decoded:
    shape = (problem.num_sources, problem.num_samples, problem.config.max_length)
    log_probs = last.output.log_probs.reshape(shape)
    return Decoded(
        tokens_SxNxT=last.output.tokens.reshape(shape),
        log_probs_SxNxT=log_probs,
        tempered_log_probs_SxNxT=last.output.tempered.reshape(shape),
        finished_SxN=last.output.finished_QN.reshape(shape[:2]),
        scores_SxN=jnp.sum(log_probs, axis=-1),
        rows_computed_D=last.rows_computed[None],
        slots_computed_D=last.slots_computed[None],
    )


def _encode(problem: _Problem, first: jax.Array | int) -> Any:
    """The E sources of the queue from `first` on, encoded."""
    tokens_ExL = jax.lax.dynamic_slice_in_dim(problem.source_tokens_QxL, first, problem.num_encoded)
    return problem.fns.encode(problem.params, tokens_ExL)


def _advance(problem: _Problem, used: jax.Array, loop: _Loop) -> _Loop:
    """One step: sources move up into idle lanes, R rows go one position further, their samples draw."""
    loop = jax.lax.while_loop(
        lambda loop: (loop.next_source < used) & ~jnp.all(jnp.any(loop.lanes.alive_KxN, axis=1)),
        functools.partial(_admit, problem),
        loop,
    )
    lanes = loop.lanes
    tile = _choose(problem, lanes)
    uniforms_KxN = keys.position_uniforms(problem.keys_QxN[lanes.queue_index_K], lanes.positions_KxN)

    def compute(length: int, width: int) -> Any:
        def branch() -> Any:
            rows = _rows(problem, lanes, tile, length, width)
            logits_RxV, entries = problem.fns.step(problem.params, rows, loop.pool, lanes.sources)
            distributions = Distributions.of_logits(logits_RxV, problem.config, problem.allowed_vocab_size)
            row_M = jnp.minimum(tile.row_KxN.reshape(-1), width - 1)
            drawn = distributions.draw(row_M, uniforms_KxN.reshape(-1))
            return drawn, jax.tree.map(functools.partial(_lengthened, problem.tiling.rows), entries)

        return branch

    widths = problem.tiling.widths
    size = sum((tile.num_rows > width).astype(jnp.int32) for width in widths[:-1])
    branches = [compute(length, width) for length in problem.memories for width in widths]
    drawn, entries = jax.lax.switch(tile.memory * len(widths) + size, branches)
    shape = tile.row_KxN.shape
    tokens_KxN = drawn.tokens_M.reshape(shape)
    return loop._replace(
        rows_computed=loop.rows_computed + tile.num_rows,
        slots_computed=loop.slots_computed + jnp.asarray(widths)[size],
        lanes=_after(problem, lanes, tile, tokens_KxN),
        pool=jax.tree.map(lambda pool, new: pool.at[tile.places_R].set(new, mode="drop"), loop.pool, entries),
        output=_written(problem, loop.output, lanes, tile, drawn),
    )


def _lengthened(length: int, x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1))


def _admit(problem: _Problem, loop: _Loop) -> _Loop:
    """Gives the next source of the queue the first idle lane."""
    lanes, source = loop.lanes, loop.next_source
    place = source % problem.num_encoded
    encoded = jax.lax.cond(place == 0, lambda: _encode(problem, source), lambda: loop.encoded)
    lane = jnp.argmin(jnp.any(lanes.alive_KxN, axis=1))
    active_N = problem.active_QxN[source]
    moved = jax.tree.map(
        lambda of_lanes, of_queue: of_lanes.at[lane].set(of_queue[place]), lanes.sources, encoded
    )
    lanes = lanes._replace(
        queue_index_K=lanes.queue_index_K.at[lane].set(source),
        sources=moved,
        used_K=lanes.used_K.at[lane].set(0),
        alive_KxN=lanes.alive_KxN.at[lane].set(active_N),
        leader_KxN=lanes.leader_KxN.at[lane].set(jnp.argmax(active_N).astype(jnp.int32)),
        positions_KxN=lanes.positions_KxN.at[lane].set(0),
        last_KxN=lanes.last_KxN.at[lane].set(PAD_ID),
    )
    return loop._replace(next_source=source + 1, encoded=encoded, lanes=lanes)


def _choose(problem: _Problem, lanes: _Lanes) -> _Tile:
    """The next rows to compute: the first R, or a quarter of that, of those that need the same memory."""
    num_lanes, num_samples = lanes.alive_KxN.shape
    is_row_KxN = lanes.alive_KxN & (lanes.leader_KxN == jnp.arange(num_samples))
    needed_KxN = sum(
        ((lanes.positions_KxN > length).astype(jnp.int32) for length in problem.memories[:-1]),
        start=jnp.zeros_like(lanes.positions_KxN),
    )
    waiting = jnp.stack([jnp.sum(is_row_KxN & (needed_KxN == m)) for m in range(len(problem.memories))])
    # Long prefixes go first once they fill a narrow tile: they keep their lanes from the next sources.
    narrow, rows = problem.tiling.widths[0], problem.tiling.rows
    longest = len(problem.memories) - 1 - jnp.argmax((waiting >= narrow)[::-1])
    memory = jnp.where(jnp.any(waiting >= narrow), longest, jnp.argmax(waiting)).astype(jnp.int32)
    width = jnp.where(waiting[memory] > WORTH_A_WIDE_TILE * rows, rows, narrow)
    is_row_KxN &= needed_KxN == memory
    rank_M = jnp.cumsum(is_row_KxN.reshape(-1).astype(jnp.int32)) - 1
    chosen_KxN = is_row_KxN & (rank_M.reshape(is_row_KxN.shape) < width)
    # Rows are numbered in the order of lanes and samples; fillers repeat the first sample and are not kept.
    target_M = jnp.where(chosen_KxN.reshape(-1), rank_M, rows)
    samples_R = (
        jnp.zeros(rows, jnp.int32).at[target_M].set(jnp.arange(len(rank_M), dtype=jnp.int32), mode="drop")
    )
    taken_K = jnp.sum(chosen_KxN, axis=1)
    first_K = jnp.cumsum(taken_K) - taken_K
    lane_R = samples_R // num_samples
    place_R = lane_R * problem.places_in_lane + lanes.used_K[lane_R] + jnp.arange(rows) - first_K[lane_R]
    num_rows = jnp.sum(taken_K)
    return _Tile(
        memory=memory,
        num_rows=num_rows,
        samples_R=samples_R,
        places_R=jnp.where(jnp.arange(rows) < num_rows, place_R, num_lanes * problem.places_in_lane),
        row_KxN=jnp.take_along_axis(rank_M.reshape(is_row_KxN.shape), lanes.leader_KxN, axis=1),
        is_in_KxN=lanes.alive_KxN & jnp.take_along_axis(chosen_KxN, lanes.leader_KxN, axis=1),
        first_K=first_K,
    )


def _rows(problem: _Problem, lanes: _Lanes, tile: _Tile, length: int, width: int) -> PrefixRows:
    """The rows of a tile as the model takes them."""
    samples_R = tile.samples_R[:width]
    positions_R = lanes.positions_KxN.reshape(-1)[samples_R]
    ancestors_MxT = lanes.ancestors_KxNxT.reshape(-1, problem.config.max_length)[:, :length]
    # What is no ancestor names one place for all, so that a step fetches nothing for it.
    is_ancestor_RxT = jnp.arange(length) < positions_R[:, None]
    return PrefixRows(
        tokens_R=lanes.last_KxN.reshape(-1)[samples_R],
        positions_R=positions_R,
        ancestors_RxT=jnp.where(is_ancestor_RxT, ancestors_MxT[samples_R], 0),
        lanes_R=samples_R // problem.num_samples,
    )


def _after(problem: _Problem, lanes: _Lanes, tile: _Tile, tokens_KxN: jax.Array) -> _Lanes:
    """The lanes when the samples of a tile have drawn."""
    is_in, positions = tile.is_in_KxN, lanes.positions_KxN
    rows = tile.places_R[jnp.minimum(tile.row_KxN, len(tile.places_R) - 1)]
    here_KxNxT = is_in[..., None] & (jnp.arange(problem.config.max_length) == positions[..., None])
    alive_KxN = lanes.alive_KxN & ~(
        is_in & ((tokens_KxN == EOS_ID) | (positions + 1 >= problem.config.max_length))
    )
    still_in = is_in & alive_KxN
    first_KxN = _first_of_equals(jnp.where(still_in, lanes.leader_KxN, -1), tokens_KxN)
    return lanes._replace(
        used_K=lanes.used_K + jnp.diff(tile.first_K, append=tile.num_rows),
        alive_KxN=alive_KxN,
        leader_KxN=jnp.where(is_in, first_KxN, lanes.leader_KxN),
        positions_KxN=positions + is_in,
        last_KxN=jnp.where(is_in, tokens_KxN, lanes.last_KxN),
        ancestors_KxNxT=jnp.where(here_KxNxT, rows[..., None], lanes.ancestors_KxNxT),
    )


def _first_of_equals(was_KxN: jax.Array, drew_KxN: jax.Array) -> jax.Array:
    """The first sample of its lane that was led by the same one and drew the same token: int32 [K, N].

    Samples go on together that were together and drew the same token; the first of them stands for all.
    """
    places_KxN = jnp.broadcast_to(jnp.arange(was_KxN.shape[1], dtype=jnp.int32), was_KxN.shape)
    was, drew, sample = jax.lax.sort((was_KxN, drew_KxN, places_KxN), dimension=1, num_keys=2, is_stable=True)
    is_new = (was[:, 1:] != was[:, :-1]) | (drew[:, 1:] != drew[:, :-1])
    is_new = jnp.pad(is_new, ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(is_new, places_KxN, 0), axis=1)
    return jnp.put_along_axis(
        places_KxN, sample, jnp.take_along_axis(sample, start, axis=1), axis=1, inplace=False
    )


def _written(problem: _Problem, output: _Output, lanes: _Lanes, tile: _Tile, drawn: Any) -> _Output:
    """The output with what the samples of a tile drew."""
    sample_KxN = lanes.queue_index_K[:, None] * problem.num_samples + jnp.arange(problem.num_samples)
    is_in = tile.is_in_KxN.reshape(-1)
    sample_M = jnp.where(is_in, sample_KxN.reshape(-1), len(output.finished_QN))
    token_M = sample_M * problem.config.max_length + lanes.positions_KxN.reshape(-1)
    token_M = jnp.where(is_in, token_M, len(output.tokens))

    def write(flat: jax.Array, places_M: jax.Array, values_M: jax.Array) -> jax.Array:
        return flat.at[places_M].set(values_M, mode="drop")

    return _Output(
        tokens=write(output.tokens, token_M, drawn.tokens_M),
        log_probs=write(output.log_probs, token_M, drawn.log_probs_M),
        tempered=write(output.tempered, token_M, drawn.tempered_log_probs_M),
        finished_QN=write(output.finished_QN, sample_M, drawn.tokens_M == EOS_ID),
    )
