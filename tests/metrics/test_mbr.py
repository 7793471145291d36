"""Pairwise utilities against sacreBLEU's own, and the choice of MBR against a direct loop over samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.metrics.mbr import distinct, mbr_choices
from rest_jax.metrics.pairwise import PairwiseBleu, PairwiseChrf, PairwiseScore, Utility
from rest_jax.rewards.overlap import SentenceBleu, SentenceChrf

TEXTS = [
    "", " ", "a", "ab", "abcabcabc abcabc", "the cat sat on the mat", "The cat sat on the mat.",
    "the the the the the cat", "cat", "on the mat, the cat sat!", "我很快就會回來。",
    "我會很快回來", "naïve 🙂🙂 🙂", "a b c d e f g", "a b c d e f g h i j k", "mat " * 30,
]  # fmt: skip


def utilities() -> list[tuple[Utility, object]]:
    return [
        (PairwiseChrf(), SentenceChrf()),
        (PairwiseBleu("en"), SentenceBleu("en")),
        (PairwiseBleu("zh"), SentenceBleu("zh")),
    ]


def looped(metric, texts) -> np.ndarray:
    """Pair by pair through sacreBLEU."""
    return np.array([metric.score([""] * len(texts), [text] * len(texts), texts) for text in texts])


@pytest.mark.parametrize("utility,metric", utilities(), ids=["chrf", "bleu en", "bleu zh"])
def test_the_matrix_is_sacrebleus(utility, metric):
    np.testing.assert_allclose(utility.matrix(TEXTS), looped(metric, TEXTS), atol=1e-9, rtol=0)


words = st.lists(st.sampled_from(["ab", "abc", "b", "ca.", "c,", "a"]), max_size=9).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(words, min_size=1, max_size=8, unique=True))
def test_the_matrix_is_sacrebleus_for_made_up_texts(texts):
    for utility, metric in utilities()[:2]:
        np.testing.assert_allclose(utility.matrix(texts), looped(metric, texts), atol=1e-9, rtol=0)


def test_blocks_change_nothing(monkeypatch):
    whole = [utility.matrix(TEXTS) for utility, _ in utilities()]
    monkeypatch.setattr("rest_jax.metrics.pairwise._CELLS", 50)
    for (utility, _), before in zip(utilities(), whole, strict=True):
        np.testing.assert_array_equal(utility.matrix(TEXTS), before)


def test_any_metric_of_pairs_is_a_utility():
    chrf = SentenceChrf()
    wrapped = PairwiseScore("chrf", lambda texts, against: chrf.score([""] * len(texts), texts, against))
    assert isinstance(wrapped, Utility)
    np.testing.assert_allclose(wrapped.matrix(TEXTS), PairwiseChrf().matrix(TEXTS), atol=1e-9)
    with pytest.raises(errors.DataError, match="'short' gave scores of shape"):
        PairwiseScore("short", lambda texts, against: np.zeros(1)).matrix(["a", "b"])


def test_signatures_are_sacrebleus():
    assert PairwiseChrf().signature() == SentenceChrf().signature().replace("sentence", "pairwise")
    assert PairwiseBleu("zh").signature() == SentenceBleu("zh").signature().replace("sentence", "pairwise")


def test_the_choice_is_that_of_a_direct_loop_over_samples():
    draw = np.random.Generator(np.random.Philox(key=11))
    words = ["red", "blue", "cat", "dog", "sees", "finds"]
    samples = [" ".join(words[k] for k in draw.choice(6, size=draw.integers(1, 4))) for _ in range(40)]
    texts, numbers = distinct(samples)
    assert len(texts) < 40 and [texts[k] for k in numbers] == samples
    matrix, chrf = PairwiseChrf().matrix(texts), SentenceChrf()
    for n in (2, 7, 40):
        chosen = mbr_choices(matrix, numbers, n)
        assert len(chosen) == 40 // n
        for block, row in enumerate(chosen):
            part = samples[block * n : (block + 1) * n]
            means = [
                np.mean(chrf.score([""] * (n - 1), [text] * (n - 1), part[:k] + part[k + 1 :]))
                for k, text in enumerate(part)
            ]
            assert block * n <= row < (block + 1) * n
            assert means[row - block * n] == pytest.approx(max(means), abs=1e-12)


def test_by_hand():
    # b agrees with a and with c; a and c with nothing else.
    matrix = np.array([[1, 0.6, 0.0], [0.6, 1, 0.6], [0.0, 0.6, 1]])
    assert mbr_choices(matrix, np.array([0, 1, 2]), 3).tolist() == [1]
    # Two more copies of c outweigh it: each c has two others of its own.
    assert mbr_choices(matrix, np.array([0, 1, 2, 2, 2]), 5).tolist() == [2]
    # One sample is the only choice; of equals the earliest.
    assert mbr_choices(matrix, np.array([0, 1, 2]), 1).tolist() == [0, 1, 2]
    assert mbr_choices(matrix, np.array([0, 1, 2]), 2).tolist() == [0]


def test_the_utility_is_read_with_the_other_samples_as_references():
    matrix = np.array([[1.0, 0.9, 0.9], [0.1, 1.0, 0.1], [0.2, 0.2, 1.0]])  # rows are hypotheses
    assert mbr_choices(matrix, np.array([2, 1, 0]), 3).tolist() == [2]


def test_a_sample_that_may_not_be_chosen_still_counts_as_a_reference():
    matrix = np.array([[1, 0.6, 0.0], [0.6, 1, 0.6], [0.0, 0.6, 1]])
    eligible = np.array([True, False, True, True])
    assert mbr_choices(matrix, np.array([0, 1, 2, 2]), 4, eligible).tolist() == [2]
    assert mbr_choices(matrix, np.array([0, 1, 2, 2]), 4, np.zeros(4, bool)).tolist() == [0]


def test_bad_input_is_refused():
    with pytest.raises(errors.ConfigError, match="no 4 of 3"):
        mbr_choices(np.eye(3), np.arange(3), 4)
    with pytest.raises(errors.DataError, match="not finite"):
        mbr_choices(np.full((1, 1), np.nan), np.zeros(1, int), 1)
