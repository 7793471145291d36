from __future__ import annotations

import numpy as np
import pytest

from rest_jax.data import shards, whole_sources
from rest_jax.objectives.filters import threshold_rule
from rest_jax.objectives.guards import GuardConfig
from rest_jax.phases import grow_set, grow_summary
from rest_jax.phases.grow_set import Sieve, open_grow_set
from rest_jax.types import RaggedTokens
from tests.phases import places
from tests.phases.places import FIRST_ID

NAN = float("nan")


def a_sieve(tau: float, **guards: bool) -> Sieve:
    return Sieve(threshold_rule(tau), GuardConfig(**guards))


@pytest.fixture
def place(tmp_path):
    place = places.workspace(tmp_path)
    places.put_text(place, train=places.made_up(3))
    ids = [FIRST_ID] * 4 + [FIRST_ID + 2] * 2
    texts = ["good", "bad", "good", "middling", "good", ""]
    truncated = [False, True, False, False, False, True]
    places.put_grow(place, ids, [0, 1, 2, 3, 0, 1], texts, truncated)
    places.put_rewards(place, [0.91, 0.11, 0.91, 0.5, NAN, 0.3], [0.95, 0.95, NAN])
    return place


def test_parts_are_joined_in_order():
    parts = [RaggedTokens.from_lists(rows) for rows in ([[1, 2], []], [], [[3]])]
    assert places.lists(whole_sources.concatenated(parts)) == [[1, 2], [], [3]]


def test_a_grow_set_is_what_the_store_holds(place):
    found = open_grow_set(place, 1)
    everything = found.survivors(a_sieve(-1.0, truncated=False))  # but for the missing reward
    assert everything.example_ids.tolist() == [FIRST_ID] * 4 + [FIRST_ID + 2]
    assert places.lists(everything.tokens) == [[100 + k, 1] for k in (0, 1, 2, 3, 5)]
    np.testing.assert_array_equal(everything.rewards, [0.91, 0.11, 0.91, 0.5, 0.3])
    assert (everything.counts.total, everything.counts.missing, everything.guarded) == (6, 1, {})
    whole = found.survivors(a_sieve(-1.0))
    assert places.lists(whole.tokens) == [[100 + k, 1] for k in (0, 2, 3)]
    assert (whole.counts.total, whole.counts.missing, whole.guarded) == (6, 3, {"truncated": 2})
    np.testing.assert_array_equal(np.concatenate([*found.rewards]), [0.91, 0.11, 0.91, 0.5, NAN, 0.3])
    np.testing.assert_array_equal(
        np.concatenate([*found.usable_rewards(GuardConfig())]), [0.91, NAN, 0.91, 0.5, NAN, NAN]
    )
    np.testing.assert_array_equal(found.dataset.rewards, [0.95, 0.95, NAN])


def test_a_summary_counts_what_is_there(place):
    found = grow_summary.summarise(place, 1)
    counts = {
        key: found[key] for key in ("grow", "samples", "sources", "truncated", "empty", "missing_rewards")
    }
    assert counts == {
        "grow": 1, "samples": 6, "sources": 2, "truncated": 2, "empty": 1, "missing_rewards": 1,
    }  # fmt: skip
    assert found["duplicates"] == 1  # "good" twice for one source; for another source it is another sample
    np.testing.assert_allclose(found["reward"]["mean"], (0.91 + 0.11 + 0.91 + 0.5 + 0.3) / 5)
    assert found["reward"]["quantiles"]["0.5"] == 0.5
    np.testing.assert_allclose(found["dataset_reward"]["mean"], 0.95)


def test_a_histogram_has_every_reward_that_there_is(place):
    histogram = grow_summary.summarise(place, 1)["histogram"]
    edges = np.array(histogram["edges"])
    assert len(edges) == len(histogram["samples"]) + 1 == len(histogram["dataset"]) + 1 == 51
    assert (edges[0], edges[-1]) == (0.0, 1.0)
    assert (sum(histogram["samples"]), sum(histogram["dataset"])) == (5, 2)
    np.testing.assert_array_equal(np.flatnonzero(histogram["samples"]), [5, 15, 25, 45])


