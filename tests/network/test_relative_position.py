from __future__ import annotations

import jax
import numpy as np
import pytest

from rest_jax.network.relative_position import RelativePositionBias, relative_position_buckets
from tests.network.tiny import TINY

torch = pytest.importorskip("torch")
modeling_t5 = pytest.importorskip("transformers.models.t5.modeling_t5")


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1024)])
def test_buckets_are_those_of_pytorch(bidirectional, num_buckets, max_distance):
    offsets = np.arange(-1500, 1501)
    ours = relative_position_buckets(
        offsets, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    theirs = modeling_t5.T5Attention._relative_position_bucket(
        torch.tensor(offsets), bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_buckets_by_hand():
    def buckets(offsets, bidirectional):
        return relative_position_buckets(
            np.array(offsets), bidirectional=bidirectional, num_buckets=32, max_distance=128
        ).tolist()

    # Both ways: 8 exact buckets, then 16 * 2**(k / 2) starts bucket 10 + k; keys after the query get +16.
    assert buckets([0, -1, -7, -8, -15, -16, -64, -127, -128, -999], True) == [
        0,
        1,
        7,
        8,
        9,
        10,
        14,
        15,
        15,
        15,
    ]
    assert buckets([1, 7, 16, 999], True) == [17, 23, 26, 31]
    # One way: 16 exact buckets; what comes after the query is hidden anyway.
    assert buckets([0, -1, -15, -16, -112, -113, -999], False) == [0, 1, 15, 16, 30, 31, 31]
    assert buckets([1, 50], False) == [0, 0]


def _bias(bidirectional):
    module = RelativePositionBias(TINY, bidirectional=bidirectional)
    table = jax.random.normal(jax.random.key(0), (TINY.num_heads, TINY.relpos_num_buckets))
    return module, {"params": {"rel_embedding": table}}, np.asarray(table)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("length", [1, 2, 150])
def test_bias_of_all_pairs_is_the_table_looked_up(bidirectional, length):
    module, variables, table = _bias(bidirectional)
    offsets = np.arange(length)[None] - np.arange(length)[:, None]
    buckets = relative_position_buckets(
        offsets, bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    np.testing.assert_array_equal(module.apply(variables, length), table[:, buckets])


def test_bias_of_one_position_is_its_row():
    module, variables, _ = _bias(bidirectional=False)
    whole = np.asarray(module.apply(variables, 40))
    one = jax.jit(lambda position: module.apply(variables, position, 40, method="of_position"))
    for position in (0, 1, 17, 39):
        row = np.asarray(one(position))
        np.testing.assert_array_equal(row[:, : position + 1], whole[:, position, : position + 1])
        assert not row[:, position + 1 :].any()
