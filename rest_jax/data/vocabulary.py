"""SentencePiece vocabularies, trained here and shared by source and target as T5's embedding is.

Floor 3. No TensorFlow: seqio reads the same model file in `tasks.py`, and gives the same ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from rest_jax import errors, files
from rest_jax.types import EOS_ID, PAD_ID, UNK_ID

# Expectations are summed thread by thread in a fixed order, so the bytes of a model depend on the number of
# threads and not on the number of cores. Never take it from the machine.
_THREADS = 4
# SentencePiece passes over longer sentences without a word; its own default is 4192 bytes.
_MAX_LINE_BYTES = 1 << 16
_SMALLEST_SIZE = 8
_MODEL_TYPES = ("unigram", "bpe", "char", "word")
_NORMALIZATIONS = ("nfkc", "nmt_nfkc", "identity")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclasses.dataclass(frozen=True)
class VocabularyConfig:
    """Which vocabulary a run uses: one that exists, or one to be trained on the corpus.

    Attributes:
      path: an existing SentencePiece model (pad 0, eos 1, unk 2); None trains one. The other fields are
        for training and are not read when a path is given.
      size: number of pieces, with the 256 byte pieces and the 3 special ones in it.
      model_type: "unigram" (T5's), "bpe", "char" or "word".
      byte_fallback: spell unknown characters as UTF-8 bytes, so that no text becomes `<unk>`.
      character_coverage: share of the characters of the training text that get a piece of their own, 0.98
        to 1. A language of many characters (Chinese, Japanese) leaves more room for words with a lower one.
      normalization: "nfkc" makes full-width and other compatible characters one, "nmt_nfkc" also drops
        invisible ones, "identity" keeps text as it is. Take "identity" where the target has full-width
        punctuation that the metric should see.
      max_lines: train on at most this many lines, drawn from all that are offered; bounds the memory.
      seed: of that draw.
    """

    path: str | None = None
    size: int = 4096
    model_type: str = "unigram"
    byte_fallback: bool = True
    character_coverage: float = 0.9995
    normalization: str = "nfkc"
    max_lines: int = 1_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.size >= _SMALLEST_SIZE, f"size = {self.size}", f"Give at least {_SMALLEST_SIZE} pieces"),
            (
                self.model_type in _MODEL_TYPES,
                f"model_type = {self.model_type!r}",
                f"Choose one of {', '.join(_MODEL_TYPES)}",
            ),
            (
                self.normalization in _NORMALIZATIONS,
                f"normalization = {self.normalization!r}",
                f"Choose one of {', '.join(_NORMALIZATIONS)}",
            ),
            (
                0.98 <= self.character_coverage <= 1.0,
                f"character_coverage = {self.character_coverage}",
                "Give a share from 0.98 to 1; 0.9995 is usual",
            ),
            (self.max_lines >= 1, f"max_lines = {self.max_lines}", "Give at least 1"),
            (self.seed >= 0, f"seed = {self.seed}", "Give a seed of 0 or more"),
        )
        for holds, what, remedy in checks:
            if not holds:
                raise errors.ConfigError(f"VocabularyConfig.{what} is not allowed", remedy=remedy)


def train_vocabulary(
    lines: Iterable[str], config: VocabularyConfig, output_path: str | os.PathLike[str]
) -> Vocabulary:
    """Trains a SentencePiece model and writes it atomically; equal lines in equal order give equal bytes.

    Args:
      lines: training text, sources and targets alike; read once, one line at a time.
      config: size and kind of the vocabulary.
      output_path: the model file to write.

    Raises:
      DataError: there is no text, or too little for a vocabulary of this size.
      ConfigError: the size does not hold the characters of the text.
      OutputError: the file cannot be written.
    """
    model = io.BytesIO()
    text = (line for line in map(clean, _draw(lines, config.max_lines, config.seed)) if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=model,
            vocab_size=config.size,
            model_type=config.model_type,
            byte_fallback=config.byte_fallback,
            character_coverage=config.character_coverage,
            normalization_rule_name=config.normalization,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            num_threads=_THREADS,
            shuffle_input_sentence=False,
            max_sentence_length=_MAX_LINE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), config) from error
    with files.atomic_path(output_path) as temporary:
        temporary.write_bytes(model.getvalue())
    return Vocabulary(model.getvalue(), Path(output_path))


def _training_error(message: str, config: VocabularyConfig) -> errors.RestError:
    """What SentencePiece's message means for the user."""
    if too_large := re.search(r"value <= (\d+)", message):
        return errors.DataError(
            f"the training text is too small for a vocabulary of {config.size} pieces; "
            f"the largest that works is {too_large[1]}",
            remedy=f"Set VocabularyConfig.size to {too_large[1]} or less, or give more text",
        )
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return errors.ConfigError(
            f"a vocabulary of {config.size} pieces does not hold the {too_small[1]} single characters and "
            "bytes that it needs",
            remedy=f"Set VocabularyConfig.size above {too_small[1]}, or lower character_coverage",
        )
    if "sentences_.empty()" in message:
        return errors.DataError("0 lines of text to train a vocabulary on", remedy="Check the corpus")
    return errors.DataError(f"SentencePiece could not train a vocabulary: {message}")


def _draw(lines: Iterable[str], limit: int, seed: int) -> list[str]:
    """At most `limit` of the lines, each with the same chance (reservoir sampling), in a fixed order."""
    random = np.random.Generator(np.random.Philox(key=seed))
    kept: list[str] = []
    for count, line in enumerate(lines):
        if count < limit:
            kept.append(line)
        elif (place := int(random.integers(count + 1))) < limit:
            kept[place] = line
    return kept


def clean(text: str) -> str:
    """The text on one line: control characters and Unicode's line separators become spaces."""
    return _CONTROL.sub(" ", text)


class Vocabulary:
    """A SentencePiece model: text to ids and back, without EOS.

    Attributes:
      path: the file it was read from.
      size: number of pieces; ids are below it.
      digest: SHA-256 of the model file, part of the identity of all that is tokenised with it.
    """

    def __init__(self, model: bytes, path: Path):
        try:
            if not model:  # which SentencePiece takes without complaint
                raise RuntimeError("it is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise errors.IntegrityError(
                f"{path} is not a SentencePiece model", remedy="Give another file, or train a vocabulary anew"
            ) from error
        self.path = path
        self.size: int = self._processor.get_piece_size()
        self.digest = hashlib.sha256(model).hexdigest()
        found = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if found != (PAD_ID, EOS_ID, UNK_ID):
            raise errors.ConfigError(
                f"{path} has pad, eos and unk at {found}, not at {(PAD_ID, EOS_ID, UNK_ID)} as T5's have",
                remedy="Train it with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1",
            )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Reads a model file.

        Raises:
          MissingInputError: there is no such file.
          IntegrityError: it is not a SentencePiece model.
          ConfigError: its special ids are not T5's.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise errors.MissingInputError(
                f"no vocabulary {path}: {error.strerror}",
                remedy="Train one with the vocab verb, or set VocabularyConfig.path",
            ) from error
        return cls(model, Path(path))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without EOS; line breaks count as spaces."""
        return self._processor.encode(clean(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without EOS."""
        return self._processor.encode([clean(text) for text in texts]) if texts else []

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids up to the first EOS, on one line; padding is left out.

        Ids at or above `size` (an embedding is often larger than its vocabulary) count as unknown.
        """
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """Text of each row of ids, as `decode` gives it."""
        if not len(rows):
            return []
        return [clean(text).strip() for text in self._processor.decode([self._to_text_ids(r) for r in rows])]

    def _to_text_ids(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        row = np.asarray(ids, np.int64)
        ends = np.flatnonzero(row == EOS_ID)
        if len(ends):
            row = row[: ends[0]]
        row = row[row != PAD_ID]
        return np.where((row < 0) | (row >= self.size), UNK_ID, row).tolist()

    def normalize(self, text: str) -> str:
        """The text as the model sees it: one line, normal form, single spaces."""
        return self._processor.normalize(clean(text)).replace("\u2581", " ").strip()

    def round_trips(self, text: str) -> bool:
        """Whether decoding the ids of a text gives its normalised form back."""
        return self.decode(self.encode(text)) == self.normalize(text)
