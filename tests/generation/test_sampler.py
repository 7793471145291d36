from __future__ import annotations

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rest_jax.errors import ConfigError
from rest_jax.generation.contract import PrefixFns
from rest_jax.generation.prefixes import Queue, Tiling, sample
from rest_jax.generation.sampler import SamplingConfig, invert_cdf, shape_logits
from rest_jax.types import EOS_ID, PAD_ID
from tests.generation.tabular import (
    all_sequences,
    keys_for,
    log_softmax,
    make_table,
    next_logits,
    source_rows,
    tabular_prefixes,
)

FNS = tabular_prefixes()
TILING = Tiling(rows=64, lanes=3, sources=2)


@functools.partial(jax.jit, static_argnames=("config", "allowed"))
def run(table, sources, keys_SxN, config, allowed=None, active=None):
    return sample(
        FNS, table, Queue(sources, keys_SxN, active), config,
        tiling=TILING, allowed_vocab_size=allowed,
    )[0]  # fmt: skip


def truncated(logits: np.ndarray, config: SamplingConfig, allowed: int | None = None) -> np.ndarray:
    """Log-probabilities by sorting, written from the definition: mask, temperature, top-k, top-p."""
    logits = np.asarray(logits, np.float64) / config.temperature
    logits[PAD_ID] = -np.inf
    if allowed is not None:
        logits[allowed:] = -np.inf
    if config.top_k:
        logits[logits < np.sort(logits)[-min(config.top_k, len(logits))]] = -np.inf
    if config.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        mass = np.cumsum(np.exp(log_softmax(logits))[order])
        kept = order[: int(np.searchsorted(mass, config.top_p)) + 1]
        logits[np.setdiff1d(np.arange(len(logits)), kept)] = -np.inf
    return log_softmax(logits)


# Distribution


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(temperature=1.0, max_length=3),
        SamplingConfig(temperature=0.8, max_length=3),
        SamplingConfig(temperature=1.0, top_k=2, max_length=3),
        SamplingConfig(temperature=0.9, top_p=0.7, max_length=3),
        SamplingConfig(temperature=1.3, top_k=3, top_p=0.8, max_length=3),
    ],
)
def test_whole_sequences_have_the_exact_distribution(config):
    vocab_size, num_samples = 5, 20_000
    table = make_table(1, vocab_size, seed=3, scale=1.0)
    decoded = run(table, source_rows([0]), keys_for([77], range(num_samples)), config)
    tokens = np.asarray(decoded.tokens_SxNxT)[0]
    observed = collections.Counter(tuple(row[row != PAD_ID].tolist()) for row in tokens)

    expected = {}
    for sequence in all_sequences(vocab_size, config.max_length):
        steps = [truncated(next_logits(table, 0, sequence[:t]), config)[x] for t, x in enumerate(sequence)]
        expected[sequence] = num_samples * math.exp(sum(steps))
    assert math.isclose(sum(expected.values()), num_samples, rel_tol=1e-6)
    assert all(expected[sequence] > 0 for sequence in observed), "drew what has probability zero"

    rare = [s for s, n in expected.items() if n < 5]
    groups = [[s] for s in expected if s not in rare] + ([rare] if sum(expected[s] for s in rare) > 1 else [])
    seen = np.array([sum(observed[s] for s in group) for group in groups], float)
    wanted = np.array([sum(expected[s] for s in group) for group in groups])
    assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3


def test_chi_square_notices_a_wrong_temperature():
    """The test above has the power to fail: samples at 0.8 do not pass for samples at 1."""
    table = make_table(1, 5, seed=3, scale=1.0)
    decoded = run(
        table, source_rows([0]), keys_for([77], range(20_000)), SamplingConfig(temperature=0.8, max_length=1)
    )
    counts = np.bincount(np.asarray(decoded.tokens_SxNxT).reshape(-1), minlength=5)[1:]
    wanted = np.exp(truncated(next_logits(table, 0, ()), SamplingConfig(temperature=1.0)))[1:] * 20_000
    assert stats.chisquare(counts, wanted).pvalue < 1e-6


