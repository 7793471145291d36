from __future__ import annotations

import re
import shutil

import pytest

from rest_jax import errors, files
from rest_jax.data import corpora
from rest_jax.phases import vocab
from rest_jax.phases.workspace import SPLITS
from tests import tiny
from tests.phases import places


@pytest.fixture
def corpus(tmp_path):
    return tiny.write_corpus(tmp_path / "pairs.tsv")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run after the vocab phase."""
    folder = tmp_path_factory.mktemp("vocab")
    tiny.write_corpus(folder / "pairs.tsv")
    place = places.workspace(folder)
    vocab.prepare_text(place)
    return place


def test_every_split_is_tokenised_with_the_ids_of_the_corpus(made):
    rows = made.experiment.corpus.load()
    corpora.check_disjoint(rows)
    for split in SPLITS:
        examples = made.split(split)
        given = {row[0]: tuple(row[1:]) for row in rows[split]}
        assert given == {
            i: (s, t)
            for i, s, t in zip(examples.ids.tolist(), examples.sources, examples.targets, strict=True)
        }
    assert [len(made.split(split)) for split in SPLITS] == [472, 80, 24, 24]


def test_tokens_end_with_eos_and_are_those_of_the_vocabulary(made):
    examples = made.split("valid")
    for row in range(len(examples)):
        for text, tokens in (
            (examples.sources[row], examples.tokens.sources[row]),
            (examples.targets[row], examples.tokens.targets[row]),
        ):
            assert tokens.tolist() == [*made.vocabulary.encode(text), 1]
            assert made.vocabulary.decode(tokens.tolist()) == text


def test_the_seal_counts_what_was_read(made):
    facts = files.read_seal(made.text_folder).facts
    assert facts["rows"]["lines_train"] == 600
    assert {split: facts[split]["pairs"] for split in SPLITS} == {
        "train": 472, "rater": 80, "valid": 24, "test": 24,
    }  # fmt: skip
    assert facts["train"]["too_long"] == facts["train"]["cut_sources"] == 0
    assert facts["train"]["source_tokens"] == made.split("train").tokens.sources.lengths.sum()


def test_the_vocabulary_is_trained_on_the_training_side_alone(tmp_path):
    """A letter that only the test split has gets no piece of its own."""
    rows = tiny.pairs(200)
    for name, pairs in (("pairs", rows[:190]), ("valid", rows[190:]), ("test", [("ж ж", "ж"), ("жж", "жж")])):
        text = "".join(f"{source}\t{target}\n" for source, target in pairs)
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    place = places.workspace(
        tmp_path,
        f'TsvCorpus.valid="{tmp_path}/valid.tsv"',
        f'TsvCorpus.test="{tmp_path}/test.tsv"',
        "TsvCorpus.rater_size=0",
        'RewardModelConfig.kind="chrf"',
    )
    vocab.prepare_text(place)
    assert len(place.vocabulary.encode("ж")) > 1  # spelled in bytes
    assert place.vocabulary.decode(place.vocabulary.encode("ж")) == "ж"


def test_a_vocabulary_that_is_given_is_used_as_it_is(made, tmp_path, corpus):
    shutil.copy(made.vocabulary_file, tmp_path / "spm.model")
    place = places.workspace(tmp_path, f'VocabularyConfig.path="{tmp_path}/spm.model"')
    vocab.prepare_text(place)
    assert place.vocabulary.digest == made.vocabulary.digest


def test_a_given_vocabulary_that_is_missing_is_named(tmp_path, corpus):
    place = places.workspace(tmp_path, f'VocabularyConfig.path="{tmp_path}/none.model"')
    with pytest.raises(errors.MissingInputError, match=r"no vocabulary .*none.model .*or None to train one"):
        vocab.prepare_text(place)


def test_a_network_too_small_for_its_vocabulary_is_refused(tmp_path, corpus):
    place = places.workspace(tmp_path, "T5Config.vocab_size=300")
    with pytest.raises(errors.ConfigError, match="360 pieces .*at least 360"):
        vocab.prepare_text(place)
    assert files.read_seal(place.vocabulary_folder) is None


def test_a_corpus_that_changed_since_is_refused_and_one_that_is_gone_is_no_matter(tmp_path, corpus):
    place = places.workspace(tmp_path)
    vocab.prepare_text(place)
    text = corpus.read_text()
    corpus.write_text(text + "one more\tnoch eins\n")
    with pytest.raises(errors.ConfigError, match=f"{re.escape(str(corpus))} has changed .*new MODEL_DIR"):
        vocab.prepare_text(place)
    corpus.write_text(text)
    vocab.prepare_text(place)
    corpus.unlink()
    vocab.prepare_text(place)
