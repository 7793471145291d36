from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import errors
from rest_jax.data.vocabulary import Vocabulary, VocabularyConfig, clean, train_vocabulary

SYLLABLES = [
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "hal",
    "jem",
    "kin",
    "lor",
    "mu",
    "nat",
    "pes",
    "qui",
    "rob",
    "sut",
    "tav",
    "wex",
    "yor",
    "zan",
    "dog",
    "cat",
]


def sentences(count: int = 400) -> list[str]:
    rng = random.Random(5)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(150)] + ["the", "old", "dog"]
    return [" ".join(rng.choices(words, k=rng.randint(3, 9))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("vocab") / "spm.model"
    return train_vocabulary(sentences(), VocabularyConfig(size=320), path)


def test_special_ids_size_and_digest(vocabulary: Vocabulary):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary.path))
    ids = processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()
    assert ids == (0, 1, 2, -1)
    assert vocabulary.size == processor.get_piece_size() == 320
    assert vocabulary.digest == hashlib.sha256(vocabulary.path.read_bytes()).hexdigest()


def test_file_gives_the_same_vocabulary(vocabulary: Vocabulary):
    again = Vocabulary.from_file(vocabulary.path)
    assert (again.size, again.digest) == (vocabulary.size, vocabulary.digest)
    assert again.encode("the old dog") == vocabulary.encode("the old dog")


def test_training_is_deterministic_whatever_the_cores(vocabulary: Vocabulary, tmp_path: Path):
    again = train_vocabulary(iter(sentences()), VocabularyConfig(size=320), tmp_path / "again.model")
    assert again.digest == vocabulary.digest
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from tests.data.test_vocabulary import *\n"
        f"print(train_vocabulary(sentences(), VocabularyConfig(size=320), {str(tmp_path / 'one')!r}).digest)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip() == vocabulary.digest


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips_and_has_no_unknown(vocabulary: Vocabulary, text: str):
    ids = vocabulary.encode(text)
    assert 2 not in ids and 1 not in ids and 0 not in ids
    assert vocabulary.round_trips(text)
    decoded = vocabulary.decode(ids)
    assert len(decoded.splitlines()) <= 1 and "\t" not in decoded


def test_round_trip_tells_a_lossy_vocabulary(tmp_path: Path):
    config = VocabularyConfig(size=60, byte_fallback=False)
    without_bytes = train_vocabulary(sentences(), config, tmp_path / "spm.model")
    assert without_bytes.round_trips("the dog sut.")
    assert not without_bytes.round_trips("the 狗 sut.")
    assert 2 in without_bytes.encode("狗")


def test_normalisation_is_nfkc_unless_asked_otherwise(vocabulary: Vocabulary, tmp_path: Path):
    assert vocabulary.decode(vocabulary.encode("ｄｏｇ，  cat")) == "dog, cat"
    config = VocabularyConfig(size=320, normalization="identity")
    identity = train_vocabulary(sentences(), config, tmp_path / "spm.model")
    assert identity.decode(identity.encode("ｄｏｇ，cat")) == "ｄｏｇ，cat"


def test_newlines_and_literal_markers_are_text(vocabulary: Vocabulary):
    assert vocabulary.encode("old\ndog\r\n") == vocabulary.encode("old dog")
    assert vocabulary.decode(vocabulary.encode("the </s> dog")) == "the </s> dog"
    newline = vocabulary._processor.piece_to_id("<0x0A>")
    assert vocabulary.decode([*vocabulary.encode("dog"), newline, *vocabulary.encode("cat")]) == "dog  cat"
    assert clean("a\x85b\u2028c") == "a b c"


def test_decode_stops_at_eos_drops_padding_and_survives_foreign_ids(vocabulary: Vocabulary):
    dog, cat = vocabulary.encode("dog"), vocabulary.encode("cat")
    assert vocabulary.decode([0, *dog, 1, *cat]) == "dog"
    assert vocabulary.decode([*dog, 0, 0]) == "dog"
    assert vocabulary.decode([]) == vocabulary.decode([1, 5]) == ""
    assert vocabulary.decode([vocabulary.size + 7, *dog]) == vocabulary.decode([2, *dog])
    assert vocabulary.decode_batch([dog, [1], cat]) == ["dog", "", "cat"]
    assert vocabulary.decode_batch([]) == []


