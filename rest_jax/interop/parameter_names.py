"""The names and shapes of T5 1.1's parameters: T5X's (and ours) beside Hugging Face's.

Floor 7. One table serves writing, reading and checking. Hugging Face stores kernels as PyTorch's Linear does,
[out, in]; T5X as [in, out], with the heads flattened head by head. Both keep one table of relative positions
for each stack, Hugging Face in its first block. Published mapping: the T5X conversion script of
transformers 4.47.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from rest_jax import errors
from rest_jax.network.config import T5Config

_SAME_NETWORK = "Use the network configuration that the parameters were made with"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter under both of its names.

    Attributes:
      path: T5X's path, joined with "/".
      hf_name: the key in a Hugging Face state dict.
      shape: the shape under T5X's path.
      transposed: the Hugging Face array is the transpose.
    """

    path: str
    hf_name: str
    shape: tuple[int, ...]
    transposed: bool


def parameters(config: T5Config) -> Iterator[Parameter]:
    """All parameters of a network, in the order of Hugging Face's blocks."""
    width, vocabulary = config.emb_dim, config.vocab_size
    yield Parameter("token_embedder/embedding", "shared.weight", (vocabulary, width), False)
    yield from _stack("encoder", config.num_encoder_layers, config)
    yield from _stack("decoder", config.num_decoder_layers, config)
    if not config.logits_via_embedding:
        yield Parameter("decoder/logits_dense/kernel", "lm_head.weight", (width, vocabulary), True)


def _stack(stack: str, num_layers: int, config: T5Config) -> Iterator[Parameter]:
    width = config.emb_dim
    yield Parameter(
        f"{stack}/relpos_bias/rel_embedding",
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        (config.num_heads, config.relpos_num_buckets),
        True,
    )
    for index in range(num_layers):
        ours, theirs = f"{stack}/layers_{index}", f"{stack}.block.{index}.layer"
        if stack == "encoder":
            sublayers = [("attention", "SelfAttention", "pre_attention_layer_norm")]
        else:
            sublayers = [
                ("self_attention", "SelfAttention", "pre_self_attention_layer_norm"),
                ("encoder_decoder_attention", "EncDecAttention", "pre_cross_attention_layer_norm"),
            ]
        for place, (attention, hf_attention, norm) in enumerate(sublayers):
            yield from _attention(f"{ours}/{attention}", f"{theirs}.{place}.{hf_attention}", config)
            yield Parameter(f"{ours}/{norm}/scale", f"{theirs}.{place}.layer_norm.weight", (width,), False)
        yield from _mlp(f"{ours}/mlp", f"{theirs}.{len(sublayers)}.DenseReluDense", config)
        hf_norm = f"{theirs}.{len(sublayers)}.layer_norm.weight"
        yield Parameter(f"{ours}/pre_mlp_layer_norm/scale", hf_norm, (width,), False)
    yield Parameter(f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight", (width,), False)


def _attention(ours: str, theirs: str, config: T5Config) -> Iterator[Parameter]:
    width, joined = config.emb_dim, config.num_heads * config.head_dim
    for name in ("query", "key", "value"):
        yield Parameter(f"{ours}/{name}/kernel", f"{theirs}.{name[0]}.weight", (width, joined), True)
    yield Parameter(f"{ours}/out/kernel", f"{theirs}.o.weight", (joined, width), True)


def _mlp(ours: str, theirs: str, config: T5Config) -> Iterator[Parameter]:
    width, inner = config.emb_dim, config.mlp_dim
    gates = len(config.mlp_activations)
    for name in ["wi"] if gates == 1 else [f"wi_{i}" for i in range(gates)]:
        yield Parameter(f"{ours}/{name}/kernel", f"{theirs}.{name}.weight", (width, inner), True)
    yield Parameter(f"{ours}/wo/kernel", f"{theirs}.wo.weight", (inner, width), True)


def check_tree(params: Mapping[str, Any], config: T5Config) -> None:
    """Holds a parameter tree against a configuration.

    Raises:
      ConfigError: a parameter is missing, has another shape, or is not T5 1.1's; the message names it.
    """
    found = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
    wanted = {parameter.path: parameter.shape for parameter in parameters(config)}
    for path, shape in wanted.items():
        if found.get(path) != shape:
            state = f"has shape {list(found[path])}, not {list(shape)}" if path in found else "is missing"
            raise errors.ConfigError(f"parameter {path} {state}", remedy=_SAME_NETWORK)
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise errors.ConfigError(
            f"parameter {unknown[0]} has no place in this network ({len(unknown)} such)",
            remedy=_SAME_NETWORK,
        )


def check_finite(arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Refuses NaN and infinity.

    Raises:
      NonFiniteError: an array has such a value; the message names the array and counts the values.
    """
    for name, array in arrays.items():
        wrong = int(array.size - np.count_nonzero(np.isfinite(array)))
        if wrong:
            raise errors.NonFiniteError(
                f"{wrong} of {array.size} values of {name} are NaN or infinite",
                where=where,
                remedy="Take an earlier checkpoint",
            )


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a parameter tree by their paths, joined with "/"."""
    return traverse_util.flatten_dict(dict(params), sep="/")
