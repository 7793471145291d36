"""Translates many sources: token ids in, token ids out, in the order they were given.

Floor 4. The host's side of decoding: sources go to the devices in the fixed shapes of `batching.py`, and what
comes back is put in their order, one call's results while the next computes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax import keys
from rest_jax.errors import DataError, NonFiniteError
from rest_jax.generation.batching import Batch, DecodeBatching, plan_batches
from rest_jax.generation.contract import Decoded, transformer_decoder, transformer_prefixes
from rest_jax.generation.prefixes import Queue, Tiling, pool_places, sample
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.generation.search import BeamConfig, beam_search, greedy
from rest_jax.network.config import T5Config
from rest_jax.network.decoding import PrefixPool, empty_pool
from rest_jax.network.init import abstract_params
from rest_jax.network.mesh import DATA_AXIS, param_shardings, pool_sharding, use_mesh, within_data_axis
from rest_jax.network.transformer import kernels_as_read
from rest_jax.types import PAD_ID, Params, RaggedTokens

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Translations:
    """N translations of each of n sources, on the host: row i * N + j is translation j of source i.

    Attributes:
      num_samples: N.
      tokens: n * N sequences; EOS included where there is one, no padding.
      log_probs: float32 [total tokens], aligned with `tokens.values`: the model's own log-probabilities.
      tempered_log_probs: the same under the distribution that was sampled from; 0 in greedy and beam search.
      finished: bool [n, N]; False where a translation was cut off at the longest length.
      scores: float32 [n, N]; sum of `log_probs`, in beam search divided by the length penalty.
      rows_computed: how many rows of the decoder it took to sample them; 0 in search, which does not count.
      slots_computed: likewise, with the slots of the sampler's tiles that were left empty.
    """

    num_samples: int
    tokens: RaggedTokens
    log_probs: np.ndarray
    tempered_log_probs: np.ndarray
    finished: np.ndarray
    scores: np.ndarray
    rows_computed: int = 0
    slots_computed: int = 0


@functools.lru_cache(maxsize=128)
def _sample_program(
    config: T5Config,
    sampling: SamplingConfig,
    num_samples: int,
    tiling: Tiling,
    allowed_vocab_size: int | None,
    mesh: Mesh,
) -> Any:
    fns = transformer_prefixes(config)

    def one_device(
        params: Params,
        sources_QxL: jax.Array,
        active_Q: jax.Array,
        ids_Q: tuple[jax.Array, jax.Array],
        key: jax.Array,
        span: tuple[jax.Array, jax.Array],
        pool: PrefixPool,
    ) -> tuple[Decoded, PrefixPool]:
        first, end = span
        indices_N = first + jnp.arange(num_samples, dtype=jnp.uint32)
        with within_data_axis():
            return sample(
                fns,
                params,
                Queue(
                    sources_QxL,
                    keys.sample_keys(key, *ids_Q, indices_N),
                    active_Q[:, None] & (indices_N < end)[None, :],
                ),
                sampling,
                tiling=tiling,
                allowed_vocab_size=allowed_vocab_size,
                pool=pool,
            )

    # Each device works off a queue of its own and takes as many steps as that needs: the loop holds nothing
    # that devices along "data" would have to wait for. What they share along "model" is left to the compiler.
    over_data, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=(whole, over_data, over_data, over_data, whole, whole, over_data),
            out_specs=(over_data, over_data),
            axis_names={DATA_AXIS},
            check_vma=False,
        ),
        out_shardings=(NamedSharding(mesh, over_data), pool_sharding(mesh)),
        donate_argnames="pool",
    )


@functools.lru_cache(maxsize=128)
def _pool_program(config: T5Config, places_of_device: int, mesh: Mesh) -> Any:
    places = places_of_device * mesh.shape[DATA_AXIS]
    return jax.jit(functools.partial(empty_pool, config, places), out_shardings=pool_sharding(mesh))


@functools.lru_cache(maxsize=128)
def _greedy_program(config: T5Config, max_length: int, allowed_vocab_size: int | None, mesh: Mesh) -> Any:
    fns = transformer_decoder(config)

    def run(params: Params, sources_SxL: jax.Array, active_S: jax.Array) -> Decoded:
        return greedy(
            fns, params, sources_SxL, max_length, allowed_vocab_size=allowed_vocab_size, active_S=active_S
        )

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec(DATA_AXIS)))


@functools.lru_cache(maxsize=128)
def _beam_program(config: T5Config, beam: BeamConfig, allowed_vocab_size: int | None, mesh: Mesh) -> Any:
    fns = transformer_decoder(config)

    def run(params: Params, sources_SxL: jax.Array, active_S: jax.Array) -> Decoded:
        return beam_search(
            fns, params, sources_SxL, beam, allowed_vocab_size=allowed_vocab_size, active_S=active_S
        )

    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec(DATA_AXIS)))


class _Collector:
    """Puts the results of calls, which come bucket by bucket, back into the order of the sources."""

    def __init__(self, num_sources: int, num_samples: int):
        self.num_samples = num_samples
        self.finished = np.zeros((num_sources, num_samples), bool)
        self.scores = np.zeros((num_sources, num_samples), np.float32)
        self._rows_computed = self._slots_computed = 0
        self._lengths = np.zeros((num_sources, num_samples), np.int64)
        self._places: list[np.ndarray] = []
        self._flat: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, rows: np.ndarray, first_sample: int, decoded: Decoded) -> None:
        """Takes in samples first_sample, first_sample + 1 … of these rows; drops dummies."""
        number = min(decoded.tokens_SxNxT.shape[1], self.num_samples - first_sample)
        if decoded.rows_computed_D is not None and decoded.slots_computed_D is not None:
            self._rows_computed += int(np.sum(decoded.rows_computed_D))
            self._slots_computed += int(np.sum(decoded.slots_computed_D))
        decoded = dataclasses.replace(decoded, rows_computed_D=None, slots_computed_D=None)
        kept = jax.tree.map(lambda x: np.asarray(x)[: len(rows), :number], decoded)
        here = (rows, slice(first_sample, first_sample + number))
        used = kept.tokens_SxNxT != PAD_ID
        if not np.all(np.isfinite(kept.log_probs_SxNxT)):
            raise NonFiniteError(
                "the policy gives log-probabilities that are not finite",
                where="decoding",
                remedy="Its parameters are damaged: decode with an earlier checkpoint",
            )
        self.finished[here] = kept.finished_SxN
        self.scores[here] = kept.scores_SxN
        self._lengths[here] = used.sum(-1)
        samples = np.arange(first_sample, first_sample + number)
        self._places.append((rows[:, None] * self.num_samples + samples).reshape(-1))
        self._flat.append(
            (kept.tokens_SxNxT[used], kept.log_probs_SxNxT[used], kept.tempered_log_probs_SxNxT[used])
        )

    def result(self) -> Translations:
        """All rows in order."""
        lengths = self._lengths.reshape(-1)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = np.concatenate([*self._places, np.zeros(0, np.int64)])
        arrived = lengths[places]
        # Where each token that came in goes: its row's offset plus its position within the row.
        starts = np.cumsum(arrived) - arrived
        target = np.repeat(offsets[:-1][places] - starts, arrived) + np.arange(arrived.sum())
        columns = []
        for index, dtype in enumerate((np.int32, np.float32, np.float32)):
            column = np.zeros(offsets[-1], dtype)
            column[target] = np.concatenate([*(flat[index] for flat in self._flat), np.zeros(0, dtype)])
            columns.append(column)
        tokens = RaggedTokens(columns[0], offsets)
        return Translations(
            self.num_samples,
            tokens,
            columns[1],
            columns[2],
            self.finished,
            self.scores,
            self._rows_computed,
            self._slots_computed,
        )


class Translator:
    """Decodes with one policy on one mesh. Programs are shared by all translators of the same configuration.

    Args:
      config: the network.
      params: its parameters, unboxed; on the host or on devices.
      mesh: sources are divided over its "data" axis, parameters over both.
      batching: the fixed shapes.
      allowed_vocab_size: ids from here on are never decoded, where the embedding table is larger than the
        tokenizer's vocabulary; None allows all but padding.
    """

    def __init__(
        self,
        config: T5Config,
        params: Params,
        mesh: Mesh,
        batching: DecodeBatching | None = None,
        allowed_vocab_size: int | None = None,
    ):
        self.config, self.mesh = config, mesh
        self.batching = batching or DecodeBatching()
        self.allowed_vocab_size = allowed_vocab_size
        # The sampler's pool with its places on a device, kept between calls: filling it anew takes seconds.
        self._pool: tuple[int, PrefixPool] | None = None
        self.update_params(params)

    def update_params(self, params: Params) -> None:
        """Goes on with other parameters of the same network; nothing is compiled anew.

        Where they already lie on the mesh they are not copied, so a caller that donates them to a training
        step gives this translator new ones before it decodes again. Kernels that are not read in float32 are
        converted here, once for all calls.
        """
        self._pool = None
        params = jax.device_put(params, _param_shardings(self.config, self.mesh))
        self._params = kernels_as_read(self.config, params)

    def sample(
        self,
        sources: RaggedTokens,
        ids: np.ndarray,
        num_samples: int,
        key: jax.Array,
        sampling: SamplingConfig,
        progress: Progress | None = None,
    ) -> Translations:
        """Draws `num_samples` translations of each source.

        Args:
          sources: n token sequences, each ending with EOS.
          ids: int64 [n], the sources' addresses: a sample depends on (key, id, sample index) and its source.
          num_samples: N.
          key: from `keys.stream_key`.
          sampling: temperature, truncation, longest translation.
          progress: called with the number of sources that were finished since the last call.

        Raises:
          DataError: a source is longer than the last bucket, or ids and sources differ in number.
          NonFiniteError: the policy gives NaN.
        """
        if len(ids) != len(sources):
            raise DataError(f"{len(ids)} ids for {len(sources)} sources", where="Translator.sample")
        num_rows = self.batching.samples_at_a_time(num_samples)
        program = _sample_program(
            self.config,
            sampling,
            num_rows,
            self.batching.tiling(num_samples),
            self.allowed_vocab_size,
            self.mesh,
        )
        high, low = keys.split_ids(ids)
        end = np.uint32(num_samples)
        queue = self.batching.queue_sources(num_samples)
        places = pool_places(self.batching.tiling(num_samples), queue, num_rows, sampling.max_length)

        pool = self._take_pool(places)

        def calls() -> Iterator[tuple[np.ndarray, int, Decoded]]:
            nonlocal pool
            for batch in self._batches(sources, queue):
                halves = (self._shard(batch.fill(high)), self._shard(batch.fill(low)))
                inputs = (self._shard(batch.tokens_SxL), self._shard(batch.active), halves, key)
                for first in range(0, num_samples, num_rows):
                    span = (np.uint32(first), end)
                    decoded, pool = program(self._params, *inputs, span, pool)
                    yield batch.rows, first, decoded

        translations = self._collect(calls(), len(sources), num_samples, progress)
        self._pool = places, pool  # not after an error: NaN in it would spread
        return translations

    def greedy(
        self, sources: RaggedTokens, max_length: int, progress: Progress | None = None
    ) -> Translations:
        """The translation of likeliest tokens of each source, N = 1.

        Raises:
          DataError: a source is longer than the last bucket.
          NonFiniteError: the policy gives NaN.
        """
        program = _greedy_program(self.config, max_length, self.allowed_vocab_size, self.mesh)
        return self._collect(self._search(program, sources), len(sources), 1, progress)

    def beam(self, sources: RaggedTokens, beam: BeamConfig, progress: Progress | None = None) -> Translations:
        """The `beam_size` best translations of each source, best first.

        Raises:
          DataError: a source is longer than the last bucket.
          NonFiniteError: the policy gives NaN.
        """
        program = _beam_program(self.config, beam, self.allowed_vocab_size, self.mesh)
        return self._collect(self._search(program, sources), len(sources), beam.beam_size, progress)

    def _take_pool(self, places: int) -> PrefixPool:
        """The pool of the last call if it has as many places, else a new one; nothing else keeps it."""
        kept, self._pool = self._pool, None
        if kept is not None and kept[0] == places:
            return kept[1]
        del kept
        return _pool_program(self.config, places, self.mesh)()

    def _search(self, program: Any, sources: RaggedTokens) -> Iterator[tuple[np.ndarray, int, Decoded]]:
        self._pool = None  # search needs memory of its own
        for batch in self._batches(sources, self.batching.source_batch):
            decoded = program(self._params, self._shard(batch.tokens_SxL), self._shard(batch.active))
            yield batch.rows, 0, decoded

    def _batches(self, sources: RaggedTokens, of_device: int) -> Iterator[Batch]:
        num_sources = of_device * self.mesh.shape[DATA_AXIS]
        return plan_batches(sources, self.batching.source_lengths, num_sources)

    def _shard(self, values: np.ndarray) -> jax.Array:
        """Divides the leading dimension over "data"; every process holds all of `values`."""
        sharding = NamedSharding(self.mesh, PartitionSpec(DATA_AXIS))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def _collect(
        self,
        calls: Iterator[tuple[np.ndarray, int, Decoded]],
        num_sources: int,
        num_samples: int,
        progress: Progress | None,
    ) -> Translations:
        """Runs the calls, copying one's results to the host while the next computes."""
        collector = _Collector(num_sources, num_samples)
        waiting: tuple[np.ndarray, int, Decoded] | None = None

        def take_in(rows: np.ndarray, first: int, decoded: Decoded) -> None:
            collector.add(rows, first, _to_host(decoded))
            if progress is not None and first + decoded.tokens_SxNxT.shape[1] >= num_samples:
                progress(len(rows))

        with use_mesh(self.mesh):
            for call in calls:
                jax.tree.map(lambda x: x.copy_to_host_async() if x.is_fully_addressable else None, call[2])
                if waiting is not None:
                    take_in(*waiting)
                waiting = call
            if waiting is not None:
                take_in(*waiting)
        return collector.result()


@functools.lru_cache(maxsize=16)
def _param_shardings(config: T5Config, mesh: Mesh) -> Any:
    return param_shardings(mesh, abstract_params(config))


def _to_host(decoded: Decoded) -> Decoded:
    if decoded.tokens_SxNxT.is_fully_addressable:
        return jax.device_get(decoded)
    return multihost_utils.process_allgather(decoded, tiled=True)
