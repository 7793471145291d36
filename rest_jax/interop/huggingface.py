"""Takes a policy to Hugging Face transformers and back: safetensors, configuration, tokenizer.

Floor 7. PyTorch's `T5ForConditionalGeneration.from_pretrained(folder)` and `AutoTokenizer` load what
`export_huggingface` writes, without any of our code; `import_huggingface` is its inverse. Neither PyTorch nor
transformers is needed for that; if they are installed, the export also compares their logits with ours.

Tied and untied heads. T5 1.1 has a head of its own and does not scale the decoder's output; a tied head
multiplies it by emb_dim ** -0.5 on both sides. transformers 5 forgets `tie_word_embeddings: false` while it
builds the model, and unties again (with a warning) when it finds `lm_head.weight` in the file beside another
`shared.weight`, so an untied head is always written and a tied one never. That warning advises to set
`config.tie_word_embeddings = False`, which in transformers 5 unties the embeddings of the two stacks as well;
so with an untied head they are written under all three names, as in Google's own T5 1.1 files, and both ways
of loading give the same model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from rest_jax import errors, files
from rest_jax.interop import hf_tokenizer, parameter_names
from rest_jax.network.config import T5Config
from rest_jax.types import EOS_ID, PAD_ID

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
LOGITS_TOLERANCE = 1e-3

_INDEX_NAME = "model.safetensors.index.json"
_LAYER_NORM_EPSILON = 1e-6
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Hugging Face's "gelu" behind "gated-" is the tanh approximation, as flax's.
_FEED_FORWARD = {
    "gated-gelu": ("gelu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-relu": ("relu", "linear"),
    "relu": ("relu",),
}


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote and how it was checked.

    Attributes:
      files: the names of the files, in the folder.
      parameters: how many numbers there are in the weights.
      bitwise_equal: the weights were read back and are the parameters bit for bit; None if not checked.
      max_logit_difference: the largest |difference| between PyTorch's logits and ours on a small batch; None
        if not compared.
      note: one line for the user on what was checked and what was not.
    """

    files: tuple[str, ...]
    parameters: int
    bitwise_equal: bool | None
    max_logit_difference: float | None
    note: str


def params_to_hf_state(params: Mapping[str, Any], config: T5Config) -> dict[str, np.ndarray]:
    """Renames and transposes a parameter tree into a Hugging Face state dict, float32.

    With an untied head the embedding also stands under its names in the two stacks.

    Raises:
      ConfigError: the tree is not that of `config`.
    """
    parameter_names.check_tree(params, config)
    flat = parameter_names.flatten(params)
    state = {}
    for parameter in parameter_names.parameters(config):
        array = np.asarray(jax.device_get(flat[parameter.path]), np.float32)
        # Contiguous, since safetensors writes the memory as it lies.
        state[parameter.hf_name] = np.ascontiguousarray(array.T if parameter.transposed else array)
    if not config.logits_via_embedding:
        state |= dict.fromkeys(_EMBEDDING_COPIES, state["shared.weight"])
    return state


def hf_state_to_params(state: Mapping[str, np.ndarray], config: T5Config) -> dict[str, Any]:
    """Renames and transposes a Hugging Face state dict into a parameter tree of float32 NumPy leaves.

    Copies of the embedding under its other names (`encoder.embed_tokens.weight`, a tied `lm_head.weight`) are
    read over.

    Raises:
      ConfigError: an array is missing, has another shape than `config` says, or has no place.
    """
    state = dict(state)
    if "shared.weight" not in state and "encoder.embed_tokens.weight" in state:
        state["shared.weight"] = state["encoder.embed_tokens.weight"]
    flat = {}
    for parameter in parameter_names.parameters(config):
        if parameter.hf_name not in state:
            raise errors.ConfigError(
                f"the weights have no {parameter.hf_name}", remedy="Import the whole of a T5 1.1 model"
            )
        array = np.asarray(state[parameter.hf_name]).astype(np.float32)
        flat[parameter.path] = np.ascontiguousarray(array.T if parameter.transposed else array)
    read = {parameter.hf_name for parameter in parameter_names.parameters(config)}
    for name in sorted(state.keys() - read):
        if not _is_copy_of_embedding(name, state):
            raise errors.ConfigError(
                f"the weights hold {name}, which has no place in this network",
                remedy="Only T5 1.1 encoder-decoder models can be imported",
            )
    params = traverse_util.unflatten_dict(flat, sep="/")
    parameter_names.check_tree(params, config)
    return params


