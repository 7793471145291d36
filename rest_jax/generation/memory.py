"""How much memory of a device the sampler takes, before anything is compiled.

Floor 4. The large parts are known from the shapes: the keys and values of prefixes, for which each lane has
as many places as its samples could have tokens, and those of the sources.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from rest_jax.generation.batching import DecodeBatching
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.network.config import T5Config
from rest_jax.network.init import abstract_params
from rest_jax.network.mesh import unbox

_MIB = 2**20
_FLOAT32 = 4
# Copies of a tile's logits that are alive at a time: raw, shaped, exponentials, and what XLA keeps between.
_LOGITS = 6
# Copies of an output: the loop's, the result's, and that of the call before, which waits for the host.
_OUTPUTS = 3


@dataclasses.dataclass(frozen=True)
class SamplerMemory:
    """Bytes on one device while it samples, by what they are for.

    Attributes:
      parameters: of the policy, float32.
      prefixes: keys and values of the prefixes in work.
      sources: keys and values of the sources in work, and what the encoder needs for a batch of them.
      step: what one step takes: keys and values of its rows, logits.
      samples: what was drawn.
    """

    parameters: int
    prefixes: int
    sources: int
    step: int
    samples: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = {name: round(size / _MIB) for name, size in dataclasses.asdict(self).items()}
        listed = ", ".join(f"{name} {size:,}" for name, size in parts.items())
        return f"{self.total / _MIB:,.0f} MiB a device ({listed})"


def sampler_memory(
    config: T5Config,
    batching: DecodeBatching,
    sampling: SamplingConfig,
    num_samples: int,
    longest_source: int,
    model_ways: int = 1,
) -> SamplerMemory:
    """What sampling takes on each device, on the safe side.

    Args:
      config: the policy.
      batching: the shapes that it is sampled in.
      sampling: for the longest translation.
      num_samples: N.
      longest_source: tokens of the longest source; its length bucket is what counts.
      model_ways: ways that wide matrices are divided over (`MeshConfig.model`).
    """
    length = next((b for b in batching.source_lengths if b >= longest_source), batching.source_lengths[-1])
    tiling, at_a_time = batching.tiling(num_samples), batching.samples_at_a_time(num_samples)
    width = jnp.dtype(config.dtype).itemsize
    # Key and value of one position in every decoder layer.
    position = 2 * config.num_decoder_layers * config.joined_kv_dim * width // model_ways
    layer = position // config.num_decoder_layers
    queue = batching.queue_sources(num_samples)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(unbox(abstract_params(config))))
    attention = _FLOAT32 * config.num_heads * length * 2 // model_ways
    wide = (len(config.mlp_activations) + 1) * config.mlp_dim // model_ways
    hidden = width * (wide + 6 * config.emb_dim)
    encoder = tiling.sources * length * (attention + hidden)
    drawn = queue * at_a_time * (sampling.max_length * 3 * _FLOAT32 + 16)
    in_lanes = tiling.lanes * at_a_time * sampling.max_length
    # What an accelerator gathers for a tile: XLA may read the keys and values of all layers ahead.
    ancestors = tiling.rows * sampling.max_length * layer * (config.num_decoder_layers + 1)
    # Kernels that are not read in float32 are held beside those that are.
    of_parameter = _FLOAT32 if width == _FLOAT32 else _FLOAT32 + width
    return SamplerMemory(
        parameters=of_parameter * parameters // model_ways,
        prefixes=in_lanes * (position + 2 * _FLOAT32),
        sources=(2 * tiling.sources + tiling.lanes) * length * position + encoder,
        step=ancestors + _LOGITS * _FLOAT32 * tiling.rows * config.vocab_size,
        samples=_OUTPUTS * drawn,
    )
