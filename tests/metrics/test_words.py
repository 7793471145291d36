"""Words in scripts with and without spaces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax.metrics import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat  sat.", ["the", "cat", "sat."]),
        ("我爱你。", ["我", "爱", "你", "。"]),
        ("我有iPhone 15", ["我", "有", "iPhone", "15"]),
        ("すし\u3000だ", ["す", "し", "だ"]),
        ("  ", []),
    ],
)
def test_split_words(text, expected):
    assert words.split_words(text) == expected


@pytest.mark.parametrize("text", ["the cat sat.", "我爱你。", "他说:Tom Jones来了"])
def test_joining_the_words_of_a_tidy_text_gives_it_back(text):
    assert words.join_words(words.split_words(text)) == text


@given(st.text())
def test_joining_loses_nothing_but_spaces(text):
    joined = words.join_words(words.split_words(text))
    assert "".join(joined.split()) == "".join(text.split())
    assert words.split_words(joined) == words.split_words(text)
