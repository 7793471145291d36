from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.monitoring
import numpy as np
import pytest

from rest_jax import keys
from rest_jax.errors import ConfigError, DataError, NonFiniteError
from rest_jax.generation.batching import DecodeBatching, plan_batches
from rest_jax.generation.contract import transformer_decoder
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.generation.search import BeamConfig, greedy
from rest_jax.generation.translator import Translator
from rest_jax.types import EOS_ID, PAD_ID, RaggedTokens
from tests import tiny
from tests.generation.naive import naive_sample
from tests.generation.small import SMALL, one_device, padded, random_sources, small_params

BATCHING = DecodeBatching(
    source_batch=4, source_lengths=(4, 8), sample_batch=3, row_batch=8, queue_samples=12
)
SAMPLING = SamplingConfig(temperature=1.0, max_length=6)
KEY = keys.stream_key(7, keys.Stream.GROW, 1)
ALLOWED = 22


def make_translator(batching=BATCHING, params=None) -> Translator:
    return Translator(SMALL, params or small_params(), one_device(), batching, ALLOWED)


@pytest.fixture(scope="module")
def sources() -> RaggedTokens:
    return random_sources(11, 8, seed=1)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.arange(11, dtype=np.int64) * 3 + (1 << 40)


@pytest.fixture(scope="module")
def samples(sources, ids):
    return make_translator().sample(sources, ids, 7, KEY, SAMPLING)


def assert_same(left, right) -> None:
    np.testing.assert_array_equal(left.tokens.values, right.tokens.values)
    np.testing.assert_array_equal(left.tokens.offsets, right.tokens.offsets)
    for name in ("log_probs", "tempered_log_probs", "finished", "scores"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def part(whole, source: int, number: int):
    """Tokens and log-probabilities of the first samples of one source."""
    rows = range(source * whole.num_samples, source * whole.num_samples + number)
    spans = [slice(whole.tokens.offsets[r], whole.tokens.offsets[r + 1]) for r in rows]
    return [(whole.tokens.values[s].tolist(), whole.log_probs[s].tolist()) for s in spans]


def test_rows_come_back_in_the_order_of_the_sources(sources, ids, samples):
    """Each source decoded on its own by the sampler itself, without the host's machinery."""
    draw = jax.jit(
        lambda params, tokens, keys_SxN: naive_sample(
            transformer_decoder(SMALL), params, tokens, keys_SxN, SAMPLING, allowed_vocab_size=ALLOWED
        )
    )
    assert samples.finished.shape == samples.scores.shape == (11, 7)
    assert len(samples.log_probs) == len(samples.tempered_log_probs) == len(samples.tokens.values)
    high, low = keys.split_ids(ids)
    for i in range(11):
        keys_SxN = keys.sample_keys(KEY, high[i : i + 1], low[i : i + 1], np.arange(7, dtype=np.uint32))
        alone = draw(small_params(), padded(sources.take([i]), 8), keys_SxN)
        for j in range(7):
            row = i * 7 + j
            length = int((alone.tokens_SxNxT[0, j] != PAD_ID).sum())
            span = slice(samples.tokens.offsets[row], samples.tokens.offsets[row + 1])
            np.testing.assert_array_equal(samples.tokens[row], alone.tokens_SxNxT[0, j, :length])
            np.testing.assert_allclose(
                samples.log_probs[span], alone.log_probs_SxNxT[0, j, :length], atol=1e-5
            )
            np.testing.assert_allclose(
                samples.tempered_log_probs[span], alone.tempered_log_probs_SxNxT[0, j, :length], atol=1e-5
            )
            assert samples.finished[i, j] == bool(alone.finished_SxN[0, j])
            assert abs(samples.scores[i, j] - samples.log_probs[span].sum()) < 1e-5


def test_a_truncated_sample_is_flagged(samples):
    lengths = samples.tokens.lengths.reshape(11, 7)
    last = np.array([samples.tokens[r][-1] for r in range(77)]).reshape(11, 7)
    np.testing.assert_array_equal(samples.finished, last == EOS_ID)
    assert np.any(samples.finished) and not np.all(samples.finished)
    assert np.all(lengths[~samples.finished] == 6) and np.all(lengths >= 1)


def test_the_same_bits_in_any_company_and_order(sources, ids, samples):
    order = np.random.default_rng(0).permutation(11)
    shuffled = make_translator().sample(sources.take(order), ids[order], 7, KEY, SAMPLING)
    few = make_translator().sample(sources.take([5, 2]), ids[[5, 2]], 2, KEY, SAMPLING)
    for place, source in enumerate(order):
        assert part(shuffled, place, 7) == part(samples, source, 7)
    for place, source in enumerate([5, 2]):
        assert part(few, place, 2) == part(samples, source, 2)


def test_a_second_call_takes_over_the_memory_of_the_first(sources, ids, samples):
    translator = make_translator()
    assert_same(translator.sample(sources, ids, 7, KEY, SAMPLING), samples)
    held = translator._pool
    assert held is not None
    assert_same(translator.sample(sources, ids, 7, KEY, SAMPLING), samples)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(held[1]))  # donated, not copied
    longer = dataclasses.replace(SAMPLING, max_length=7)  # needs a pool of its own
    assert_same(translator.sample(sources, ids, 7, KEY, longer), make_translator().sample(
        sources, ids, 7, KEY, longer))  # fmt: skip
    translator.greedy(sources, 6)
    assert translator._pool is None


