"""Numbers of each token of packed pairs, against one pair at a time through the networks themselves."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rest_jax.network import heads, init
from rest_jax.network.transformer import Transformer
from rest_jax.phases import token_numbers
from rest_jax.types import EOS_ID, RaggedTokens, TokenPairs
from tests.phases import places

LENGTHS = [(3, 5), (9, 2), (1, 1), (12, 14), (4, 7), (2, 3), (6, 1)]


def pairs() -> TokenPairs:
    draw = np.random.default_rng(5)

    def side(lengths):
        return RaggedTokens.from_lists([[*draw.integers(3, 300, n - 1).tolist(), EOS_ID] for n in lengths])

    return TokenPairs(np.arange(len(LENGTHS)), side([n for n, _ in LENGTHS]), side([n for _, n in LENGTHS]))


@pytest.fixture
def place(tmp_path):
    return places.workspace(tmp_path)


def one_by_one(model, params, of_pairs):
    """What the network says of each pair alone, at every target position."""
    apply = jax.jit(model.apply)  # one program for each pair, in the place of one for each of its operations
    for row in range(len(of_pairs)):
        source, target = of_pairs.sources[row], of_pairs.targets[row]
        shifted = np.concatenate([[0], target[:-1]])
        yield target, np.asarray(apply({"params": params}, source[None], shifted[None]))[0]


def test_log_probabilities_of_packed_pairs_are_those_of_each_pair_alone(place):
    config = place.experiment.policy
    params = init.init_params(config, jax.random.key(3))
    found = token_numbers.log_probs(place, params, pairs(), batch_size=2)
    wanted = []
    for target, logits_TxV in one_by_one(Transformer(config), params, pairs()):
        log_softmax = logits_TxV - np.log(np.exp(logits_TxV.astype(np.float64)).sum(-1, keepdims=True))
        wanted.append(log_softmax[np.arange(len(target)), target])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=3e-5)


def test_values_of_packed_pairs_are_those_of_each_pair_alone(place):
    config = place.experiment.policy
    policy = init.init_params(config, jax.random.key(3))
    params = init.init_value_params(config, jax.random.key(4), policy)
    found = token_numbers.values(place, config, params, pairs(), batch_size=3)
    wanted = [values for _, values in one_by_one(heads.ValueModel(config), params, pairs())]
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=3e-5)
    assert len({round(float(v), 4) for v in found}) > len(LENGTHS)  # it differs within a pair


def test_one_number_a_pair_reaches_each_of_its_tokens():
    spread = token_numbers.of_each_token(pairs(), np.arange(7) / 10)
    assert spread.tolist() == np.repeat(np.float32(np.arange(7) / 10), [5, 2, 1, 14, 7, 3, 1]).tolist()