@pytest.mark.parametrize("vocab_size", [3, 128, 129, 1000])
def test_inverse_cdf_is_the_count_of_cumulative_sums_passed(vocab_size):
    rng = np.random.default_rng(vocab_size)
    weights = rng.integers(0, 9, size=(50, vocab_size)).astype(np.float32)  # sums are exact in float32
    weights[:, 1] = 3
    uniforms = (rng.integers(0, 2**12, size=50) / 2**12).astype(np.float32)
    found = np.asarray(jax.jit(invert_cdf)(weights, uniforms))
    sums = np.cumsum(weights.astype(np.float64), axis=-1)
    expected = (sums <= (uniforms.astype(np.float64) * sums[:, -1])[:, None]).sum(-1)
    np.testing.assert_array_equal(found, expected)


def test_extreme_uniforms_never_pick_probability_zero():
    rng = np.random.default_rng(0)
    weights = np.exp(rng.normal(scale=6, size=(400, 700))).astype(np.float32)
    weights[rng.random(weights.shape) < 0.9] = 0
    weights[:, 300] = 1e-3
    weights[:, 600:] = 0
    weights[:, :20] = 0
    for uniform in (0.0, 1e-7, 0.5, 1 - 2.0**-24, 1 - 2.0**-23):
        tokens = np.asarray(jax.jit(invert_cdf)(weights, np.full(400, uniform, np.float32)))
        assert np.all(np.take_along_axis(weights, tokens[:, None], 1) > 0)


# Truncation


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
def test_shape_logits_equals_sorting(top_k, top_p):
    logits = np.random.default_rng(1).normal(scale=2, size=(40, 50)).astype(np.float32)
    config = SamplingConfig(temperature=0.7, top_k=top_k, top_p=top_p)
    ours = np.asarray(jax.nn.log_softmax(shape_logits(jnp.asarray(logits), config, 45)))
    for row, expected in zip(ours, (truncated(x, config, 45) for x in logits), strict=True):
        np.testing.assert_array_equal(np.isfinite(row), np.isfinite(expected))
        np.testing.assert_allclose(row[np.isfinite(row)], expected[np.isfinite(row)], atol=1e-5)


def test_ties_with_the_last_kept_token_are_kept():
    logits = jnp.array([-50.0, 2.0, 1.0, 1.0, 1.0, 0.0])
    by_k = shape_logits(logits, SamplingConfig(temperature=1.0, top_k=2))
    np.testing.assert_array_equal(np.isfinite(by_k), [False, True, True, True, True, False])
    mass_of_two = float(jnp.sum(jax.nn.softmax(logits)[1:3]))
    by_p = shape_logits(logits, SamplingConfig(temperature=1.0, top_p=mass_of_two - 0.01))
    np.testing.assert_array_equal(np.isfinite(by_p), [False, True, True, True, True, False])


