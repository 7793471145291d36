"""Corruptions: what each does, that it does something, and that it can be had again."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax.metrics.words import split_words
from rest_jax.rewards.corruptions import Corruption, corrupt

TEXT = st.lists(st.sampled_from(["the", "cat", "sat", "我", "爱", "ok."]), max_size=8).map(" ".join)
SOURCE = "die Katze saß auf der Matte"
ENGLISH = "the cat sat on the mat today."
CHINESE = "我今天去北京吃饭。"


@given(st.sampled_from(list(Corruption)), TEXT, TEXT, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_corruption_differs_from_its_original_and_is_drawn_again(kind, source, text, seed, number):
    damaged = corrupt(kind, source, text, seed, number)
    assert damaged == corrupt(kind.value, source, text, seed, number)
    if damaged is not None:
        assert split_words(damaged) != split_words(text)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
@pytest.mark.parametrize("number", range(20))
def test_permuted_has_the_same_words(text, number):
    damaged = corrupt("permuted", SOURCE, text, 0, number)
    assert Counter(split_words(damaged)) == Counter(split_words(text))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
@pytest.mark.parametrize("number", range(20))
def test_truncated_is_a_prefix_of_at_most_two_thirds(text, number):
    damaged = corrupt("truncated", SOURCE, text, 0, number)
    assert damaged
    assert text.startswith(damaged)
    assert 3 * len(split_words(damaged)) <= 2 * len(split_words(text))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
@pytest.mark.parametrize("number", range(20))
def test_repeated_says_everything_and_something_again(text, number):
    words, damaged = split_words(text), split_words(corrupt("repeated", SOURCE, text, 0, number))
    assert len(damaged) > len(words)
    assert set(damaged) == set(words)
    # Leaving out one stretch gives the original back.
    extra = len(damaged) - len(words)
    assert any(damaged[:i] + damaged[i + extra :] == words for i in range(len(words) + 1))


def test_whole_sentences_and_phrases_are_both_repeated():
    found = [corrupt("repeated", SOURCE, ENGLISH, 0, number) for number in range(40)]
    doubled = found.count(f"{ENGLISH} {ENGLISH}")
    assert 10 <= doubled <= 30


def test_copied_and_empty():
    assert corrupt("copied", SOURCE, ENGLISH, 0, 1) == SOURCE
    assert corrupt("empty", SOURCE, ENGLISH, 0, 1) == ""


@pytest.mark.parametrize(
    ("kind", "source", "text"),
    [
        ("permuted", SOURCE, "Stop!"),
        ("permuted", SOURCE, "no no no"),
        ("truncated", SOURCE, "Stop!"),
        ("copied", "Tom  Jones", "Tom Jones"),
        ("copied", " ", "Tom"),
        ("empty", SOURCE, "  "),
        ("permuted", SOURCE, ""),
        ("repeated", SOURCE, ""),
        ("truncated", SOURCE, ""),
    ],
)
def test_what_cannot_be_damaged_gives_none(kind, source, text):
    assert corrupt(kind, source, text, 0, 0) is None


def test_one_word_can_be_repeated_and_two_can_be_permuted():
    assert corrupt("repeated", SOURCE, "Stop!", 0, 0) == "Stop! Stop!"
    assert {corrupt("permuted", SOURCE, "come here", 0, i) for i in range(8)} == {"here come"}


def test_seed_example_and_variant_each_move_the_draw():
    base = [corrupt("permuted", SOURCE, ENGLISH, 0, i) for i in range(30)]
    for other in (
        [corrupt("permuted", SOURCE, ENGLISH, 1, i) for i in range(30)],
        [corrupt("permuted", SOURCE, ENGLISH, 0, i + 30) for i in range(30)],
        [corrupt("permuted", SOURCE, ENGLISH, 0, i, variant=1) for i in range(30)],
    ):
        assert sum(a != b for a, b in zip(base, other, strict=True)) > 20


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="burnt"):
        corrupt("burnt", SOURCE, ENGLISH, 0, 0)
