"""The validation report: by hand, against scipy, and for rewards that are perfect, blind or missing."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from rest_jax import errors
from rest_jax.rewards.corruptions import Corruption
from rest_jax.rewards.overlap import SentenceChrf
from rest_jax.rewards.protocol import RewardSpec
from rest_jax.rewards.ratings import RaterConfig, Rating, rate_automatically
from rest_jax.rewards.validation import corruption_report, validate_reward

WORDS = ["apple", "bridge", "cloud", "dance", "evening", "forest", "garden", "house", "island", "jacket"]


@dataclasses.dataclass
class ByFunction:
    """A reward computed from each source and hypothesis."""

    function: object
    spec: RewardSpec = dataclasses.field(default_factory=lambda: RewardSpec(name="f", maximum=100.0))

    def score(self, sources, hypotheses, references=None):
        return np.array([float(self.function(s, h)) for s, h in zip(sources, hypotheses, strict=True)])

    def signature(self):
        return "f|v1"


def _held_out(sources=40, seed=0, reference_share=1.0):
    generator = np.random.default_rng(seed)
    texts = [[str(w) for w in generator.choice(WORDS, size=6, replace=False)] for _ in range(sources)]
    samples = [
        [" ".join(w if generator.random() < p else "other" for w in text) for p in (0.9, 0.6, 0.3)]
        for text in texts
    ]
    references = [" ".join(text) for text in texts]
    quellen = [f"quelle {i} lang" for i in range(sources)]
    config = RaterConfig(reference_share=reference_share)
    return rate_automatically(quellen, references, samples, np.arange(sources), seed, config)


def test_the_rater_itself_is_a_perfect_reward():
    report = validate_reward(SentenceChrf(), _held_out(), seed=0)
    for key in ("spearman", "kendall", "spearman_within_source", "kendall_within_source"):
        assert report[key] == pytest.approx(1.0)
    assert set(report["corruptions"]) == set(Corruption)
    for entry in report["corruptions"].values():
        assert entry == {"share_below": 1.0, "n": 40}
    assert report["unrelated"] == {"share_below": 1.0, "n": 40}
    assert report["sources"] == 40
    assert report["signature"] == SentenceChrf().signature()


def test_correlations_are_scipys_over_samples_alone():
    ratings = _held_out()
    reward = ByFunction(lambda s, h: len(set(h)) + 7 * h.count("a"))
    report = validate_reward(reward, ratings, seed=0)
    samples = [x for x in ratings if x.kind == "sample"]
    scores = [x.score for x in samples]
    rewards = reward.score([x.source for x in samples], [x.hypothesis for x in samples])
    assert report["spearman"] == pytest.approx(stats.spearmanr(scores, rewards).statistic)
    assert report["kendall"] == pytest.approx(stats.kendalltau(scores, rewards).statistic)
    assert report["n"] == len(samples)
    within = []
    for number in range(40):
        rows = [row for row, sample in enumerate(samples) if sample.example_id == number]
        a, b = np.array(scores)[rows], rewards[rows]
        if len(set(a)) > 1 and len(set(b)) > 1:
            within.append(stats.spearmanr(a, b).statistic)
    assert report["spearman_within_source"] == pytest.approx(np.mean(within))


def test_a_reward_that_likes_length_is_caught_by_repetition():
    report = validate_reward(ByFunction(lambda s, h: min(len(h), 100)), _held_out(), seed=0)["corruptions"]
    assert report["repeated"] == {"share_below": 0.0, "n": 40}
    assert report["empty"] == report["truncated"] == {"share_below": 1.0, "n": 40}
    assert report["permuted"] == {"share_below": 0.0, "n": 40}  # as long: not strictly below


def test_a_reward_that_does_not_read_the_source_takes_any_good_translation():
    fluent = ByFunction(lambda s, h: 0.0 if "other" in h else sum(map(ord, h)) % 97)
    found = validate_reward(fluent, _held_out(200), seed=0)["unrelated"]
    assert found["share_below"] == pytest.approx(0.5, abs=0.1)


def test_a_constant_reward_has_no_correlation_and_sees_nothing():
    report = validate_reward(ByFunction(lambda s, h: 0.5), _held_out(), seed=0)
    assert report["spearman"] is report["kendall"] is report["spearman_within_source"] is None
    assert all(entry["share_below"] == 0.0 for entry in report["corruptions"].values())
    assert report["unrelated"] == {"share_below": 0.0, "n": 40}
    json.dumps(report, allow_nan=False)


def test_missing_rewards_are_counted_and_left_out():
    def holed(source, hypothesis):
        return np.nan if source.startswith("quelle 1") or not hypothesis else len(hypothesis) % 7

    ratings = _held_out()
    report = validate_reward(ByFunction(holed), ratings, seed=0)
    gone = [x for x in ratings if x.kind == "sample" and x.source.startswith("quelle 1")]
    assert report["missing"] == len(gone) > 0
    assert report["sources"] == 40 - 11
    assert report["corruptions"]["permuted"]["n"] == 40 - 11
    assert report["corruptions"]["empty"] == {"share_below": None, "n": 0}
    json.dumps(report, allow_nan=False)


def test_human_ratings_without_ids_or_references_damage_the_best_translation():
    ratings = [
        Rating("eine Quelle", "a bad one here", 0.2),
        Rating("eine Quelle", "the best one here", 0.9),
        Rating("noch eine", "only this one", 0.5),
    ]
    known = {"the best one here": 9, "only this one": 8, "a bad one here": 1}
    reward = ByFunction(lambda s, h: known.get(h, 5))
    report = validate_reward(reward, ratings, seed=0, rater="people")
    assert report["rater"] == "people"
    assert report["sources"] == 2
    assert report["spearman"] == pytest.approx(1.0)
    assert report["corruptions"]["permuted"] == {"share_below": 1.0, "n": 2}
    assert report["corruptions_of_samples"]["permuted"] == {"share_below": 0.0, "n": 1}


def test_scatter_holds_at_most_500_points_of_score_and_reward():
    ratings = [Rating(f"s{i}", f"h{i}", i / 600, example_id=i) for i in range(600)]
    reward = ByFunction(lambda s, h: int(s[1:]) / 60)
    report = validate_reward(reward, ratings, seed=0)
    points = np.array(report["scatter"])
    assert points.shape == (500, 2)
    np.testing.assert_allclose(points[:, 1], points[:, 0] * 10, atol=1e-5)
    assert len({tuple(p) for p in points.tolist()}) == 500
    assert report == validate_reward(reward, ratings, seed=0)
    assert report["scatter"] != validate_reward(reward, ratings, seed=1)["scatter"]
    assert len(validate_reward(reward, ratings[:20], seed=0)["scatter"]) == 20


def test_nothing_to_damage_gives_counts_of_zero():
    report = corruption_report(ByFunction(lambda s, h: 1.0), [], seed=0)
    assert report == {kind.value: {"share_below": None, "n": 0} for kind in Corruption}


def test_references_that_are_needed_must_be_among_the_ratings():
    with pytest.raises(errors.DataError, match="needs references and example"):
        validate_reward(SentenceChrf(), _held_out(reference_share=0.5), seed=0)


def test_without_translations_there_is_nothing_to_validate():
    with pytest.raises(errors.DataError, match="no translation among 1 ratings"):
        validate_reward(SentenceChrf(), [Rating("a", "b", 1.0, "reference", 1)], seed=0)
