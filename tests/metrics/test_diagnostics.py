"""Diagnostics by hand."""

import json

import pytest

from rest_jax import errors
from rest_jax.metrics import diagnostics as d


def test_a_small_corpus_by_hand():
    hypotheses = ["the cat sat", "Guten  tag", "", "a b c d a b c d"]
    references = ["the cat sat down", "good day", "yes", "a b c"]
    sources = ["die Katze", "guten Tag", "ja", "x"]
    result = d.diagnostics(hypotheses, references, sources, truncated=[False, False, False, True])
    assert result == {
        "length_ratio": 13 / 10,
        "copy_rate": 0.25,
        "empty_rate": 0.25,
        "truncated_rate": 0.25,
        "distinct_1": 9 / 13,
        "distinct_2": 7 / 10,
        "repeated_ngram_rate": 0.25,
    }
    assert json.loads(json.dumps(result)) == result


def test_chinese_counts_characters():
    result = d.diagnostics(["我爱你我爱你我爱你"], ["我爱你"], ["I love you"])
    assert result["length_ratio"] == 3.0
    assert result["repeated_ngram_rate"] == 1.0
    assert result["distinct_1"] == pytest.approx(1 / 3)


def test_an_empty_output_is_no_copy_of_an_empty_source():
    assert not d.is_copy("", " ")
    assert d.is_copy("Ja, Klar!", "ja,  klar!")
    assert not d.is_copy("ja", "yes")


def test_nothing_at_all_still_gives_numbers():
    result = d.diagnostics([""], [""], [""])
    assert result["length_ratio"] == 0.0
    assert result["distinct_1"] == result["distinct_2"] == 0.0
    assert d.diagnostics(["too long"], [""], ["x"])["length_ratio"] == 2.0


@pytest.mark.parametrize(
    ("text", "looping"), [("a a a a a", True), ("a b c d e f", False), ("a b c a b c", False)]
)
def test_repeated_ngrams(text, looping):
    assert d.has_repeated_ngram(text.split()) is looping


def test_lengths_must_match():
    with pytest.raises(errors.DataError, match="2 hypotheses, 1 references"):
        d.diagnostics(["a", "b"], ["a"], ["a", "b"])
    with pytest.raises(errors.DataError, match="truncated"):
        d.diagnostics(["a"], ["a"], ["a"], truncated=[True, False])
