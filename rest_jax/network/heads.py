"""Networks with a scalar head on the policy's trunk: the reward model and the value function.

Floor 2. The reward model R(x, y) = sigmoid(score logit) is trained on rated translations and reads no
reference (arXiv:2308.08998, section 3). The value function V(x, y_{<t}) has a scalar at every target position
(appendix A.8.4).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from rest_jax.network.layers import dense_init
from rest_jax.network.transformer import EncoderDecoder
from rest_jax.types import PAD_ID


class ScoreHead(nn.Module):
    """Vector to scalar: one hidden GELU layer, in float32."""

    hidden_dim: int

    @nn.compact
    def __call__(self, vectors: jax.Array) -> jax.Array:
        """[..., C] to float32 [...]."""
        hidden = nn.Dense(
            self.hidden_dim,
            use_bias=False,
            kernel_init=nn.with_logical_partitioning(dense_init, ("embed", "mlp")),
            name="hidden",
        )(vectors.astype(jnp.float32))
        score = nn.Dense(
            1,
            kernel_init=nn.with_logical_partitioning(dense_init, ("mlp", "score")),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("score",)),
            name="output",
        )(jax.nn.gelu(hidden, approximate=True))
        return score[..., 0]


class ScoredTrunk(EncoderDecoder):
    """The policy's trunk with a scalar head."""

    def setup(self) -> None:
        """Declares the trunk and the head."""
        super().setup()
        self.score_head = ScoreHead(self.config.emb_dim)


class RewardModel(ScoredTrunk):
    """Scores a hypothesis as a translation of a source."""

    def __call__(
        self,
        encoder_input_tokens_BxL: jax.Array,
        decoder_input_tokens_BxT: jax.Array,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """The score logit of each pair.

        Args:
          encoder_input_tokens_BxL: sources, int32.
          decoder_input_tokens_BxT: start symbol (PAD), hypothesis, EOS, padding; int32.
          deterministic: no dropout; otherwise an rng named "dropout" is needed.

        Returns:
          float32 [B]; the reward is its sigmoid.
        """
        tokens = encoder_input_tokens_BxL, decoder_input_tokens_BxT
        hidden = self.teacher_forced(*tokens, deterministic=deterministic)
        return self.score_head(summarise(hidden, decoder_input_tokens_BxT))


class ValueModel(ScoredTrunk):
    """Estimates, before each target token, the return that is to come."""

    def __call__(
        self,
        encoder_input_tokens_BxL: jax.Array,
        decoder_input_tokens_BxT: jax.Array,
        *,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """V(s_t) with s_t = (source, tokens before position t).

        Args:
          encoder_input_tokens_BxL: sources, int32.
          decoder_input_tokens_BxT: targets shifted right, the start symbol (PAD) first, int32.
          encoder_segment_ids: int32 [B, L] of packed rows, numbered from 1; 0 is padding.
          decoder_segment_ids: int32 [B, T], likewise.
          deterministic: no dropout; otherwise an rng named "dropout" is needed.

        Returns:
          float32 [B, T], on the scale of the returns.
        """
        tokens = encoder_input_tokens_BxL, decoder_input_tokens_BxT
        segments = encoder_segment_ids, decoder_segment_ids
        hidden = self.teacher_forced(*tokens, *segments, deterministic=deterministic)
        return self.score_head(hidden)


def summarise(hidden_BxTxE: jax.Array, decoder_input_tokens_BxT: jax.Array) -> jax.Array:
    """The mean over the hypothesis and its last position (EOS), side by side: float32 [B, 2E].

    The start symbol has the id of padding, so position 0 counts by its place, the others by their token.
    """
    positions_T = jnp.arange(decoder_input_tokens_BxT.shape[1])
    mask_BxT = (positions_T == 0) | (decoder_input_tokens_BxT != PAD_ID)
    hidden = hidden_BxTxE.astype(jnp.float32)
    mean = jnp.einsum("bte,bt->be", hidden, mask_BxT.astype(jnp.float32)) / mask_BxT.sum(1, keepdims=True)
    last_B = jnp.max(jnp.where(mask_BxT, positions_T, 0), axis=1)
    last = jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)[:, 0]
    return jnp.concatenate([mean, last], axis=-1)
