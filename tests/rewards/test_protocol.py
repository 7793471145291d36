"""What a reward states, and that nothing gets past the checks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.rewards import protocol
from rest_jax.rewards.protocol import RewardSpec, checked_scores, flipped


@dataclasses.dataclass
class Fixed:
    """Gives the scores it was made with."""

    scores: list
    spec: RewardSpec = dataclasses.field(default_factory=lambda: RewardSpec(name="fixed"))

    def score(self, sources, hypotheses, references=None):
        return np.array(self.scores)

    def signature(self):
        return f"fixed|{self.spec.version}"


def _errors_of_25(scores):
    """A metric on MetricX's scale: 0 is best, 25 worst."""
    return Fixed(scores, RewardSpec(name="errors", maximum=25.0, version="24", higher_is_better=False))


def test_good_scores_pass_unchanged_and_missing_ones_stay_missing():
    scores = checked_scores(Fixed([0.0, np.nan, 1.0]), ["a"] * 3, ["b"] * 3)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [0.0, np.nan, 1.0])


@pytest.mark.parametrize("bad", [1.1, -0.1, np.inf, -np.inf])
def test_a_score_outside_the_range_names_the_reward_and_the_row(bad):
    with pytest.raises(errors.DataError, match=r"'fixed' gave .* to row 1, outside its range \[0.0, 1.0\]"):
        checked_scores(Fixed([0.5, bad]), ["a"] * 2, ["b"] * 2)


def test_rounding_past_the_edge_is_put_back():
    np.testing.assert_array_equal(
        checked_scores(Fixed([1.0 + 1e-12, -1e-12]), ["a"] * 2, ["b"] * 2), [1.0, 0.0]
    )


@pytest.mark.parametrize("scores", [[0.5], [0.5] * 3, [[0.5, 0.5]], 0.5])
def test_not_one_score_a_row_is_an_error(scores):
    with pytest.raises(errors.DataError, match="'fixed' gave scores of shape"):
        checked_scores(Fixed(scores), ["a"] * 2, ["b"] * 2)


def test_texts_that_do_not_match_are_an_error():
    with pytest.raises(errors.DataError, match="'fixed' got 2 sources, 1 hypotheses"):
        checked_scores(Fixed([0.5]), ["a", "b"], ["c"])
    with pytest.raises(errors.DataError, match="1 references"):
        checked_scores(Fixed([0.5, 0.5]), ["a", "b"], ["c", "d"], ["e"])


def test_references_that_are_needed_must_be_there():
    needy = Fixed([0.5], RewardSpec(name="needy", needs_reference=True))
    with pytest.raises(errors.DataError, match="'needy' needs references"):
        checked_scores(needy, ["a"], ["b"])
    assert checked_scores(needy, ["a"], ["b"], ["c"]) == [0.5]


def test_lower_is_better_does_not_pass_the_door():
    with pytest.raises(errors.ConfigError, match="'errors' is lower-is-better.*flipped"):
        checked_scores(_errors_of_25([3.0]), ["a"], ["b"])


@given(st.lists(st.floats(0, 25), min_size=1, max_size=20))
def test_flipped_turns_order_and_range(scores):
    texts = ["x"] * len(scores)
    rewards = checked_scores(flipped(_errors_of_25(scores)), texts, texts)
    np.testing.assert_allclose(rewards, 1.0 - np.array(scores) / 25.0, atol=1e-12)
    assert int(rewards.argmax()) == int(np.argmin(scores)) or rewards.max() == rewards[np.argmin(scores)]


def test_flipped_states_its_new_range_and_keeps_the_version():
    reward = flipped(_errors_of_25([0.0, 25.0, np.nan]))
    assert reward.spec == RewardSpec(name="errors", version="24")
    assert reward.signature() == "fixed|24|flipped:[0,25]"
    np.testing.assert_array_equal(reward.score(["x"] * 3, ["x"] * 3), [1.0, 0.0, np.nan])
    assert isinstance(reward, protocol.Reward)


def test_flipped_checks_the_metrics_own_range():
    with pytest.raises(errors.DataError, match=r"\[0.0, 25.0\]"):
        flipped(_errors_of_25([26.0])).score(["x"], ["x"])


def test_flipping_twice_is_refused():
    with pytest.raises(errors.ConfigError, match="higher-is-better already"):
        flipped(flipped(_errors_of_25([1.0])))


@pytest.mark.parametrize(
    "fields",
    [{"name": ""}, {"minimum": 1.0}, {"maximum": np.inf}, {"minimum": np.nan}, {"minimum": 2.0}],
)
def test_a_spec_without_name_or_range_is_refused(fields):
    with pytest.raises(errors.ConfigError):
        RewardSpec(**{"name": "r", **fields})