def test_nothing_is_cut_off_unless_asked():
    logits = jax.random.normal(jax.random.key(0), (4, 30))
    shaped = shape_logits(logits, SamplingConfig(temperature=1.0))
    np.testing.assert_array_equal(shaped[:, 1:], logits[:, 1:])
    assert np.all(np.isneginf(shaped[:, PAD_ID]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_length": 0},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


# Records


def test_log_probs_are_those_of_the_model_and_of_the_draw():
    config = SamplingConfig(temperature=0.8, top_k=4, top_p=0.9, max_length=6)
    table = make_table(3, 8, seed=5)
    decoded = run(table, source_rows([2, 0, 1]), keys_for([5, 6, 7], range(30)), config, 7)
    for s, source in enumerate([2, 0, 1]):
        for n in range(30):
            row = [int(t) for t in decoded.tokens_SxNxT[s, n] if t != PAD_ID]
            assert bool(decoded.finished_SxN[s, n]) == (row[-1] == EOS_ID)
            assert EOS_ID not in row[:-1] and 7 not in row
            assert len(row) == 6 or row[-1] == EOS_ID
            for t in range(6):
                raw = tempered = 0.0
                if t < len(row):
                    logits = next_logits(table, source, tuple(row[:t]))
                    raw = log_softmax(logits)[row[t]]
                    tempered = truncated(logits, config, 7)[row[t]]
                assert abs(float(decoded.log_probs_SxNxT[s, n, t]) - raw) < 1e-4
                assert abs(float(decoded.tempered_log_probs_SxNxT[s, n, t]) - tempered) < 1e-4
            assert abs(float(decoded.scores_SxN[s, n]) - float(decoded.log_probs_SxNxT[s, n].sum())) < 1e-5


def test_a_sample_depends_on_its_address_only():
    config = SamplingConfig(temperature=1.0, max_length=8)
    table = make_table(4, 9, seed=2)
    many = run(table, source_rows([0, 1, 2, 3]), keys_for([10, 11, 12, 13], range(64)), config)
    few = run(table, source_rows([3, 1]), keys_for([13, 11], range(8)), config)
    lone = run(table, source_rows([1]), keys_for([11], range(7, 8)), config)
    np.testing.assert_array_equal(few.tokens_SxNxT, many.tokens_SxNxT[jnp.array([3, 1]), :8])
    np.testing.assert_array_equal(lone.tokens_SxNxT[0, 0], many.tokens_SxNxT[1, 7])
    other = run(table, source_rows([3, 1]), keys_for([14, 15], range(8)), config)
    assert not np.array_equal(other.tokens_SxNxT[0], few.tokens_SxNxT[0])
    assert not np.array_equal(other.tokens_SxNxT[1], few.tokens_SxNxT[1])


def test_early_exit_changes_nothing():
    """The same rows beside one that never ends, and alone, where the loop stops early."""
    config = SamplingConfig(temperature=1.0, max_length=40)
    table = make_table(2, 6, seed=4)
    table[0, :, EOS_ID] = 3.0
    table[1, :, EOS_ID] = -1e9
    sources, keys_SxN = source_rows([0, 1]), keys_for([1, 2], range(16))
    active = jnp.ones((2, 16), bool)
    together = run(table, sources, keys_SxN, config, None, active)
    alone = run(table, sources, keys_SxN, config, None, active.at[1].set(False))
    assert bool(jnp.all(alone.finished_SxN[0])) and not bool(jnp.any(together.finished_SxN[1]))
    together, alone = (
        dataclasses.replace(d, rows_computed_D=None, slots_computed_D=None) for d in (together, alone)
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:1], y[:1]), together, alone)


def counting_steps(steps: list[int]) -> PrefixFns:
    """The model, telling how many places each of its steps gave to prefixes of a given position."""

    def step(params, rows, pool, sources):
        jax.debug.callback(lambda p: steps.append(int(p[0])), rows.positions_R)
        return FNS.step(params, rows, pool, sources)

    return FNS._replace(step=step)


def test_loop_really_stops_early():
    steps: list[int] = []
    table = make_table(1, 6, seed=4)
    table[0, :, EOS_ID] = 30.0
    config = SamplingConfig(max_length=50)
    sample(
        counting_steps(steps), table, Queue(source_rows([0]), keys_for([1], range(4))), config, tiling=TILING
    )
    jax.effects_barrier()
    assert steps == [0]


def test_rows_that_only_fill_the_batch_come_back_empty():
    config = SamplingConfig(temperature=1.0, max_length=8)
    table = make_table(2, 6, seed=4)
    active = jnp.array([[True, True, False], [False, False, False]])
    keys_SxN = keys_for([1, 2], range(3))
    decoded = run(table, source_rows([0, 1]), keys_SxN, config, None, active)
    plain = run(table, source_rows([0, 1]), keys_SxN, config, None, jnp.ones_like(active))
    assert np.all(decoded.tokens_SxNxT[~active] == PAD_ID) and not np.any(decoded.finished_SxN[~active])
    np.testing.assert_array_equal(decoded.tokens_SxNxT[active], plain.tokens_SxNxT[active])
