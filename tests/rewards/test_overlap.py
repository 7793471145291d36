"""Sentence overlap against sacreBLEU's own sentence scores."""

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.rewards.overlap import SentenceBleu, SentenceChrf
from rest_jax.rewards.protocol import Reward, checked_scores

WORDS = st.sampled_from(["the", "cat", "sat", "on", "a", "mat", ".", "mats"])
SENTENCES = st.lists(WORDS, min_size=1, max_size=8).map(" ".join)
PAIRS = st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(PAIRS)
def test_scores_equal_sacrebleus(pairs):
    hypotheses, references = map(list, zip(*pairs, strict=True))
    chrf = checked_scores(SentenceChrf(), hypotheses, hypotheses, references)
    bleu = checked_scores(SentenceBleu("en"), hypotheses, hypotheses, references)
    for row, (hypothesis, reference) in enumerate(pairs):
        assert chrf[row] == pytest.approx(sacrebleu.sentence_chrf(hypothesis, [reference]).score / 100)
        # sacreBLEU's sentence_bleu takes the effective order, too.
        assert bleu[row] == pytest.approx(sacrebleu.sentence_bleu(hypothesis, [reference]).score / 100)


@pytest.mark.parametrize("reward", [SentenceChrf(), SentenceBleu("en")])
def test_empty_text_scores_nothing_and_an_exact_match_one(reward):
    hypotheses = ["", "  ", "a cat", "", "a cat"]
    references = ["a cat", "a cat", "", "", "a cat"]
    np.testing.assert_array_equal(reward.score(references, hypotheses, references), [0, 0, 0, 0, 1])


@pytest.mark.parametrize("reward", [SentenceChrf(), SentenceBleu("en")])
def test_references_are_needed(reward):
    assert reward.spec.needs_reference
    assert isinstance(reward, Reward)
    with pytest.raises(errors.DataError, match=reward.spec.name):
        reward.score(["a"], ["b"])
    with pytest.raises(errors.DataError, match="references"):
        reward.score(["a"], ["b"], [])


def test_nothing_to_score_gives_no_scores():
    assert SentenceChrf().score([], [], []).shape == (0,)


def test_signatures_are_there_before_anything_is_scored():
    version = sacrebleu.__version__
    assert SentenceChrf().signature() == (
        f"sentence_chrf|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{version}"
    )
    assert SentenceBleu("de").signature() == (
        f"sentence_bleu|nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:{version}"
    )
    scored = SentenceChrf()
    scored.score(["a"], ["b"], ["c"])
    assert scored.signature() == SentenceChrf().signature()


def test_bleu_cuts_chinese_into_characters():
    assert "tok:zh" in SentenceBleu("zh").signature()
    hypothesis, reference = "我今天去北京", "我今天去上海"
    score = SentenceBleu("zh").score(["x"], [hypothesis], [reference])[0]
    assert score == pytest.approx(sacrebleu.sentence_bleu(hypothesis, [reference], tokenize="zh").score / 100)
    assert score > 0.3


def test_bleu_wants_a_language():
    with pytest.raises(errors.ConfigError, match="target language"):
        SentenceBleu("")