def test_another_id_key_or_index_gives_another_sample(sources, ids, samples):
    other_key = make_translator().sample(sources, ids, 7, keys.stream_key(8, keys.Stream.GROW, 1), SAMPLING)
    other_ids = make_translator().sample(sources, ids + (1 << 41), 7, KEY, SAMPLING)
    assert not np.array_equal(other_key.tokens.values, samples.tokens.values)
    assert not np.array_equal(other_ids.tokens.values, samples.tokens.values)
    texts = [tuple(samples.tokens[r]) for r in range(7)]
    assert len(set(texts)) > 3


def test_drawing_all_samples_at_once_gives_the_same_tokens(sources, ids, samples):
    long = np.flatnonzero(sources.lengths > 4)
    at_once = make_translator(dataclasses.replace(BATCHING, sample_batch=0))
    together = at_once.sample(sources.take(long), ids[long], 7, KEY, SAMPLING)
    for place, source in enumerate(long):
        for (tokens, log_probs), (expected, their_log_probs) in zip(
            part(together, place, 7), part(samples, source, 7), strict=True
        ):
            assert tokens == expected
            np.testing.assert_allclose(log_probs, their_log_probs, atol=1e-5)


def test_greedy_and_beam_keep_the_order(sources):
    first = make_translator().greedy(sources, 6)
    expected = jax.jit(
        lambda p: greedy(transformer_decoder(SMALL), p, padded(sources, 8), 6, allowed_vocab_size=ALLOWED)
    )(small_params())
    for i in range(11):
        row = np.asarray(expected.tokens_SxNxT)[i, 0]
        np.testing.assert_array_equal(first.tokens[i], row[row != PAD_ID])
    assert np.all(first.tempered_log_probs == 0)

    long = np.flatnonzero(sources.lengths > 4)
    beams = make_translator().beam(sources.take(long), BeamConfig(3, 0.6, 6))
    backwards = make_translator().beam(sources.take(long[::-1]), BeamConfig(3, 0.6, 6))
    assert beams.num_samples == 3 and len(beams.tokens) == 3 * len(long)
    for place in range(len(long)):
        assert part(beams, place, 3) == part(backwards, len(long) - 1 - place, 3)
        finished = beams.scores[place][beams.finished[place]]
        assert np.all(np.diff(finished) <= 0)


def test_each_bucket_compiles_once_for_all_translators_of_a_run(sources, ids):
    sampling = dataclasses.replace(SAMPLING, temperature=0.77)  # no other test compiles this one
    compiled = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    def work(seed: int, number: int) -> None:
        translator = make_translator(params=small_params(seed))
        translator.sample(sources, ids, number, KEY, sampling)
        translator.update_params(small_params(seed + 1))
        translator.sample(sources.take(np.arange(9)), ids[:9], number, KEY, sampling)

    small_params(1), small_params(2), small_params(3)
    make_translator().sample(sources, ids, 1, KEY, SAMPLING)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        work(0, 4)
        first = len(compiled)
        work(1, 9)
        work(2, 1)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first == 2, "one program for each of the two length buckets"
    assert len(compiled) == first


def test_update_params_takes_effect(sources, ids, samples):
    translator = make_translator(params=small_params(1))
    assert not np.array_equal(
        translator.sample(sources, ids, 7, KEY, SAMPLING).tokens.values, samples.tokens.values
    )
    translator.update_params(small_params(0))
    assert_same(translator.sample(sources, ids, 7, KEY, SAMPLING), samples)


def test_progress_counts_every_source_once(sources, ids):
    seen: list[int] = []
    make_translator().sample(sources, ids, 7, KEY, SAMPLING, progress=seen.append)
    assert sum(seen) == 11 and len(seen) >= 3