def test_batch_encoding_equals_single(vocabulary: Vocabulary):
    texts = [*sentences(50), "", "狗 und Katze\n"]
    assert vocabulary.encode_batch(texts) == [vocabulary.encode(text) for text in texts]
    assert vocabulary.encode_batch([]) == []


def test_too_small_a_corpus_names_the_largest_size_that_works(tmp_path: Path):
    with pytest.raises(errors.DataError, match=r"the largest that works is (\d+)") as caught:
        train_vocabulary(sentences(30), VocabularyConfig(size=5000), tmp_path / "spm.model")
    largest = int(str(caught.value).split("works is ")[1].split(".")[0])
    assert train_vocabulary(sentences(30), VocabularyConfig(size=largest), tmp_path / "fits").size == largest
    with pytest.raises(errors.DataError, match=f"the largest that works is {largest}"):
        train_vocabulary(sentences(30), VocabularyConfig(size=largest + 1), tmp_path / "spm.model")
    assert not (tmp_path / "spm.model").exists()


def test_too_small_a_size_is_a_configuration_error(tmp_path: Path):
    with pytest.raises(errors.ConfigError, match="does not hold the"):
        train_vocabulary(sentences(), VocabularyConfig(size=100), tmp_path / "spm.model")


@pytest.mark.parametrize("lines", [[], ["", "  \n"]])
def test_no_text_is_an_error(tmp_path: Path, lines: list[str]):
    with pytest.raises(errors.DataError, match="0 lines of text"):
        train_vocabulary(lines, VocabularyConfig(), tmp_path / "spm.model")


def test_max_lines_bounds_what_is_learnt_from_and_draws_from_all(tmp_path: Path):
    lines = sentences(300) + [line.upper() for line in sentences(300)]
    config = VocabularyConfig(size=330, max_lines=100)
    drawn = train_vocabulary(lines, config, tmp_path / "drawn")
    characters = set("".join(drawn._processor.id_to_piece(list(range(3 + 256, drawn.size)))))
    assert {"b", "B"} <= characters
    assert drawn.digest != train_vocabulary(lines[:100], config, tmp_path / "first").digest
    assert train_vocabulary(iter(lines), config, tmp_path / "again").digest == drawn.digest


def test_missing_damaged_and_foreign_models(tmp_path: Path):
    with pytest.raises(errors.MissingInputError, match="no vocabulary .*nowhere.model"):
        Vocabulary.from_file(tmp_path / "nowhere.model")
    with pytest.raises(errors.MissingInputError):
        Vocabulary.from_file(tmp_path)
    for damaged in (b"", b"this is no model", sentences()[0].encode() * 50):
        (tmp_path / "bad.model").write_bytes(damaged)
        with pytest.raises(errors.IntegrityError, match="bad.model is not a SentencePiece model"):
            Vocabulary.from_file(tmp_path / "bad.model")


def test_truncated_model_is_found(vocabulary: Vocabulary, tmp_path: Path):
    (tmp_path / "half.model").write_bytes(vocabulary.path.read_bytes()[:1000])
    with pytest.raises(errors.IntegrityError, match="half.model"):
        Vocabulary.from_file(tmp_path / "half.model")


def test_other_special_ids_are_refused(tmp_path: Path):
    prefix = str(tmp_path / "default")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_prefix=prefix, vocab_size=60, minloglevel=2
    )
    with pytest.raises(errors.ConfigError, match="pad, eos and unk"):
        Vocabulary.from_file(prefix + ".model")


@pytest.mark.parametrize(
    "field",
    [
        {"size": 3},
        {"model_type": "wordpiece"},
        {"character_coverage": 0.97},
        {"character_coverage": 1.5},
        {"normalization": "nfd"},
        {"max_lines": 0},
        {"seed": -1},
    ],
)
def test_configuration_is_checked(field: dict):
    with pytest.raises(errors.ConfigError, match=next(iter(field))):
        VocabularyConfig(**field)
