"""The size and the numerics of the network, as one immutable record.

Floor 2.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from rest_jax.errors import ConfigError

ACTIVATIONS = ("gelu", "linear", "relu", "silu")
DTYPES = ("float32", "bfloat16")
REMAT_MODES = ("none", "full")
_SIZES = (
    "vocab_size",
    "emb_dim",
    "num_heads",
    "head_dim",
    "mlp_dim",
    "num_encoder_layers",
    "num_decoder_layers",
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """A T5 1.1 encoder-decoder (arXiv:1910.10683 with the 1.1 changes: gated GELU, untied head).

    The field names are T5X's, so that its network gin files read the same.

    Attributes:
      vocab_size: rows of the embedding; at least the size of the vocabulary.
      emb_dim: width of the residual stream (E).
      num_heads: attention heads (H) of every layer.
      head_dim: width of one head (D); H * D need not be E.
      mlp_dim: hidden width of the MLP (F).
      num_encoder_layers: layers of the encoder.
      num_decoder_layers: layers of the decoder.
      mlp_activations: one activation for each input branch of the MLP; the branches are multiplied, so
        ("gelu", "linear") is the gated GELU of T5 1.1 and ("relu",) the plain MLP of T5 1.0.
      dropout_rate: share of activations dropped in training, in [0, 1).
      logits_via_embedding: tie the output head to the embedding and divide its logits by sqrt(E).
      dtype: type of the activations, "float32" or "bfloat16". Parameters, softmax and logits are float32
        whatever it says.
      remat: "none", or "full" to recompute every layer in the backward pass instead of keeping its
        activations.
      relpos_num_buckets: buckets of the relative position bias.
      relpos_max_distance: distance in tokens from which all positions share the last bucket.

    Raises:
      ConfigError: a value is out of range.
    """

    vocab_size: int = 32128
    emb_dim: int = 512
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 1024
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False
    dtype: str = "float32"
    remat: str = "none"
    relpos_num_buckets: int = 32
    relpos_max_distance: int = 128

    def __post_init__(self) -> None:
        # gin and JSON hand over lists; a tuple keeps the record hashable, which jit needs.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in _SIZES:
            if getattr(self, name) < 1:
                self._reject(name, "give a whole number of at least 1")
        if not self.mlp_activations or any(a not in ACTIVATIONS for a in self.mlp_activations):
            self._reject("mlp_activations", f"name one or more of {', '.join(ACTIVATIONS)}")
        if not 0.0 <= self.dropout_rate < 1.0:
            self._reject("dropout_rate", "give a share in [0, 1)")
        if self.dtype not in DTYPES:
            self._reject("dtype", f"choose one of {', '.join(DTYPES)}")
        if self.remat not in REMAT_MODES:
            self._reject("remat", f"choose one of {', '.join(REMAT_MODES)}")
        if self.relpos_num_buckets < 4 or self.relpos_num_buckets % 4:
            # The encoder gives half of the buckets to each direction and half of those to exact distances.
            self._reject("relpos_num_buckets", "give a positive multiple of 4")
        if self.relpos_max_distance <= self.relpos_num_buckets // 2:
            self._reject("relpos_max_distance", "make it larger than half of relpos_num_buckets")

    def _reject(self, name: str, remedy: str) -> None:
        raise ConfigError(
            f"{name} is {getattr(self, name)!r}",
            where=f"T5Config.{name}",
            remedy=remedy[0].upper() + remedy[1:],
        )

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of activations as JAX knows it."""
        return jnp.dtype(self.dtype)

    @property
    def joined_kv_dim(self) -> int:
        """Width of all heads side by side (H * D)."""
        return self.num_heads * self.head_dim

    @property
    def logits_scale(self) -> float:
        """What the logits of a tied head are multiplied by: 1 / sqrt(E)."""
        return 1.0 / math.sqrt(self.emb_dim)
