from __future__ import annotations

import numpy as np
import pytest

from rest_jax.phases import grow_set
from rest_jax.types import RaggedTokens
from tests.phases import places
from tests.phases.places import FIRST_ID

NAN = float("nan")


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
    assert places.lists(grow_set.concatenated(parts)) == [[1, 2], [], [3]]


def test_a_grow_set_is_what_the_store_holds(place):
    found = grow_set.load_grow_set(place, 1)
    assert found.example_ids.tolist() == [FIRST_ID] * 4 + [FIRST_ID + 2] * 2
    assert places.lists(found.tokens) == [[100 + k, 1] for k in range(6)]
    assert found.truncated.tolist() == [False, True, False, False, False, True]
    np.testing.assert_array_equal(found.rewards, [0.91, 0.11, 0.91, 0.5, NAN, 0.3])
    np.testing.assert_array_equal(found.dataset_rewards, [0.95, 0.95, NAN])


def test_a_summary_counts_what_is_there(place):
    found = grow_set.summarise(place, 1)
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
    histogram = grow_set.summarise(place, 1)["histogram"]
    edges = np.array(histogram["edges"])
    assert len(edges) == len(histogram["samples"]) + 1 == len(histogram["dataset"]) + 1 == 51
    assert (edges[0], edges[-1]) == (0.0, 1.0)
    assert (sum(histogram["samples"]), sum(histogram["dataset"])) == (5, 2)
    np.testing.assert_array_equal(np.flatnonzero(histogram["samples"]), [5, 15, 25, 45])


def test_examples_show_the_best_and_the_worst_once_each(place):
    shown = {example["id"]: example for example in grow_set.summarise(place, 1)["examples"]}
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
