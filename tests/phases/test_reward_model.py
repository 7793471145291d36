from __future__ import annotations

import random

import pytest

from rest_jax import errors
from rest_jax.phases import reward_model
from rest_jax.rewards.ratings import Rating
from tests.phases import places


def ratings_of(sources: int, each: int) -> list[Rating]:
    return [Rating(f"source {s}", f"hypothesis {s} {h}", 0.5) for s in range(sources) for h in range(each)]


def test_all_ratings_of_a_source_are_held_out_or_none():
    rated = ratings_of(200, 5)
    held_out = reward_model._held_out(rated, 0.25).reshape(200, 5)
    assert (held_out.all(axis=1) == held_out.any(axis=1)).all()
    # 200 sources at a share of 1/4: standard deviation 0.03.
    assert abs(held_out[:, 0].mean() - 0.25) < 0.12


def test_who_is_held_out_depends_on_the_source_alone():
    rated = ratings_of(50, 2)
    before = dict(zip(rated, reward_model._held_out(rated, 0.3), strict=True))
    random.Random(1).shuffle(rated)
    fewer = rated[:30]
    assert reward_model._held_out(fewer, 0.3).tolist() == [before[rating] for rating in fewer]


def test_a_greater_share_holds_out_the_same_and_more():
    rated = ratings_of(100, 1)
    small, large = (reward_model._held_out(rated, share) for share in (0.2, 0.5))
    assert (large | ~small).all() and large.sum() > small.sum()


def test_an_overlap_reward_trains_nothing(tmp_path):
    place = places.workspace(tmp_path, 'RewardModelConfig.kind="chrf"')
    reward_model.make_reward(place)
    assert not (place.run_dir / "reward").exists()
    reward = reward_model.load_reward(place)
    assert reward.spec.needs_reference
    assert reward_model.reward_digest(place) == reward.signature()


def test_bleu_is_tokenised_for_the_target_language(tmp_path):
    place = places.workspace(tmp_path, 'RewardModelConfig.kind="bleu"', 'TARGET_LANGUAGE="zh"')
    assert "zh" in reward_model.load_reward(place).signature()


def test_a_missing_ratings_file_is_named(tmp_path):
    place = places.workspace(tmp_path, f'RewardModelConfig.ratings_file="{tmp_path}/none.tsv"')
    with pytest.raises(errors.MissingInputError, match="none.tsv .*source, hypothesis, score"):
        reward_model.make_reward(place)


def test_ratings_of_too_few_sources_are_refused(tmp_path):
    (tmp_path / "ratings.tsv").write_text("one source\tits translation\t0.5\n")
    place = places.workspace(
        tmp_path,
        f'RewardModelConfig.ratings_file="{tmp_path}/ratings.tsv"',
        "RewardModelConfig.start_from_policy=False",
    )
    with pytest.raises(errors.DataError, match="Give ratings of more sources"):
        reward_model.make_reward(place)


def test_lengths_are_those_of_training_rows_unless_others_are_given(tmp_path):
    given = places.workspace(tmp_path)
    assert reward_model.lengths_of(given) == (16, 16)
    left = places.workspace(
        tmp_path, "RewardModelConfig.max_source_length=None", "RewardModelConfig.max_hypothesis_length=None"
    )
    assert reward_model.lengths_of(left) == (32, 32)
