from __future__ import annotations

import numpy as np

from rest_jax import files
from rest_jax.phases import grow
from tests.phases import places


def drawn(place, number: int) -> list[int]:
    return grow.grow_sources(place, number).ids.tolist()


def a_place(tmp_path, *bindings: str, count: int = 40):
    place = places.workspace(tmp_path, *bindings)
    places.put_text(place, train=places.made_up(count))
    return place


def test_sources_are_drawn_without_replacement_and_sorted(tmp_path):
    ids = drawn(a_place(tmp_path, "GrowConfig.sources=25"), 1)
    assert len(ids) == len(set(ids)) == 25
    assert ids == sorted(ids)
    assert set(ids) <= set(range(places.FIRST_ID, places.FIRST_ID + 40))


def test_each_grow_step_draws_its_own_and_the_same_at_every_call(tmp_path):
    place = a_place(tmp_path, "GrowConfig.sources=25")
    assert drawn(place, 1) == drawn(place, 1)
    assert drawn(place, 1) != drawn(place, 2)
    again = a_place(tmp_path / "again", "GrowConfig.sources=25")
    assert drawn(again, 2) == drawn(place, 2)
    other = a_place(tmp_path / "other", "GrowConfig.sources=25", "SEED=1")
    assert drawn(other, 1) != drawn(place, 1)


def test_every_source_is_drawn_now_and_then(tmp_path):
    place = a_place(tmp_path, "GrowConfig.sources=10")
    counts = np.zeros(40)
    for number in range(1, 201):
        counts[np.array(drawn(place, number)) - places.FIRST_ID] += 1
    # 200 draws at a share of 1/4: mean 50, standard deviation 6.
    assert counts.min() > 25 and counts.max() < 80


def test_all_sources_are_taken_where_no_number_or_a_greater_one_is_given(tmp_path):
    everything = list(range(places.FIRST_ID, places.FIRST_ID + 40))
    for number, wanted in enumerate(("None", "40", "1000")):
        assert drawn(a_place(tmp_path / str(number), f"GrowConfig.sources={wanted}"), 1) == everything


def test_an_example_keeps_its_text_and_tokens(tmp_path):
    examples = grow.grow_sources(a_place(tmp_path, "GrowConfig.sources=7"), 1)
    for row, example_id in enumerate(examples.ids - places.FIRST_ID):
        assert examples.sources[row] == f"source {example_id}"
        assert examples.tokens.sources[row].tolist() == [10 + example_id, 1]


def test_a_grow_step_states_the_policy_and_the_sampling_that_it_comes_from(finished_run):
    """In the seal and in the record of each shard, so that a shard taken elsewhere explains itself."""
    for grow_step, policy in ((1, "bc"), (2, "g1_i2")):
        folder = finished_run / "grow" / f"g{grow_step}"
        facts = files.read_seal(folder).facts
        assert facts["policy"] == policy
        assert facts["policy_digest"] == files.read_seal(finished_run / "policy" / policy).digest
        assert {"temperature", "top_k", "top_p"} <= set(facts["sampling"])
        assert facts["rows"] == facts["sources"] * facts["samples_per_source"]
        origin = {name: facts[name] for name in ("policy", "policy_digest", "sampling", "samples_per_source")}
        records = [files.read_json(path) for path in folder.glob("samples-*.json")]
        assert records and all(record["origin"] == origin for record in records)