def test_what_it_took_is_told(samples):
    distinct = {
        (row // 7, *samples.tokens[row][:t]) for row in range(77) for t in range(samples.tokens.lengths[row])
    }
    # Samples are drawn three at a time, and only those of one call share their prefixes.
    assert len(distinct) <= samples.rows_computed <= len(samples.tokens.values)
    assert samples.rows_computed <= samples.slots_computed


def test_no_sources():
    none = RaggedTokens.from_lists([])
    drawn = make_translator().sample(none, np.zeros(0, np.int64), 7, KEY, SAMPLING)
    assert len(drawn.tokens) == 0 and drawn.finished.shape == (0, 7)
    assert len(make_translator().greedy(none, 6).tokens) == 0


def test_plan_pads_with_dummies_and_buckets_by_the_row_alone():
    rows = RaggedTokens.from_lists([[5, 1], [4] * 7 + [1], [1], [6, 6, 6, 1], [7, 7, 7, 7, 1], [8, 1]])
    plan = list(plan_batches(rows, (4, 8), 3))
    assert [b.rows.tolist() for b in plan] == [[0, 2, 3], [5], [1, 4]]
    assert [b.tokens_SxL.shape for b in plan] == [(3, 4), (3, 4), (3, 8)]
    assert plan[1].tokens_SxL.tolist() == [[8, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert plan[2].active.tolist() == [True, True, False]
    for batch in plan:
        for place, row in enumerate(batch.rows):
            np.testing.assert_array_equal(batch.tokens_SxL[place][: len(rows[row])], rows[row])
            assert np.all(batch.tokens_SxL[place][len(rows[row]) :] == PAD_ID)


def test_a_source_longer_than_the_last_bucket_is_refused():
    rows = RaggedTokens.from_lists([[5, 1], [4] * 9 + [1]])
    with pytest.raises(DataError, match="source 1 has 10 tokens.*holds 8"):
        make_translator().greedy(rows, 6)


def test_ids_must_match(sources):
    with pytest.raises(DataError, match="3 ids for 11 sources"):
        make_translator().sample(sources, np.arange(3), 2, KEY, SAMPLING)


def test_nan_stops_the_work(sources, ids):
    params = jax.tree.map(np.array, small_params())
    params["decoder"]["decoder_norm"]["scale"][:] = np.nan
    with pytest.raises(NonFiniteError):
        make_translator(params=params).sample(sources, ids, 2, KEY, SAMPLING)


@pytest.mark.parametrize(
    "wrong",
    [
        {"source_batch": 0},
        {"sample_batch": -1},
        {"row_batch": 0},
        {"queue_samples": 0},
        {"source_lengths": (8, 4)},
        {"source_lengths": ()},
    ],
)
def test_batching_refuses(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DecodeBatching(**wrong)


_ON_TWO_DEVICES = """
import sys
import jax, numpy as np
from rest_jax.network.mesh import MeshConfig, make_mesh
from rest_jax.generation.translator import Translator
from tests.generation.naive import naive_sample
from tests.generation.small import SMALL, random_sources, small_params
from tests.generation.test_translator import ALLOWED, BATCHING, KEY, SAMPLING

assert jax.device_count() == 2
sources, ids = random_sources(11, 8, seed=1), np.arange(11, dtype=np.int64) * 3 + (1 << 40)
long = np.flatnonzero(sources.lengths > 4)
saved = {}
for name, mesh, rows in (("data", MeshConfig(data=2), np.arange(11)), ("model", MeshConfig(model=2), long)):
    translator = Translator(SMALL, small_params(), make_mesh(mesh), BATCHING, ALLOWED)
    drawn = translator.sample(sources.take(rows), ids[rows], 7, KEY, SAMPLING)
    saved |= {name + "_values": drawn.tokens.values, name + "_offsets": drawn.tokens.offsets}
    saved |= {name + "_log_probs": drawn.log_probs, name + "_finished": drawn.finished}
np.savez(sys.argv[1], **saved)
"""


def test_two_devices_give_what_one_gives(sources, ids, samples, tmp_path):
    output = tmp_path / "drawn.npz"
    command = [sys.executable, "-c", _ON_TWO_DEVICES, str(output)]
    environment = tiny.environment(**tiny.on_devices(2, compiled=""))
    subprocess.run(command, check=True, env=environment, cwd=tiny.ROOT, timeout=300)
    found = np.load(output)
    # Divided over "data" each device runs the program of one device: the same bits.
    np.testing.assert_array_equal(found["data_values"], samples.tokens.values)
    np.testing.assert_array_equal(found["data_offsets"], samples.tokens.offsets)
    np.testing.assert_array_equal(found["data_log_probs"], samples.log_probs)
    np.testing.assert_array_equal(found["data_finished"], samples.finished)
    # Divided over "model" sums are taken in another order: the same up to rounding.
    long = np.flatnonzero(sources.lengths > 4)
    expected = make_translator().sample(sources.take(long), ids[long], 7, KEY, SAMPLING)
    np.testing.assert_array_equal(found["model_values"], expected.tokens.values)
    np.testing.assert_allclose(found["model_log_probs"], expected.log_probs, atol=1e-5)
