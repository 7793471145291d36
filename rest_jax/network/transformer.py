"""The T5 1.1 encoder-decoder, whose parameter tree is that of T5X's `examples/t5/network.py`.

Floor 2. `EncoderDecoder` is the trunk that the policy and the reward model have in common; `Transformer` is
the policy, with logits over the vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from rest_jax.network.attention import MASKED_LOGIT, Attention
from rest_jax.network.config import T5Config
from rest_jax.network.decoding import (
    DecodeCache,
    EncodedSource,
    LaneSources,
    PrefixPool,
    PrefixRows,
    to_bits,
)
from rest_jax.network.layers import MLP, Dense, Embed, RMSNorm, constrain, dropout
from rest_jax.network.relative_position import RelativePositionBias
from rest_jax.types import PAD_ID, Params

HEAD_IN_DECODER = "logits_dense"  # the untied head among the decoder's parameters, as T5X has it


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each on a normed copy of the residual stream."""

    config: T5Config

    def setup(self) -> None:
        """Declares the sub-layers."""
        dtype = self.config.activation_dtype
        self.pre_attention_layer_norm = RMSNorm(dtype)
        self.attention = Attention(self.config)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = MLP(self.config)
        self.drop = dropout(self.config.dropout_rate)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array, deterministic: bool) -> jax.Array:
        """[B, L, E] to [B, L, E]; mask [B, 1, 1 or L, L], bias [H, L, L]."""
        normed = self.pre_attention_layer_norm(x)
        attended = self.attention(normed, normed, mask, bias, deterministic)
        x = x + self.drop(attended, deterministic=deterministic)
        x = x + self.drop(self.mlp(self.pre_mlp_layer_norm(x), deterministic), deterministic=deterministic)
        return constrain(x, "batch", "length", "embed")


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, and MLP."""

    config: T5Config

    def setup(self) -> None:
        """Declares the sub-layers."""
        dtype = self.config.activation_dtype
        self.pre_self_attention_layer_norm = RMSNorm(dtype)
        self.self_attention = Attention(self.config)
        self.pre_cross_attention_layer_norm = RMSNorm(dtype)
        self.encoder_decoder_attention = Attention(self.config)
        self.pre_mlp_layer_norm = RMSNorm(dtype)
        self.mlp = MLP(self.config)
        self.drop = dropout(self.config.dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        cross_mask: jax.Array,
        bias: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """[B, T, E] to [B, T, E]; mask [B or 1, 1, T, T], cross_mask [B, 1, 1 or T, L], bias [H, T, T]."""
        normed = self.pre_self_attention_layer_norm(x)
        attended = self.self_attention(normed, normed, mask, bias, deterministic)
        x = x + self.drop(attended, deterministic=deterministic)
        normed = self.pre_cross_attention_layer_norm(x)
        attended = self.encoder_decoder_attention(normed, encoded, cross_mask, None, deterministic)
        x = x + self.drop(attended, deterministic=deterministic)
        x = x + self.drop(self.mlp(self.pre_mlp_layer_norm(x), deterministic), deterministic=deterministic)
        return constrain(x, "batch", "length", "embed")

    def step(
        self,
        x_SxNxE: jax.Array,
        cached: tuple[jax.Array, jax.Array],
        source: tuple[jax.Array, jax.Array, jax.Array],
        position: jax.Array,
        bias_HxT: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """One position: [S, N, E] and the layer's cache to the same; `source` is (keys, values, mask)."""
        attended, cached = self.self_attention.self_step(
            self.pre_self_attention_layer_norm(x_SxNxE), cached, position, bias_HxT
        )
        x = x_SxNxE + attended
        x = x + self.encoder_decoder_attention.cross_step(self.pre_cross_attention_layer_norm(x), *source)
        rows = self.pre_mlp_layer_norm(x).reshape(-1, x.shape[-1])
        return x + self.mlp(rows).reshape(x.shape), cached

    def step_rows(
        self,
        x_RxE: jax.Array,
        pool: tuple[jax.Array, jax.Array],
        source: tuple[jax.Array, jax.Array, jax.Array],
        rows: PrefixRows,
        bias_RxHxT1: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """One position of R prefixes: [R, E] to the same, and its key and value; `source` is of lanes."""
        attended, own = self.self_attention.self_rows(
            self.pre_self_attention_layer_norm(x_RxE), pool, rows.ancestors_RxT, bias_RxHxT1
        )
        x = x_RxE + attended
        normed = self.pre_cross_attention_layer_norm(x)
        x = x + self.encoder_decoder_attention.cross_rows(normed, source, rows.lanes_R)
        return x + self.mlp(self.pre_mlp_layer_norm(x)), own


def _layer_class(layer: type[nn.Module], config: T5Config, deterministic_argument: int) -> type[nn.Module]:
    if config.remat == "none":
        return layer
    return nn.remat(layer, static_argnums=(deterministic_argument,), methods=["__call__"])


class Encoder(nn.Module):
    """The stack over the source."""

    config: T5Config

    def setup(self) -> None:
        """Declares the stack."""
        config = self.config
        layer = _layer_class(EncoderLayer, config, deterministic_argument=4)
        self.relpos_bias = RelativePositionBias(config, bidirectional=True)
        self.layers = [layer(config) for _ in range(config.num_encoder_layers)]
        self.encoder_norm = RMSNorm(config.activation_dtype)
        self.drop = dropout(config.dropout_rate)
        # The one place where T5X does not share the mask over positions.
        self.drop_encoded = nn.Dropout(config.dropout_rate)

    def __call__(self, embedded_BxLxE: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        """[B, L, E] to [B, L, E]."""
        x = self.drop(embedded_BxLxE, deterministic=deterministic)
        x = constrain(x, "batch", "length", "embed")
        bias_HxLxL = self.relpos_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, mask, bias_HxLxL, deterministic)
        return self.drop_encoded(self.encoder_norm(x), deterministic=deterministic)


class Decoder(nn.Module):
    """The stack over the target, and the untied output head."""

    config: T5Config

    def setup(self) -> None:
        """Declares the stack. The head has parameters only if it is used."""
        config = self.config
        layer = _layer_class(DecoderLayer, config, deterministic_argument=6)
        self.relpos_bias = RelativePositionBias(config, bidirectional=False)
        self.layers = [layer(config) for _ in range(config.num_decoder_layers)]
        self.decoder_norm = RMSNorm(config.activation_dtype)
        self.drop = dropout(config.dropout_rate)
        if not config.logits_via_embedding:
            self.logits_dense = Dense(config.vocab_size, ("embed", "vocab"), jnp.dtype(jnp.float32))

    def __call__(
        self,
        embedded_BxTxE: jax.Array,
        encoded_BxLxE: jax.Array,
        mask: jax.Array,
        cross_mask: jax.Array,
        deterministic: bool,
    ) -> jax.Array:
        """[B, T, E] to the hidden states [B, T, E] that a head reads."""
        x = self.drop(embedded_BxTxE, deterministic=deterministic)
        x = constrain(x, "batch", "length", "embed")
        bias_HxTxT = self.relpos_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, encoded_BxLxE, mask, cross_mask, bias_HxTxT, deterministic)
        return self.drop(self.decoder_norm(x), deterministic=deterministic)

    def project_source(self, encoded_SxLxE: jax.Array, mask_SxL: jax.Array) -> EncodedSource:
        """Keys and values of the sources for every layer."""
        projected = [layer.encoder_decoder_attention.project_source(encoded_SxLxE) for layer in self.layers]
        keys, values = zip(*projected, strict=True)
        return EncodedSource(keys=tuple(keys), values=tuple(values), mask=mask_SxL)

    def step(
        self, embedded_SxNxE: jax.Array, position: jax.Array, cache: DecodeCache, source: EncodedSource
    ) -> tuple[jax.Array, DecodeCache]:
        """One position of S x N sequences: hidden states [S, N, E], and the cache with it written."""
        x = embedded_SxNxE
        bias_HxT = self.relpos_bias.of_position(position, cache.keys[0].shape[3])
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            looked_at = (source.keys[i], source.values[i], source.mask)
            x, (key, value) = layer.step(x, (cache.keys[i], cache.values[i]), looked_at, position, bias_HxT)
            keys.append(key)
            values.append(value)
        return self.decoder_norm(x), DecodeCache(keys=tuple(keys), values=tuple(values))

    def step_rows(
        self, embedded_RxE: jax.Array, rows: PrefixRows, pool: PrefixPool, lanes: LaneSources
    ) -> tuple[jax.Array, PrefixPool]:
        """One position of R prefixes: hidden states [R, E], and entries for the pool, [R, H * D] each."""
        x = embedded_RxE
        length = rows.ancestors_RxT.shape[1]
        bias_RxHxT1 = self.relpos_bias.of_prefixes(rows.positions_R, length)
        behind_RxT = jnp.arange(length) >= rows.positions_R[:, None]
        behind_RxT1 = jnp.pad(behind_RxT, ((0, 0), (0, 1)))
        bias_RxHxT1 = jnp.where(behind_RxT1[:, None], MASKED_LOGIT, bias_RxHxT1)
        keys, values = [], []
        for i, layer in enumerate(self.layers):
            looked_at = (lanes.keys[i], lanes.values[i], lanes.mask)
            x, (key, value) = layer.step_rows(x, (pool.keys[i], pool.values[i]), looked_at, rows, bias_RxHxT1)
            keys.append(key)
            values.append(value)
        return self.decoder_norm(x), jax.tree.map(to_bits, PrefixPool(keys=tuple(keys), values=tuple(values)))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The untied head: [..., E] to float32 [..., V]."""
        return self.logits_dense(hidden)


def _same_segment(queries_BxQ: jax.Array, keys_BxK: jax.Array) -> jax.Array:
    return queries_BxQ[:, None, :, None] == keys_BxK[:, None, None, :]


class EncoderDecoder(nn.Module):
    """Embedding, encoder and decoder: the trunk that all heads share."""

    config: T5Config

    def setup(self) -> None:
        """Declares the trunk."""
        self.token_embedder = Embed(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(
        self,
        encoder_input_tokens_BxL: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Reads the sources.

        Args:
          encoder_input_tokens_BxL: int32 [B, L]; padding is hidden from every position.
          encoder_segment_ids: int32 [B, L] of packed rows; a position sees its own segment only.
          deterministic: no dropout.

        Returns:
          [B, L, E] in the type of the activations; what stands on padding means nothing.
        """
        mask = (encoder_input_tokens_BxL != PAD_ID)[:, None, None, :]
        if encoder_segment_ids is not None:
            mask = mask & _same_segment(encoder_segment_ids, encoder_segment_ids)
        return self.encoder(self.token_embedder(encoder_input_tokens_BxL), mask, deterministic)

    def decode_hidden(
        self,
        encoded_BxLxE: jax.Array,
        encoder_input_tokens_BxL: jax.Array,
        decoder_input_tokens_BxT: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Reads the targets, each position seeing those up to itself and its source.

        Returns:
          What a head reads, [B, T, E] in the type of the activations.

        Raises:
          ValueError: segment ids for one side only.
        """
        length = decoder_input_tokens_BxT.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        cross_mask = (encoder_input_tokens_BxL != PAD_ID)[:, None, None, :]
        if decoder_segment_ids is not None and encoder_segment_ids is not None:
            mask = mask & _same_segment(decoder_segment_ids, decoder_segment_ids)
            cross_mask = cross_mask & _same_segment(decoder_segment_ids, encoder_segment_ids)
        elif decoder_segment_ids is not None or encoder_segment_ids is not None:
            raise ValueError("segment ids are given for one side only; packed rows need both")
        embedded = self.token_embedder(decoder_input_tokens_BxT)
        return self.decoder(embedded, encoded_BxLxE, mask, cross_mask, deterministic)

    def teacher_forced(
        self,
        encoder_input_tokens_BxL: jax.Array,
        decoder_input_tokens_BxT: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Reads sources and the targets that are given: `encode`, then `decode_hidden`, [B, T, E]."""
        return self.decode_hidden(
            self.encode(encoder_input_tokens_BxL, encoder_segment_ids, deterministic=deterministic),
            encoder_input_tokens_BxL,
            decoder_input_tokens_BxT,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=deterministic,
        )


class Transformer(EncoderDecoder):
    """The policy: the probability of the next target token."""

    def __call__(
        self,
        encoder_input_tokens_BxL: jax.Array,
        decoder_input_tokens_BxT: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits of every target position under teacher forcing.

        Args:
          encoder_input_tokens_BxL: sources, int32.
          decoder_input_tokens_BxT: targets shifted right, the start symbol (PAD) first, int32.
          encoder_segment_ids: int32 [B, L] of packed rows, numbered from 1; 0 is padding.
          decoder_segment_ids: int32 [B, T], likewise.
          deterministic: no dropout; otherwise an rng named "dropout" is needed.

        Returns:
          float32 [B, T, V].
        """
        tokens = encoder_input_tokens_BxL, decoder_input_tokens_BxT
        segments = encoder_segment_ids, decoder_segment_ids
        hidden = self.teacher_forced(*tokens, *segments, deterministic=deterministic)
        return constrain(self.logits(hidden), "batch", "length", "vocab")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The output head, tied or not: [..., E] to float32 [..., V]."""
        if self.config.logits_via_embedding:
            return self.token_embedder.attend(hidden)
        return self.decoder.logits(hidden)

    def start_decoding(self, source_tokens_SxL: jax.Array) -> EncodedSource:
        """Encodes the sources and projects them for every decoder layer, once for all samples."""
        encoded = self.encode(source_tokens_SxL)
        return self.decoder.project_source(encoded, source_tokens_SxL != PAD_ID)

    def decode_step(
        self, tokens_SxN: jax.Array, position: jax.Array, cache: DecodeCache, source: EncodedSource
    ) -> tuple[jax.Array, DecodeCache]:
        """Decodes one position of N samples of each of S sources.

        Args:
          tokens_SxN: int32, the token before this position (PAD, the start symbol, at position 0).
          position: int32 [], counted from 0; below the length of the cache.
          cache: holds positions 0 .. position - 1.
          source: of `start_decoding`.

        Returns:
          Logits of the token at this position, float32 [S, N, V], and the cache with it written.
        """
        hidden_SxNxE, cache = self.decoder.step(self.token_embedder(tokens_SxN), position, cache, source)
        sources, samples, width = hidden_SxNxE.shape
        logits = self.logits(hidden_SxNxE.reshape(sources * samples, width)).reshape(sources, samples, -1)
        return constrain(logits, "batch", "samples", "vocab"), cache

    def decode_rows(
        self, rows: PrefixRows, pool: PrefixPool, lanes: LaneSources
    ) -> tuple[jax.Array, PrefixPool]:
        """Decodes one position of R distinct prefixes of K sources.

        Args:
          rows: the prefixes.
          pool: holds the positions before.
          lanes: the K sources that the rows' lanes stand for.

        Returns:
          Logits of the next token, float32 [R, V], and what the pool is to keep of this position.
        """
        embedded_RxE = self.token_embedder(rows.tokens_R)
        hidden_RxE, entries = self.decoder.step_rows(embedded_RxE, rows, pool, lanes)
        return constrain(self.logits(hidden_RxE), "batch", "vocab"), entries


def kernels_as_read(config: T5Config, params: Params) -> Params:
    """The policy's parameters, the kernels of its layers in the type of the activations; logits are the same.

    For programs that read them in a loop: XLA's CPU compiler would convert them anew at each step. The head
    and the embedding are read in float32, and norms keep what they have.
    """

    def as_read(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array:
        of_layer = path[-1].key == "kernel" and path[-2].key != HEAD_IN_DECODER
        return leaf.astype(config.activation_dtype) if of_layer else leaf

    return jax.tree_util.tree_map_with_path(as_read, params)
