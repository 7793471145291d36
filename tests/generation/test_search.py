from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.errors import ConfigError
from rest_jax.generation.search import BeamConfig, beam_search, greedy
from rest_jax.types import EOS_ID, PAD_ID
from tests.generation.tabular import (
    all_sequences,
    log_softmax,
    make_table,
    next_logits,
    source_rows,
    tabular_decoder,
)

FNS = tabular_decoder()


@functools.partial(jax.jit, static_argnames=("config", "allowed"))
def run_beam(table, sources, config, allowed=None, active=None):
    return beam_search(FNS, table, sources, config, allowed_vocab_size=allowed, active_S=active)


@functools.partial(jax.jit, static_argnames=("max_length", "allowed"))
def run_greedy(table, sources, max_length, allowed=None):
    return greedy(FNS, table, sources, max_length, allowed_vocab_size=allowed)


def strip(row) -> tuple[int, ...]:
    return tuple(int(t) for t in row if t != PAD_ID)


def log_prob(table: np.ndarray, source: int, sequence: tuple[int, ...]) -> list[float]:
    return [float(log_softmax(next_logits(table, source, sequence[:t]))[x]) for t, x in enumerate(sequence)]


def enumerate_best(table: np.ndarray, source: int, config: BeamConfig) -> list[tuple[float, tuple[int, ...]]]:
    finished = [s for s in all_sequences(table.shape[-1], config.max_length) if s[-1] == EOS_ID]
    scored = [
        (sum(log_prob(table, source, s)) / ((5 + len(s)) / 6) ** config.length_penalty, s) for s in finished
    ]
    return sorted(scored, reverse=True)


def test_greedy_takes_the_likeliest_token():
    table = make_table(4, 7, seed=8, scale=1.0)
    decoded = run_greedy(table, source_rows([3, 0, 1, 2]), 9, 6)
    for row, source in enumerate([3, 0, 1, 2]):
        sequence: tuple[int, ...] = ()
        while len(sequence) < 9 and EOS_ID not in sequence:
            logits = next_logits(table, source, sequence)
            logits[PAD_ID] = logits[6] = -np.inf
            sequence += (int(logits.argmax()),)
        assert strip(decoded.tokens_SxNxT[row, 0]) == sequence
        assert bool(decoded.finished_SxN[row, 0]) == (sequence[-1] == EOS_ID)
        np.testing.assert_allclose(
            decoded.log_probs_SxNxT[row, 0, : len(sequence)], log_prob(table, source, sequence), atol=1e-4
        )
        assert np.all(decoded.log_probs_SxNxT[row, 0, len(sequence) :] == 0)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_a_wide_beam_finds_what_enumeration_finds(alpha):
    """With room for every prefix nothing is pruned, so the search is exact."""
    table = make_table(3, 5, seed=9, scale=1.5)
    config = BeamConfig(beam_size=64, length_penalty=alpha, max_length=4)
    decoded = run_beam(table, source_rows([0, 1, 2]), config)
    for source in range(3):
        expected = enumerate_best(table, source, config)
        finished = int(decoded.finished_SxN[source].sum())
        assert finished == len(expected) == 40
        for place, (score, sequence) in enumerate(expected):
            assert abs(float(decoded.scores_SxN[source, place]) - score) < 1e-4
            assert strip(decoded.tokens_SxNxT[source, place]) == sequence
            np.testing.assert_allclose(
                decoded.log_probs_SxNxT[source, place, : len(sequence)],
                log_prob(table, source, sequence),
                atol=1e-4,
            )


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_narrow_beam_scores_what_it_returns_correctly_and_beats_greedy(alpha):
    table = make_table(12, 12, seed=10, scale=1.5)
    sources = source_rows(list(range(12)))
    config = BeamConfig(beam_size=4, length_penalty=alpha, max_length=10)
    decoded, first = run_beam(table, sources, config), run_greedy(table, sources, 10)
    not_worse = 0
    for source in range(12):
        rows = [strip(r) for r in decoded.tokens_SxNxT[source]]
        assert len(set(rows)) == 4, "a hypothesis was returned twice"
        number = int(decoded.finished_SxN[source].sum())
        assert np.all(np.diff(decoded.scores_SxN[source, :number]) <= 0)
        for place, row in enumerate(rows):
            assert (row[-1] == EOS_ID) == bool(decoded.finished_SxN[source, place])
            score = sum(log_prob(table, source, row)) / ((5 + len(row)) / 6) ** alpha
            assert abs(float(decoded.scores_SxN[source, place]) - score) < 1e-4
        length = len(strip(first.tokens_SxNxT[source, 0]))
        greedy_score = float(first.scores_SxN[source, 0]) / ((5 + length) / 6) ** alpha
        not_worse += float(decoded.scores_SxN[source, 0]) >= greedy_score - 1e-5
    assert not_worse >= 11


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_beam_of_one_is_greedy(alpha):
    table = make_table(6, 9, seed=11)
    sources = source_rows(list(range(6)))
    beam = run_beam(table, sources, BeamConfig(beam_size=1, length_penalty=alpha, max_length=7))
    first = run_greedy(table, sources, 7)
    np.testing.assert_array_equal(beam.tokens_SxNxT, first.tokens_SxNxT)
    np.testing.assert_array_equal(beam.log_probs_SxNxT, first.log_probs_SxNxT)
    for source in range(6):
        row = strip(beam.tokens_SxNxT[source, 0])
        expected = sum(log_prob(table, source, row)) / ((5 + len(row)) / 6) ** alpha
        assert abs(float(beam.scores_SxN[source, 0]) - expected) < 1e-4


