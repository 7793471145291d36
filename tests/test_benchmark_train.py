"""What benchmarks/train.py goes by: the same work for all engines, losses that agree, and fair figures."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from benchmarks import train, train_engines, train_work
from benchmarks.train_work import IN_ORDER, PACKED, PADDED, SORTED, Packing
from rest_jax.network.config import T5Config
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.types import RaggedTokens, TokenPairs

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    num_encoder_layers=1,
    num_decoder_layers=2,
    dropout_rate=0.0,
)
PACKING = Packing(rows=3, length=24, batches=2, pool=6)
# A step size and an eps with which rounding stays rounding: the losses of five steps agree closely.
OPTIMIZER = OptimizerConfig(name="adamw", learning_rate=1e-2, eps=1e-4, weight_decay=0.1, clip_norm=0.5)


def some_pairs(number: int = 60) -> TokenPairs:
    draw = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        rows = [draw.integers(3, TINY.vocab_size, size=size) for size in draw.integers(2, 12, size=number)]
        sides.append(RaggedTokens.from_lists([np.append(row, 1) for row in rows]))
    return TokenPairs(np.arange(number) * 7 + 3, *sides)


@pytest.fixture(scope="module")
def work():
    padded = train_work.random_batch(TINY.vocab_size, rows=6, length=9)
    return train_work.make_work(TINY, OPTIMIZER, padded, some_pairs(), PACKING)


def sentences(arrays: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """The targets of a batch, packed or not, sorted."""
    targets = arrays["decoder_target_tokens"]
    segments = arrays.get("decoder_segment_ids", (targets != 0).astype(int))
    found = [
        tuple(row[ids == number].tolist())
        for row, ids in zip(targets, segments, strict=True)
        for number in range(1, ids.max() + 1)
    ]
    return sorted(found)


def test_padded_and_packed_batches_hold_the_same_sentences(work):
    packed, in_order, by_length = (work.batches[kind] for kind in (PACKED, IN_ORDER, SORTED))
    assert [sentences(each) for each in in_order] == [sentences(each) for each in packed]
    assert train_work.useful_tokens(packed) == sum(len(s) for each in packed for s in sentences(each))
    assert train_work.useful_tokens(packed) == train_work.useful_tokens(in_order)
    assert train_work.fill(in_order) < train_work.fill(packed) <= 1
    assert train_work.fill(in_order) < train_work.fill(by_length) <= 1


def test_sorted_batches_are_those_of_the_whole_pool_from_short_to_long():
    # All batches of the pool, so that nothing is left out.
    packing = dataclasses.replace(PACKING, batches=PACKING.pool)
    found = train_work.real_batches(some_pairs(), packing)
    together = {kind: sorted(s for each in found[kind] for s in sentences(each)) for kind in found}
    assert together[PACKED] == together[IN_ORDER] == together[SORTED]
    longest = [
        max(each["encoder_input_tokens"].shape[1], each["decoder_target_tokens"].shape[1])
        for each in found[SORTED]
    ]
    assert longest == sorted(longest)
    sizes = [len(each["decoder_target_tokens"]) for each in found[SORTED]]
    assert max(sizes) - min(sizes) <= 1


def test_work_is_read_as_it_was_written(work, tmp_path):
    work.write(tmp_path)
    found = train_work.Work.read(tmp_path)
    assert (found.config, found.optimizer) == (work.config, work.optimizer)
    assert found.batches.keys() == work.batches.keys()
    for kind, each in work.batches.items():
        for wanted, read in zip(each, found.batches[kind], strict=True):
            assert wanted.keys() == read.keys()
            assert all(np.array_equal(wanted[name], read[name]) for name in wanted)
    kernel = "decoder", "logits_dense", "kernel"
    ours, theirs = work.params, found.params
    for name in kernel:
        ours, theirs = ours[name], theirs[name]
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["pytorch", "t5x"])
@pytest.mark.parametrize("tied", [False, True])
def test_engines_train_the_same_network(work, name, tied):
    for package in train.NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if tied:
        config = dataclasses.replace(TINY, logits_via_embedding=True)
        padded = train_work.random_batch(TINY.vocab_size, rows=6, length=9)
        work = train_work.make_work(config, OPTIMIZER, padded, some_pairs(), PACKING)
    losses = {}
    for engine_name in ("rest_jax", name):
        engine = train_engines.ENGINES[engine_name](work)
        for kind, each in work.of_engine(engine_name).items():
            if kind == SORTED:
                continue
            batches = [engine.prepare(arrays) for arrays in each]
            found = train_engines.run(engine.start(), batches, 5)
            losses.setdefault(engine_name, {})[PADDED if kind == PADDED else PACKED] = found["losses"]
    for kind in (PADDED, PACKED):
        ours, theirs = losses["rest_jax"][kind], losses[name][kind]
        np.testing.assert_allclose(theirs, ours, rtol=2e-5)
        assert abs(ours[-1] - ours[0]) > 0.05  # they did learn, so the updates are the same too
    agreement = train.agreement(losses)
    assert all(found["same"] for found in agreement.values())


def test_losses_that_differ_are_no_agreement():
    ours = {"padded": [2.0, 1.0]}
    near = {"padded": [2.0 * (1 + 5e-6), 1.0 * (1 + 1e-4)]}
    found = train.agreement({"rest_jax": ours, "other": near})["padded"]
    assert found["same"]
    assert found["first"] == pytest.approx(5e-6, rel=1e-3)
    assert found["later"] == pytest.approx(1e-4, rel=1e-3)
    for wrong in ([2.0 * (1 + 2e-5), 1.0], [2.0, 1.0003], [2.0, float("nan")], [float("nan"), 1.0]):
        losses = {"rest_jax": ours, "near": near, "wrong": {"padded": wrong}}
        assert not train.agreement(losses)["padded"]["same"]


def test_figures_of_turns():
    turns = [{"seconds": [0.5, 0.2], "peak_mib": 7.0}, {"seconds": [0.25, 1.0], "peak_mib": 9.0}]
    row = train.padded_row(turns)
    assert row == {"steps_per_s": 5.0, "ms": 200.0, "median_ms": 375.0, "peak_mib": 9.0}
    batches = [{"decoder_loss_weights": np.ones((1, n)), "encoder_input_tokens": np.ones((1, 4), int),
                "decoder_target_tokens": np.arange(4)[None]} for n in (3, 4)]  # fmt: skip
    packed = train.packed_row(turns, batches)
    # Each batch by its own best turn: 0.25 s and 0.2 s for 7 tokens.
    assert packed["useful_tokens_per_s"] == pytest.approx(7 / 0.45)
    assert packed["median_useful_tokens_per_s"] == pytest.approx(7 / (0.375 + 0.6))
    assert packed["fill"] == pytest.approx(7 / 8)
    rows = train.with_ratios(
        {"rest_jax": row, "slow": {**row, "steps_per_s": 2.0, "median_ms": 750.0}}, "steps_per_s"
    )
    assert rows["ratios"] == {"slow": 2.5}
    assert rows["median_ratios"] == {"slow": 2.0}


def test_products_are_all_weights_of_the_network_once_for_each_of_their_inputs(work):
    arrays = work.batches[PADDED][0]
    sizes = sum(inner * outer for _, inner, outer in train_work.products(TINY, arrays))
    kernels = [leaf.size for path, leaf in flat(work.params) if path.endswith("kernel")]
    assert sizes == sum(kernels)
    assert 0 < train_work.matmul_limit(TINY, arrays, repeats=1) < np.inf


def flat(params):
    from flax import traverse_util

    return traverse_util.flatten_dict(params, sep="/").items()


def test_a_peer_answers_from_its_own_process(work, tmp_path):
    work.write(tmp_path)
    with train.waiting(["rest_jax"], tmp_path) as (peer,):
        first = peer.run(PADDED, 2, fresh=True)
        again = peer.run(PADDED, 2, fresh=True)
        on = peer.run(PADDED, 1)
    assert first["losses"] == again["losses"]
    assert on["losses"][0] < first["losses"][0]
    assert len(on["seconds"]) == 1
