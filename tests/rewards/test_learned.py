"""The learned reward: what it computes, and what its rewards must not depend on."""

import logging
import subprocess
import sys

import jax
import numpy as np
import pytest

from rest_jax import errors
from rest_jax.network.config import T5Config
from rest_jax.network.heads import RewardModel
from rest_jax.network.init import init_reward_params
from rest_jax.rewards import learned
from rest_jax.rewards.learned import LearnedReward
from rest_jax.rewards.protocol import Reward, checked_scores
from rest_jax.types import EOS_ID, RaggedTokens
from tests import tiny

CONFIG = T5Config(
    vocab_size=40, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1
)


class Letters:
    """A vocabulary of lower-case letters."""

    digest = "0123456789abcdef"

    def encode_batch(self, texts):
        return [[3 + ord(c) - ord("a") for c in text if c.isalpha()] for text in texts]


@pytest.fixture(scope="module")
def params():
    return init_reward_params(CONFIG, jax.random.key(0))


def _reward(params, **fields):
    sizes = {"max_source_length": 16, "max_hypothesis_length": 12, "batch_size": 4}
    return LearnedReward(CONFIG, params, Letters(), **{**sizes, **fields})


def _texts(count, longest, seed):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, size=count)
    return ["".join(map(chr, generator.integers(97, 123, size=length))) for length in lengths]


def _directly(params, source, hypothesis):
    """Sigmoid of the model's logit on a single pair without any padding."""
    encode = Letters().encode_batch
    encoder = np.array([[*encode([source])[0], EOS_ID]], np.int32)
    decoder = np.array([[0, *encode([hypothesis])[0], EOS_ID]], np.int32)
    logit = float(jax.jit(RewardModel(CONFIG).apply)({"params": params}, encoder, decoder)[0])
    return 1.0 / (1.0 + np.exp(-logit))


def test_scores_are_the_models_pair_by_pair(params):
    sources, hypotheses = ["hello", "ab", "thelongestsource"[:15]], ["bonjour", "c", "thelongest"]
    scores = checked_scores(_reward(params), sources, hypotheses)
    expected = [_directly(params, s, h) for s, h in zip(sources, hypotheses, strict=True)]
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    assert scores.dtype == np.float64
    assert np.abs(np.diff(scores)).min() > 1e-3


def test_order_and_company_change_nothing(params):
    sources, hypotheses = _texts(21, 15, 2), _texts(21, 11, 3)
    reward = _reward(params)
    scores = reward.score(sources, hypotheses)
    order = np.random.default_rng(0).permutation(21)
    shuffled = reward.score([sources[i] for i in order], [hypotheses[i] for i in order])
    np.testing.assert_array_equal(shuffled, scores[order])
    alone = [reward.score([s], [h])[0] for s, h in zip(sources[:5], hypotheses[:5], strict=True)]
    np.testing.assert_array_equal(alone, scores[:5])


def test_longer_shapes_and_other_batches_change_nothing_but_rounding(params):
    sources, hypotheses = _texts(9, 15, 4), _texts(9, 11, 5)
    scores = _reward(params).score(sources, hypotheses)
    wide = _reward(params, max_source_length=64, max_hypothesis_length=48, batch_size=3)
    np.testing.assert_allclose(wide.score(sources, hypotheses), scores, atol=2e-6)


def test_tokens_and_text_give_the_same_with_and_without_end_of_sentence(params):
    sources, hypotheses = _texts(6, 10, 6), _texts(6, 9, 7)
    reward, encode = _reward(params), Letters().encode_batch
    scores = reward.score(sources, hypotheses)
    for end in ([], [EOS_ID], [EOS_ID, 0, 0], [EOS_ID, 9, 9]):
        tokens = [RaggedTokens.from_lists([row + end for row in encode(t)]) for t in (sources, hypotheses)]
        np.testing.assert_array_equal(reward.score_tokens(*tokens), scores)


