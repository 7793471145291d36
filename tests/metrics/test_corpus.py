"""Corpus metrics against sacreBLEU itself."""

import importlib.util
import json

import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from rest_jax import errors
from rest_jax.metrics import corpus

SENTENCE = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", ".", "a"]), max_size=9).map(" ".join)
PAIRS = st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=12)


def _corpus(sentences=150, seed=0):
    """Noisy copies of random sentences, so that scores lie in the middle."""
    generator = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(60)]
    references = [" ".join(generator.choice(words, size=generator.integers(4, 15))) for _ in range(sentences)]
    hypotheses = []
    for text in references:
        kept = [w if generator.random() < 0.8 else str(generator.choice(words)) for w in text.split()]
        hypotheses.append(" ".join(kept[: len(kept) - int(generator.integers(0, 2))]))
    return hypotheses, references


@settings(max_examples=80, deadline=None)
@given(PAIRS)
@example([("cat", "cat")])  # no 4-grams at all: BLEU is 0
@example([("the cat sat on", "on sat cat the")])  # smoothed orders only above the first
@example([("", "cat")])
def test_point_estimates_equal_sacrebleus(pairs):
    hypotheses, references = map(list, zip(*pairs, strict=True))
    result = corpus.corpus_metrics(hypotheses, references, "en", seed=0, resamples=3)
    bleu = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="13a").score
    assert result["bleu"]["mean"] == pytest.approx(bleu, abs=1e-9)
    chrf = sacrebleu.corpus_chrf(hypotheses, [references]).score
    assert result["chrf"]["mean"] == pytest.approx(chrf, abs=1e-9)


@pytest.mark.parametrize("metric", [BLEU(tokenize="13a", force=True), CHRF()])
def test_every_resample_scores_as_sacrebleu_would_score_that_corpus(metric):
    hypotheses, references = _corpus(30)
    formula = corpus.bleu_from_statistics if isinstance(metric, BLEU) else corpus.chrf_from_statistics
    statistics = corpus.segment_statistics(metric, hypotheses, references)
    generator = np.random.default_rng(3)
    for _ in range(5):
        rows = generator.integers(30, size=30)
        expected = metric.corpus_score([hypotheses[i] for i in rows], [[references[i] for i in rows]]).score
        assert formula(statistics[rows].sum(axis=0, keepdims=True))[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU(tokenize="13a")), ("chrf", CHRF())])
def test_intervals_are_about_sacrebleus(name, metric):
    hypotheses, references = _corpus()
    theirs = metric.corpus_score(hypotheses, [references], n_bootstrap=1000)
    low, high = corpus.corpus_metrics(hypotheses, references, "en", seed=1)[name]["ci95"]
    assert low < theirs.score < high
    assert (high - low) / 2 == pytest.approx(float(theirs._ci), rel=0.15)
    assert (high + low) / 2 == pytest.approx(float(theirs._mean), abs=0.2 * float(theirs._ci))


def test_signatures_are_sacrebleus_with_the_bootstrap_beside():
    result = corpus.corpus_metrics(["a b c d"], ["a b c d"], "de", seed=9, resamples=20)
    assert result["bleu"]["signature"] == (
        f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}|bs:20|seed:9|unit:row"
    )
    assert result["chrf"]["signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_chinese_is_cut_into_characters():
    hypotheses, references = ["我今天去北京吃饭"], ["我今天去上海吃饭"]
    result = corpus.corpus_metrics(hypotheses, references, "zh", seed=0, resamples=5)
    assert "tok:zh" in result["bleu"]["signature"]
    assert result["bleu"]["mean"] == pytest.approx(
        sacrebleu.corpus_bleu(hypotheses, [references], tokenize="zh").score
    )
    assert result["bleu"]["mean"] > 20


@pytest.mark.parametrize("language", ["zh", "zh-CN", "ZH_tw", "ja"])
@pytest.mark.parametrize("tokenizer", ["13a", "intl", "none"])
def test_tokenizers_blind_to_unspaced_words_are_refused(language, tokenizer):
    with pytest.raises(errors.ConfigError, match="does not see the words"):
        corpus.bleu_tokenizer(language, tokenizer)


def test_tokenizer_of_each_language():
    assert corpus.bleu_tokenizer("de") == corpus.bleu_tokenizer("en-GB") == "13a"
    assert corpus.bleu_tokenizer("zh") == "zh"
    assert corpus.bleu_tokenizer("zh", "char") == "char"
    has_mecab = importlib.util.find_spec("MeCab") is not None
    assert corpus.bleu_tokenizer("ja") == ("ja-mecab" if has_mecab else "char")
    with pytest.raises(errors.ConfigError, match="target language"):
        corpus.bleu_tokenizer("")


def test_samples_of_a_source_are_resampled_together():
    hypotheses, references = _corpus(60)
    once = corpus.corpus_metrics(hypotheses, references, "en", seed=0)
    groups = np.repeat(np.arange(60), 3)
    thrice = [[text for text in texts for _ in range(3)] for texts in (hypotheses, references)]
    clustered = corpus.corpus_metrics(*thrice, "en", seed=0, groups=groups)
    for name in ("bleu", "chrf"):
        assert clustered[name]["ci95"] == pytest.approx(once[name]["ci95"])
        assert clustered[name]["signature"].endswith("unit:source")


def test_perfect_and_empty_output():
    texts = ["the cat sat on the mat", "a dog came in"]
    perfect = corpus.corpus_metrics(texts, texts, "en", seed=0, resamples=50)
    assert perfect["bleu"]["ci95"] == pytest.approx([100.0, 100.0])
    assert perfect["chrf"]["ci95"] == pytest.approx([100.0, 100.0])
    empty = corpus.corpus_metrics(["", ""], texts, "en", seed=0, resamples=50)
    assert empty["bleu"]["mean"] == empty["chrf"]["mean"] == 0.0
    assert empty["chrf"]["ci95"] == [0.0, 0.0]


@pytest.mark.parametrize(("left", "right"), [([], []), (["a"], []), (["a", "b"], ["a"])])
def test_lists_that_do_not_match_are_data_errors(left, right):
    with pytest.raises(errors.DataError, match="hypotheses"):
        corpus.corpus_metrics(left, right, "en", seed=0)