def test_stopping_early_changes_nothing():
    """A source whose pool is settled, beside one that goes on to the last step, and alone."""
    table = make_table(2, 8, seed=12)
    table[0, :, EOS_ID] += 4.0
    table[1, :, EOS_ID] -= 6.0
    config = BeamConfig(beam_size=3, length_penalty=0.6, max_length=20)
    sources = source_rows([0, 1])
    together = run_beam(table, sources, config, None, jnp.array([True, True]))
    alone = run_beam(table, sources, config, None, jnp.array([True, False]))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:1], y[:1]), together, alone)
    assert bool(jnp.all(alone.finished_SxN[0])) and bool(jnp.any(together.tokens_SxNxT[1, :, -1] != PAD_ID))


def test_search_stops_when_no_prefix_can_win():
    positions = []

    def step(params, tokens, position, state):
        jax.debug.callback(lambda p: positions.append(int(p)), position)
        return FNS.step(params, tokens, position, state)

    table = make_table(1, 8, seed=12)
    table[0, :, EOS_ID] = 12.0
    beam_search(FNS._replace(step=step), table, source_rows([0]), BeamConfig(2, 0.6, 50))
    jax.effects_barrier()
    assert 2 <= len(positions) < 15


def test_cut_off_prefixes_come_after_finished_translations():
    table = make_table(1, 6, seed=13)
    table[0, :, EOS_ID] = -20.0
    decoded = run_beam(table, source_rows([0]), BeamConfig(beam_size=3, length_penalty=0.6, max_length=5))
    assert not np.any(np.diff(decoded.finished_SxN[0].astype(int)) > 0)
    for row, finished in zip(decoded.tokens_SxNxT[0], decoded.finished_SxN[0], strict=True):
        assert finished or (len(strip(row)) == 5 and EOS_ID not in strip(row))


def test_masked_ids_are_never_taken_and_dummies_come_back_empty():
    table = make_table(3, 8, seed=14)
    table[:, :, [PAD_ID, 6, 7]] += 10.0
    config = BeamConfig(beam_size=4, length_penalty=0.6, max_length=6)
    decoded = run_beam(table, source_rows([0, 1, 2]), config, 6, jnp.array([True, False, True]))
    tokens = np.asarray(decoded.tokens_SxNxT)
    assert tokens.max() < 6 and np.all(tokens[[0, 2], :, 0] != PAD_ID)
    assert np.all(tokens[1] == PAD_ID) and not np.any(decoded.finished_SxN[1])


def test_more_beams_than_hypotheses():
    table = make_table(1, 3, seed=15)  # EOS and one word: one finished translation a length
    decoded = run_beam(table, source_rows([0]), BeamConfig(beam_size=5, length_penalty=0.0, max_length=2))
    rows = [strip(r) for r in decoded.tokens_SxNxT[0]]
    assert sorted(rows[:3]) == [(1,), (2, 1), (2, 2)] and rows[3:] == [(), ()]
    np.testing.assert_array_equal(np.isneginf(decoded.scores_SxN[0]), [False] * 3 + [True] * 2)


@pytest.mark.parametrize("wrong", [{"beam_size": 0}, {"length_penalty": -0.1}, {"max_length": 0}])
def test_config_refuses(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BeamConfig(**wrong)