def _is_copy_of_embedding(name: str, state: Mapping[str, np.ndarray]) -> bool:
    return name in (*_EMBEDDING_COPIES, "lm_head.weight") and np.array_equal(
        state[name], state["shared.weight"]
    )


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """The contents of `config.json`.

    Raises:
      ConfigError: the MLP's activations have no name in transformers.
    """
    names = {activations: name for name, activations in _FEED_FORWARD.items()}
    if tuple(config.mlp_activations) not in names:
        raise errors.ConfigError(
            f"transformers' T5 has no MLP with {tuple(config.mlp_activations)}",
            where="T5Config.mlp_activations",
            remedy=f"It has {', '.join(map(str, names))}",
        )
    feed_forward = names[tuple(config.mlp_activations)]
    # transformers 5 sizes generate()'s cache by the encoder unless it finds this key, and fails if too short.
    depth = {"decoder_layers": config.num_decoder_layers}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": feed_forward,
        "relative_attention_num_buckets": config.relpos_num_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "dropout_rate": config.dropout_rate,
        "layer_norm_epsilon": _LAYER_NORM_EPSILON,
        "tie_word_embeddings": config.logits_via_embedding,
        "decoder_start_token_id": PAD_ID,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "use_cache": True,
        "torch_dtype": "float32",
        **(depth if config.num_decoder_layers != config.num_encoder_layers else {}),
    }


def hf_to_config(values: Mapping[str, Any]) -> T5Config:
    """The network configuration that a `config.json` describes.

    Raises:
      ConfigError: it is not a T5 that this network can be.
    """
    if values.get("model_type") != "t5":
        raise errors.ConfigError(
            f"model_type is {values.get('model_type')!r}, not 't5'", remedy="Only T5 1.1 can be imported"
        )
    feed_forward = values.get("feed_forward_proj", "relu")
    if feed_forward not in _FEED_FORWARD:
        raise errors.ConfigError(
            f"feed_forward_proj is {feed_forward!r}", remedy=f"This network has {', '.join(_FEED_FORWARD)}"
        )
    epsilon = values.get("layer_norm_epsilon", _LAYER_NORM_EPSILON)
    if epsilon != _LAYER_NORM_EPSILON:
        raise errors.ConfigError(
            f"layer_norm_epsilon is {epsilon}", remedy=f"This network's is {_LAYER_NORM_EPSILON}, as T5X's"
        )
    layers = values.get("num_layers", 6)
    # transformers 5 writes `tie_word_embeddings: true` for every T5; an unscaled output then marks T5 1.1.
    tied = values.get("tie_word_embeddings", True) and values.get("scale_decoder_outputs", True)
    return T5Config(
        vocab_size=values.get("vocab_size", 32128),
        emb_dim=values.get("d_model", 512),
        num_heads=values.get("num_heads", 8),
        head_dim=values.get("d_kv", 64),
        mlp_dim=values.get("d_ff", 2048),
        num_encoder_layers=layers,
        num_decoder_layers=values.get("num_decoder_layers") or layers,
        mlp_activations=_FEED_FORWARD[feed_forward],
        dropout_rate=float(values.get("dropout_rate", 0.1)),
        logits_via_embedding=bool(tied),
        relpos_num_buckets=values.get("relative_attention_num_buckets", 32),
        relpos_max_distance=values.get("relative_attention_max_distance", 128),
    )


def generation_config(max_length: int) -> dict[str, Any]:
    """The contents of `generation_config.json`: greedy, at most `max_length` tokens with the EOS."""
    return {
        "decoder_start_token_id": PAD_ID,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        # Not max_length, which in transformers counts the start symbol.
        "max_new_tokens": max_length,
        "do_sample": False,
        "num_beams": 1,
    }