def test_empty_output_scores_zero_by_rule(params):
    reward = _reward(params)
    scores = reward.score(["abc"] * 4, ["", "xyz", "  ", "xyz"])
    np.testing.assert_array_equal(scores[[0, 2]], [0.0, 0.0])
    assert scores[1] == scores[3] > 0
    open_minded = _reward(params, empty_scores_zero=False)
    assert open_minded.score(["abc"], [""])[0] == pytest.approx(_directly(params, "abc", ""), abs=2e-6)
    assert open_minded.signature() != reward.signature()


def test_too_long_texts_are_cut_with_a_count(params, caplog):
    reward = _reward(params)
    long = "abcdefghijklmnopqrst"
    with caplog.at_level(logging.INFO):
        scores = reward.score(["ab", "ab", long], [long, "cd", "cd"])
    assert "1 sources longer than 16 tokens and 1 hypotheses longer than 12 were cut" in caplog.text
    np.testing.assert_array_equal(scores, reward.score(["ab", "ab", long[:15]], [long[:11], "cd", "cd"]))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        reward.score(["a" * 15], ["b" * 11])  # just fits with EOS
    assert not caplog.text


def test_instances_share_a_program_of_few_shapes(params):
    learned._score_program.cache_clear()
    first = _reward(params)
    others = [_reward(jax.tree.map(lambda x, s=s: x * s, params)) for s in (0.5, 2.0)]
    for seed in range(4):
        for reward in (first, *others):
            reward.score(_texts(7 + seed, 15, seed), _texts(7 + seed, 11, seed + 10))
    program = learned._score_program(first.config, first.mesh)
    assert learned._score_program.cache_info().currsize == 1
    assert program._cache_size() == 3


def test_other_parameters_give_other_rewards(params):
    sources, hypotheses = _texts(5, 10, 8), _texts(5, 9, 9)
    other = _reward(jax.tree.map(lambda x: x * 0.5, params))
    assert np.abs(other.score(sources, hypotheses) - _reward(params).score(sources, hypotheses)).min() > 1e-5


def test_damaged_parameters_stop(params):
    broken = {**params, "score_head": jax.tree.map(lambda x: x * np.nan, params["score_head"])}
    with pytest.raises(errors.NonFiniteError, match="NaN for 2 of 3 pairs"):
        _reward(broken).score(["a", "b", "c"], ["d", "", "e"])


def test_nothing_to_score_and_lists_that_do_not_match(params):
    reward = _reward(params)
    assert reward.score([], []).shape == (0,)
    with pytest.raises(errors.DataError, match="learned"):
        reward.score(["a"], [])


def test_it_is_a_reward_and_states_what_it_depends_on(params):
    reward = _reward(params, version="abc123")
    assert isinstance(reward, Reward)
    assert not reward.spec.needs_reference
    assert (reward.spec.minimum, reward.spec.maximum) == (0.0, 1.0)
    assert reward.signature() == (
        "learned|version:abc123|vocabulary:0123456789ab|lengths:16,12|dtype:float32|empty:0"
    )


@pytest.mark.parametrize("field", ["max_source_length", "max_hypothesis_length", "batch_size"])
def test_bad_sizes_name_themselves(params, field):
    with pytest.raises(errors.ConfigError, match=f"{field} is 0"):
        _reward(params, **{field: 0})


_ON_FOUR_DEVICES = """
import jax, numpy as np
from tests.rewards import test_learned as t
from rest_jax.network.mesh import MeshConfig, make_mesh
params = t.init_reward_params(t.CONFIG, jax.random.key(0))
sources, hypotheses = t._texts(11, 3, 0), t._texts(11, 2, 1)
one = t._reward(params).score(sources, hypotheses)
mesh = make_mesh(MeshConfig(data=2, model=2))
found = t._reward(params, mesh=mesh, batch_size=2).score(sources, hypotheses)
np.testing.assert_allclose(found, one, atol=2e-6)
print("devices", jax.device_count())
"""


def test_a_mesh_of_four_devices_gives_the_same_rewards():
    done = subprocess.run(
        [sys.executable, "-c", _ON_FOUR_DEVICES],
        env=tiny.environment(**tiny.on_devices(4)),
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "devices 4" in done.stdout
