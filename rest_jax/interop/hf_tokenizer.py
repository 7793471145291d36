"""Writes a SentencePiece vocabulary as the tokenizer files of Hugging Face transformers.

Floor 7. Three files that agree:
  `spiece.model`           the SentencePiece model itself, unchanged: us, and transformers 4's `T5Tokenizer`.
  `tokenizer.json`         the same model for the tokenizers library: `AutoTokenizer` of transformers 4 and 5.
  `tokenizer_config.json`  names `PreTrainedTokenizerFast`, because the `T5Tokenizer` of transformers 5 builds
                           its own model with byte fallback off, and would read unknown characters as `<unk>`.
No extra ids are added: ids are SentencePiece's, and an encoded text ends with EOS.
"""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

from rest_jax import errors, files
from rest_jax.types import EOS_ID, PAD_ID, UNK_ID

SPIECE_NAME = "spiece.model"

_SPACE = "▁"  # SentencePiece's visible space
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # SentencePiece.Type


def write_tokenizer(vocabulary_file: Path, folder: Path, max_source_length: int | None = None) -> None:
    """Writes the tokenizer files into a folder.

    Args:
      vocabulary_file: a SentencePiece model with padding 0, EOS 1, unknown 2 and no BOS.
      folder: where to write.
      max_source_length: tokens of a source, with EOS, at which transformers cuts if asked to truncate.

    Raises:
      MissingInputError: there is no such vocabulary.
      ConfigError: its special ids are not T5's, or its kind has no counterpart in the tokenizers library.
    """
    model = read_model(vocabulary_file)
    special = {name: model.pieces[index].piece for name, index in _special_ids().items()}
    with files.atomic_path(folder / SPIECE_NAME) as temporary:
        shutil.copyfile(vocabulary_file, temporary)
    files.write_json(folder / "tokenizer.json", tokenizer_json(model))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "extra_ids": 0,
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "padding_side": "right",
        # Without it the fast class adds token_type_ids, which T5's generate() refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if max_source_length is not None:
        settings["model_max_length"] = max_source_length
    files.write_json(folder / "tokenizer_config.json", settings)
    files.write_json(folder / "special_tokens_map.json", special)


def _special_ids() -> dict[str, int]:
    return {"pad_token": PAD_ID, "eos_token": EOS_ID, "unk_token": UNK_ID}


def read_model(path: Path) -> Any:
    """Parses a SentencePiece model into its protocol buffer (a ModelProto); raises as `write_tokenizer`."""
    from sentencepiece import sentencepiece_model_pb2 as protocol

    if not Path(path).is_file():
        raise errors.MissingInputError(f"no vocabulary {path}", remedy="Train one with the verb vocab")
    model = protocol.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # protobuf's DecodeError is not importable by a stable name
        raise errors.IntegrityError(
            f"{path} is not a SentencePiece model: {error}", remedy="Train it anew with the verb vocab"
        ) from error
    spec = model.trainer_spec
    if (spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id) != (PAD_ID, EOS_ID, UNK_ID, -1):
        raise errors.ConfigError(
            f"{path} has pad {spec.pad_id}, EOS {spec.eos_id}, unknown {spec.unk_id} and BOS {spec.bos_id}",
            remedy=f"T5 needs pad {PAD_ID}, EOS {EOS_ID}, unknown {UNK_ID} and BOS -1",
        )
    return model


def tokenizer_json(model: Any) -> dict[str, Any]:
    """The tokenizers library's description of a SentencePiece model.

    Args:
      model: the parsed SentencePiece ModelProto, unigram or BPE.

    Raises:
      ConfigError: the model is of words or characters, or puts its spaces behind the words.
    """
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise errors.ConfigError(
            "the vocabulary puts spaces behind words, which transformers cannot",
            remedy="Train it without treat_whitespace_as_suffix",
        )
    eos = model.pieces[EOS_ID].piece
    ending = [{"SpecialToken": {"id": eos, "type_id": 0}}]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model.normalizer_spec)},
        # No splitting at spaces: SentencePiece segments the whole sentence at once, and so does this.
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": text + ending,
            "pair": text + ending + [{"Sequence": {"id": "B", "type_id": 0}}] + ending,
            "special_tokens": {eos: {"id": eos, "ids": [EOS_ID], "tokens": [eos]}},
        },
        "decoder": _decoder(model.normalizer_spec.add_dummy_prefix),
        "model": _segmenter(model),
    }


def _added_tokens(model: Any) -> list[dict[str, Any]]:
    """Control symbols and user-defined ones, which are cut out of the text before it is segmented."""
    specials = set(_special_ids().values())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": piece.piece, **plain, "special": piece.type == _CONTROL or index in specials}
        for index, piece in enumerate(model.pieces)
        if piece.type in (_CONTROL, _USER_DEFINED) or index in specials
    ]


def _normalizers(normalizer: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if normalizer.precompiled_charsmap:
        charsmap = base64.b64encode(normalizer.precompiled_charsmap).decode("ascii")
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normalizer.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": f"^ +|[ {_SPACE}]+$"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    if normalizer.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return steps


def _decoder(strip_first_space: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip_first_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _segmenter(model: Any) -> dict[str, Any]:
    trainer = model.trainer_spec
    if trainer.model_type == _UNIGRAM:
        scores = [[piece.piece, piece.score] for piece in model.pieces]
        return {"type": "Unigram", "unk_id": UNK_ID, "vocab": scores, "byte_fallback": trainer.byte_fallback}
    if trainer.model_type == _BPE:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[UNK_ID].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": trainer.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        }
    raise errors.ConfigError(
        "the vocabulary is of words or characters, for which transformers has no counterpart",
        remedy="Export a unigram or BPE vocabulary",
    )


def _merges(model: Any) -> list[list[str]]:
    """Every way to build a piece from two others, the best-scored piece first, as SentencePiece merges."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = [
        (-score, index, [piece[:cut], piece[cut:]])
        for index, (piece, score) in enumerate(scores.items())
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [pair for _, _, pair in sorted(merges, key=lambda merge: merge[:2])]