def export_huggingface(
    params: Mapping[str, Any],
    config: T5Config,
    vocabulary_file: Path,
    folder: Path,
    max_length: int,
    check: bool = True,
) -> ExportReport:
    """Writes a policy as a folder that transformers loads, then checks what it wrote.

    Args:
      params: the parameter tree of the policy.
      config: its network.
      vocabulary_file: its SentencePiece model.
      folder: where to write; files of the same names are replaced, the weights first and `config.json` last.
      max_length: tokens that `generate` should write at most, EOS counted.
      check: whether to read the weights back, and to compare logits with PyTorch's if it is installed.

    Raises:
      NonFiniteError: a parameter is NaN or infinite; nothing is written.
      ConfigError: the parameters or the vocabulary do not fit the configuration.
      IntegrityError: the written weights are not the parameters, or PyTorch's logits differ from ours by more
        than 1e-3.
      OutputError: the folder cannot be written.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    state = params_to_hf_state(params, config)
    parameter_names.check_finite(state, where=f"export to {folder}")
    values = config_to_hf(config)
    pieces = len(hf_tokenizer.read_model(Path(vocabulary_file)).pieces)
    if pieces > config.vocab_size:
        raise errors.ConfigError(
            f"{vocabulary_file} has {pieces} pieces, the embedding {config.vocab_size} rows",
            where="T5Config.vocab_size",
            remedy="Export with the vocabulary that the policy was trained with",
        )
    (folder / CONFIG_NAME).unlink(missing_ok=True)  # a folder half written has no configuration
    with files.atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    hf_tokenizer.write_tokenizer(Path(vocabulary_file), folder)
    files.write_json(folder / GENERATION_NAME, generation_config(max_length))
    files.write_json(folder / CONFIG_NAME, values)
    bitwise, difference, note = None, None, "nothing was checked"
    if check:
        bitwise = _read_back(state, folder)
        if _has("torch") and _has("transformers"):
            difference = compare_with_pytorch(params, config, folder)
            note = f"weights equal bit for bit; PyTorch's logits differ from ours by at most {difference:.1e}"
        else:
            note = "weights equal bit for bit; PyTorch's check was not run: it needs torch and transformers"
    written = tuple(sorted(path.name for path in folder.iterdir() if path.is_file()))
    return ExportReport(written, sum(a.size for a in state.values()), bitwise, difference, note)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _read_back(state: Mapping[str, np.ndarray], folder: Path) -> bool:
    found = read_weights(folder)
    same = found.keys() == state.keys() and all(found[k].tobytes() == state[k].tobytes() for k in state)
    if not same:
        raise errors.IntegrityError(
            f"{folder / WEIGHTS_NAME} does not hold the parameters that were written",
            remedy="Export again, to another disk",
        )
    return True


def compare_with_pytorch(params: Mapping[str, Any], config: T5Config, folder: Path) -> float:
    """The largest |difference| between the logits of PyTorch's model in `folder` and ours, in float32.

    The batch is two sources and two targets of different lengths, so that the padding mask is in it too.

    Raises:
      IntegrityError: they differ by more than `LOGITS_TOLERANCE`.
    """
    import torch
    from transformers import T5ForConditionalGeneration

    from rest_jax.network.transformer import Transformer

    sources_BxL, inputs_BxT = _probe_batch(config.vocab_size)
    model = T5ForConditionalGeneration.from_pretrained(folder, local_files_only=True).float().eval()
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(sources_BxL, dtype=torch.long),
            attention_mask=torch.tensor(sources_BxL != PAD_ID, dtype=torch.long),
            decoder_input_ids=torch.tensor(inputs_BxT, dtype=torch.long),
        ).logits.numpy()
    network = Transformer(dataclasses.replace(config, dtype="float32"))
    with jax.default_matmul_precision("float32"):
        ours = np.asarray(network.apply({"params": params}, sources_BxL, inputs_BxT))
    difference = float(np.max(np.abs(ours - theirs)))
    if not difference <= LOGITS_TOLERANCE:
        raise errors.IntegrityError(
            f"PyTorch's logits differ from ours by {difference:.2e} (allowed: {LOGITS_TOLERANCE})",
            where=str(folder),
            remedy="Do not use the export; report the versions of torch and transformers",
        )
    return difference


def _probe_batch(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of tokens [2, 12] and decoder inputs [2, 7], the same for every export."""
    draw = np.random.Generator(np.random.Philox(key=0))
    sources_BxL = draw.integers(2, vocab_size, size=(2, 12)).astype(np.int32)
    inputs_BxT = draw.integers(2, vocab_size, size=(2, 7)).astype(np.int32)
    sources_BxL[:, -1] = EOS_ID
    sources_BxL[1, 8:] = [EOS_ID, PAD_ID, PAD_ID, PAD_ID]
    inputs_BxT[:, 0] = PAD_ID
    return sources_BxL, inputs_BxT


def import_huggingface(folder: Path) -> tuple[dict[str, Any], T5Config, Path | None]:
    """Reads a T5 1.1 model as `export_huggingface` or transformers' `save_pretrained` writes it.

    Returns:
      The parameter tree (float32 NumPy leaves), its configuration, and the path of its SentencePiece
      model, None if the folder has none.

    Raises:
      MissingInputError: there is no `config.json` or no safetensors file.
      ConfigError: the model is not a T5 that this network can be.
      NonFiniteError: a parameter is NaN or infinite.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        remedy = "Name a folder that transformers' save_pretrained has written"
        raise errors.MissingInputError(f"no {CONFIG_NAME} in {folder}", remedy=remedy)
    config = hf_to_config(files.read_json(folder / CONFIG_NAME))
    state = read_weights(folder)
    if not config.logits_via_embedding and "lm_head.weight" not in state and "shared.weight" in state:
        state["lm_head.weight"] = state["shared.weight"]  # an unscaled head that shares its values
    params = hf_state_to_params(state, config)
    parameter_names.check_finite(parameter_names.flatten(params), where=str(folder))
    vocabulary = folder / hf_tokenizer.SPIECE_NAME
    return params, config, vocabulary if vocabulary.is_file() else None


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a folder's safetensors files, one or several.

    Raises:
      MissingInputError: there is none, or one that the index names is missing.
      IntegrityError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    index = folder / _INDEX_NAME
    names = sorted(set(files.read_json(index)["weight_map"].values())) if index.is_file() else [WEIGHTS_NAME]
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        path = folder / Path(name).name
        if not path.is_file():
            raise errors.MissingInputError(
                f"no file {path}", remedy="Save the model with transformers' save_pretrained, as safetensors"
            )
        try:
            # jax has taught NumPy bfloat16, which this opener then reads; safetensors.numpy does not.
            with safe_open(path, framework="np") as tensors:
                arrays |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (no iterator)
        except SafetensorError as error:
            raise errors.IntegrityError(
                f"{path} is not a safetensors file: {error}", remedy="Export or copy it again"
            ) from error
    return arrays
