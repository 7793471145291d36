from __future__ import annotations

import pytest
import sacrebleu

from rest_jax import errors, files
from rest_jax.phases import annotate
from rest_jax.phases.grow_set import dataset_rewards, open_grow_set
from tests.phases import places
from tests.phases.places import FIRST_ID

TEXTS = ["target 0", "nothing like it", "target 1", "tarket 2"]


@pytest.fixture
def place(tmp_path):
    place = places.workspace(tmp_path, 'RewardModelConfig.kind="chrf"')
    places.put_text(place, train=places.made_up(3))
    places.put_grow(place, [FIRST_ID, FIRST_ID, FIRST_ID + 2, FIRST_ID + 2], [0, 1, 0, 1], TEXTS)
    return place


def test_each_sample_is_scored_against_the_reference_of_its_source(place):
    annotate.annotate(place, 1)
    (found,) = open_grow_set(place, 1).rewards
    references = ["target 0", "target 0", "target 2", "target 2"]
    for reward, text, reference in zip(found, TEXTS, references, strict=True):
        expected = sacrebleu.sentence_chrf(text, [reference]).score / 100
        assert reward == pytest.approx(expected, abs=1e-6)
    assert found[0] == 1.0


def test_the_original_data_is_scored_once_for_all_grow_steps(place):
    annotate.annotate(place, 1)
    assert dataset_rewards(place).tolist() == [1.0, 1.0, 1.0]
    path = place.dataset_rewards_folder / files.SEAL_NAME
    before = path.stat().st_mtime_ns
    annotate.annotate(place, 1)
    assert path.stat().st_mtime_ns == before


def test_a_lost_summary_is_drawn_again(place):
    annotate.annotate(place, 1)
    path = place.grow_folder(1) / "summary.json"
    first = path.read_bytes()
    path.unlink()
    annotate.annotate(place, 1)
    assert path.read_bytes() == first


def test_a_damaged_shard_of_rewards_is_made_anew_with_the_same_bytes(place, capsys):
    annotate.annotate(place, 1)
    (shard,) = place.grow_rewards_folder(1).glob("*.parquet")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-20] + bytes([whole[-20] ^ 4]) + whole[-19:])
    annotate.annotate(place, 1)
    assert shard.read_bytes() == whole
    assert f"{shard} has other bytes than its seal states" in capsys.readouterr().err


def test_samples_have_to_be_there_first(tmp_path):
    place = places.workspace(tmp_path, 'RewardModelConfig.kind="chrf"')
    places.put_text(place, train=places.made_up(3))
    with pytest.raises(errors.MissingInputError, match="grow/g1 is missing .*`rest-jax grow` first"):
        annotate.annotate(place, 1)


def test_a_learned_reward_has_to_be_there_first(tmp_path):
    place = places.workspace(tmp_path)
    with pytest.raises(errors.MissingInputError, match="`rest-jax reward_model` first"):
        annotate.annotate(place, 1)