def test_examples_show_the_best_and_the_worst_once_each(place):
    shown = {example["id"]: example for example in grow_summary.summarise(place, 1)["examples"]}
    assert set(shown) == {FIRST_ID, FIRST_ID + 2}
    first, last = shown[FIRST_ID], shown[FIRST_ID + 2]
    assert (first["source"], first["reference"]) == ("source 0", "target 0")
    assert [(s["text"], s["reward"]) for s in first["best"]] == [
        ("good", 0.91),
        ("middling", 0.5),
        ("bad", 0.11),
    ]
    assert first["worst"] == []
    assert [(s["text"], s["reward"]) for s in last["best"]] == [("", 0.3)]  # a missing reward is not ranked


@pytest.mark.parametrize("group", [1, 7, 64, 10_000])
def test_row_groups_do_not_show_in_the_results(tmp_path, monkeypatch, group):
    """Rows in any row groups, sources cut in two among them, against NumPy on all rows at once."""
    monkeypatch.setattr(shards, "ROW_GROUP_ROWS", group)
    rng = np.random.default_rng(7)
    sources, times = 20, 11
    ids = np.repeat(FIRST_ID + np.sort(rng.choice(30, sources, replace=False)), times)
    texts = [f"text {k}" for k in rng.integers(0, 6, len(ids))]
    truncated = rng.random(len(ids)) < 0.2
    rewards = np.where(rng.random(len(ids)) < 0.1, NAN, rng.integers(0, 40, len(ids)) / 40)
    of_dataset = rng.random(30)
    place = places.workspace(tmp_path)
    places.put_text(place, train=places.made_up(30))
    places.put_grow(place, ids, np.tile(np.arange(times), sources), texts, truncated)
    places.put_rewards(place, rewards, of_dataset)
    finite = rewards[np.isfinite(rewards)]

    found = grow_summary.summarise(place, 1)
    assert (found["samples"], found["sources"]) == (len(ids), sources)
    assert found["duplicates"] == len(ids) - len(set(zip(ids.tolist(), texts, strict=True)))
    assert (found["truncated"], found["missing_rewards"]) == (truncated.sum(), len(ids) - len(finite))
    assert found["reward"]["mean"] == pytest.approx(finite.mean(), rel=1e-14)
    for share, value in found["reward"]["quantiles"].items():
        assert value == np.quantile(finite, float(share))
    np.testing.assert_array_equal(
        found["histogram"]["samples"], np.histogram(finite, found["histogram"]["edges"])[0]
    )
    assert len(found["examples"]) == 8

    d_g = open_grow_set(place, 1)
    everything = d_g.usable_rewards(GuardConfig(truncated=False), with_dataset=True)
    np.testing.assert_array_equal(np.concatenate([*everything]), np.concatenate([rewards, of_dataset]))
    for drop in (False, True):
        rows = np.flatnonzero((rewards > 0.8) & ~(truncated & drop))
        survivors = d_g.survivors(a_sieve(0.8, truncated=drop))
        np.testing.assert_array_equal(survivors.example_ids, ids[rows])
        assert places.lists(survivors.tokens) == [[100 + row, 1] for row in rows]
        assert survivors.counts.sources == sources
        assert survivors.counts.sources_with_none == sources - len(np.unique(ids[rows]))
        assert survivors.counts.mean_kept == pytest.approx(rewards[rows].mean(), rel=1e-14)


@pytest.mark.parametrize("sizes", [[5], [1, 9, 3, 64, 7], [0, 8, 8]])
def test_flags_are_read_back_in_any_portions(sizes):
    rng = np.random.default_rng(0)
    flags = rng.random(sum(sizes)) < 0.5
    bits = grow_set._Bits()
    for part in np.split(flags, np.cumsum(sizes)[:-1]):
        bits.append(part)
    for portion in (1, 4, len(flags)):
        following = bits.reader()
        ends = [*range(portion, len(flags), portion), len(flags)]
        read = [following(end - start) for start, end in zip([0, *ends], ends, strict=False)]
        np.testing.assert_array_equal(np.concatenate(read), flags)
