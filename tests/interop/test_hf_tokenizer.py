from __future__ import annotations

import json

import pytest
import sentencepiece

from rest_jax import errors
from rest_jax.interop import hf_tokenizer
from tests.interop.conftest import CORPUS, train_vocabulary

TEXTS = [
    *CORPUS, "", " ", "  two  spaces ", "a\tb", "😀 smile 👩\u200d👩\u200d👧", "Ａｂｃ１２３", "e\u0301 é ﬁ",
    "zero\u200bwidth", "𠮷野家", "全角\u3000空白", "▁under▁", "a▁ b", "नमस्ते العربية", "x\u00a0y",
    "Grüße an die Straße!", "龘靐齉", "🇩🇪",
]  # fmt: skip


def _vocabularies():
    for model_type in ("unigram", "bpe"):
        for byte_fallback in (True, False):
            yield pytest.param(
                model_type, byte_fallback, "nmt_nfkc", id=f"{model_type}-bytes={byte_fallback}"
            )
    yield pytest.param("unigram", True, "identity", id="unigram-identity")


@pytest.mark.parametrize(("model_type", "byte_fallback", "normalisation"), _vocabularies())
def test_auto_tokenizer_gives_sentencepiece_ids(tmp_path, model_type, byte_fallback, normalisation):
    transformers = pytest.importorskip("transformers")
    model = train_vocabulary(
        tmp_path / "spm", model_type, byte_fallback, normalization_rule_name=normalisation
    )
    folder = tmp_path / "export"
    hf_tokenizer.write_tokenizer(model, folder, max_source_length=16)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*ours.encode(text), 1], text
    assert len(tokenizer) == ours.get_piece_size()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 16


def test_decoding_is_sentencepieces(tmp_path, vocabulary_file):
    transformers = pytest.importorskip("transformers")
    hf_tokenizer.write_tokenizer(vocabulary_file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary_file))
    for text in TEXTS:
        ids = ours.encode(text)
        assert tokenizer.decode([*ids, 1, 0, 0], skip_special_tokens=True) == ours.decode(ids), text


def test_batch_is_padded_on_the_right_with_a_mask(tmp_path, vocabulary_file):
    transformers = pytest.importorskip("transformers")
    hf_tokenizer.write_tokenizer(vocabulary_file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    batch = tokenizer(["我们明天去北京。", "We"], padding=True)
    short = len(tokenizer("We").input_ids)
    assert batch.input_ids[1][short - 1] == 1
    assert set(batch.input_ids[1][short:]) == {0}
    assert sum(batch.attention_mask[1]) == short
    assert "token_type_ids" not in batch


def test_t5_tokenizer_agrees_inside_the_vocabulary(tmp_path, vocabulary_file):
    # The class itself, not AutoTokenizer: transformers 5 builds it without byte fallback.
    transformers = pytest.importorskip("transformers")
    hf_tokenizer.write_tokenizer(vocabulary_file, tmp_path)
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary_file))
    known = [text for text in CORPUS if not any(ours.is_byte(i) for i in ours.encode(text))]
    assert len(known) >= 4
    for text in known:
        assert tokenizer(text).input_ids == [*ours.encode(text), 1]
    assert len(tokenizer) == ours.get_piece_size()


def test_model_file_is_copied_byte_for_byte(tmp_path, vocabulary_file):
    hf_tokenizer.write_tokenizer(vocabulary_file, tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == vocabulary_file.read_bytes()


def test_missing_vocabulary(tmp_path):
    with pytest.raises(errors.MissingInputError, match="no vocabulary"):
        hf_tokenizer.write_tokenizer(tmp_path / "none.model", tmp_path)


def test_not_a_vocabulary(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"\xff\xff\xff not a protocol buffer")
    with pytest.raises(errors.IntegrityError, match="not a SentencePiece model"):
        hf_tokenizer.write_tokenizer(tmp_path / "bad.model", tmp_path)


def test_vocabulary_with_other_special_ids(tmp_path):
    model = train_vocabulary(tmp_path / "bos", bos_id=3)
    with pytest.raises(errors.ConfigError, match="BOS 3"):
        hf_tokenizer.write_tokenizer(model, tmp_path / "out")


def test_word_vocabulary_is_refused(tmp_path):
    model = train_vocabulary(tmp_path / "word", "word", byte_fallback=False)
    with pytest.raises(errors.ConfigError, match="words or characters"):
        hf_tokenizer.write_tokenizer(model, tmp_path / "out")
