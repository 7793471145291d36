from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.generation.contract import transformer_decoder, transformer_prefixes
from rest_jax.generation.prefixes import Queue, sample
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.generation.scorer import score_logits, score_tokens
from rest_jax.generation.search import BeamConfig, beam_search
from rest_jax.network.transformer import Transformer
from rest_jax.types import PAD_ID
from tests.generation.small import SMALL, padded, random_sources, small_params
from tests.generation.tabular import keys_for, log_softmax

ALLOWED = 21
SOURCES = padded(random_sources(4, 7, seed=3), 8)
score = functools.partial(jax.jit, static_argnames=("sampling", "allowed"))(
    lambda params, sources, targets, sampling, allowed: score_tokens(
        SMALL, params, sources, targets, sampling, allowed
    )
)


def score_all(tokens_SxNxT, sampling=None):
    num_sources, num_rows, length = tokens_SxNxT.shape
    flat = score(
        small_params(),
        np.repeat(SOURCES, num_rows, axis=0),
        np.asarray(tokens_SxNxT).reshape(-1, length),
        sampling,
        ALLOWED,
    )
    return np.asarray(flat).reshape(num_sources, num_rows, length)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(temperature=0.8, max_length=9),
        SamplingConfig(temperature=0.9, top_k=12, top_p=0.8, max_length=9),
    ],
)
def test_sampler_and_scorer_are_twins(sampling):
    draw = jax.jit(
        lambda params, keys_SxN: sample(
            transformer_prefixes(SMALL),
            params,
            Queue(SOURCES, keys_SxN),
            sampling,
            allowed_vocab_size=ALLOWED,
        )
    )
    decoded, _ = draw(small_params(), keys_for([1, 2, 3, 4], range(12)))
    tokens = np.asarray(decoded.tokens_SxNxT)
    assert len(np.unique(tokens.reshape(-1, 9), axis=0)) > 10, "the samples are hardly different"
    np.testing.assert_allclose(decoded.log_probs_SxNxT, score_all(tokens), atol=1e-4)
    np.testing.assert_allclose(decoded.tempered_log_probs_SxNxT, score_all(tokens, sampling), atol=1e-4)
    assert np.all(np.asarray(decoded.log_probs_SxNxT)[tokens == PAD_ID] == 0)
    assert np.all(np.asarray(decoded.log_probs_SxNxT)[tokens != PAD_ID] < 0)


def test_beam_search_stores_what_teacher_forcing_gives():
    fns = transformer_decoder(SMALL)
    config = BeamConfig(beam_size=4, length_penalty=0.6, max_length=9)
    beams = jax.jit(lambda p: beam_search(fns, p, SOURCES, config, allowed_vocab_size=ALLOWED))(
        small_params()
    )
    np.testing.assert_allclose(beams.log_probs_SxNxT, score_all(beams.tokens_SxNxT), atol=1e-4)
    lengths = (np.asarray(beams.tokens_SxNxT) != PAD_ID).sum(-1)
    expected = score_all(beams.tokens_SxNxT).sum(-1) / ((5 + lengths) / 6) ** 0.6
    np.testing.assert_allclose(beams.scores_SxN, expected, atol=1e-4)


def test_cached_decoding_equals_uncached():
    """Steps of the decoder over one fixed target, against one pass of teacher forcing: the whole logits."""
    fns = transformer_decoder(SMALL)
    targets = np.random.default_rng(5).integers(2, 24, size=(4, 3, 6)).astype(np.int32)
    inputs = np.pad(targets, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]

    @jax.jit
    def cached(params):
        state = fns.start(params, SOURCES, 3, 6)
        logits = []
        for t in range(6):
            step, state = fns.step(params, inputs[:, :, t], jnp.int32(t), state)
            logits.append(step)
        return jnp.stack(logits, axis=2)

    whole = jax.jit(
        lambda p: Transformer(SMALL).apply({"params": p}, SOURCES.repeat(3, 0), inputs.reshape(12, 6))
    )
    np.testing.assert_allclose(
        cached(small_params()).reshape(12, 6, 24), whole(small_params()), atol=2e-5, rtol=1e-5
    )


def test_tokens_outside_the_truncated_support_score_minus_infinity():
    logits = np.log(np.array([[0.3, 0.05, 0.4, 0.2, 0.05]], np.float32))[None].repeat(5, 1)  # [1, 5, 5]
    targets = np.array([[0, 1, 2, 3, 4]], np.int32)
    by_k = np.asarray(score_logits(logits, targets, SamplingConfig(temperature=1.0, top_k=2)))[0]
    np.testing.assert_allclose(by_k, [0, -np.inf, np.log(2 / 3), np.log(1 / 3), -np.inf], atol=1e-6)
    by_size = np.asarray(score_logits(logits, targets, SamplingConfig(temperature=1.0), 4))[0]
    np.testing.assert_allclose(
        by_size[1:], [np.log(1 / 13), np.log(8 / 13), np.log(4 / 13), -np.inf], atol=1e-6
    )
    raw = np.asarray(score_logits(logits, targets))[0]
    np.testing.assert_allclose(raw, [0, *log_softmax(logits[0, 0])[1:]], atol=1e-6)
