"""What the sampler is said to take, against what XLA allots and what a process really takes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.peak import peak_bytes
from rest_jax import keys
from rest_jax.generation import translator as translators
from rest_jax.generation.batching import DecodeBatching
from rest_jax.generation.memory import sampler_memory
from rest_jax.generation.prefixes import pool_places
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.generation.translator import Translator
from rest_jax.network.config import T5Config
from rest_jax.network.decoding import empty_pool
from rest_jax.network.init import abstract_params, init_params
from rest_jax.network.mesh import unbox, use_mesh
from rest_jax.network.transformer import kernels_as_read
from rest_jax.types import EOS_ID, RaggedTokens
from tests.generation.small import one_device

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
CONFIG = T5Config(
    vocab_size=1000, emb_dim=64, num_heads=4, head_dim=16, mlp_dim=128,
    num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.0,
)  # fmt: skip
IN_BFLOAT16 = dataclasses.replace(CONFIG, dtype="bfloat16")
# Web Domain's thousand samples a source, and a source of 500 tokens among shorter ones.
CASES = {
    "1000 samples": (CONFIG, DecodeBatching(source_lengths=(16,)), 1000, 32, 16),
    "500 tokens": (CONFIG, DecodeBatching(source_batch=8, source_lengths=(16, 512)), 50, 32, 500),
    "neither": (CONFIG, DecodeBatching(source_lengths=(32,)), 8, 64, 32),
    "bfloat16": (IN_BFLOAT16, DecodeBatching(source_lengths=(32,)), 8, 64, 32),
}


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_a_little_more_than_xla_allots(case):
    config, batching, num_samples, max_length, source_length = CASES[case]
    sampling = SamplingConfig(max_length=max_length)
    predicted = sampler_memory(config, batching, sampling, num_samples, source_length).total
    queue, bucket = batching.queue_sources(num_samples), batching.source_lengths[-1]
    program = translators._sample_program(
        config, sampling, num_samples, batching.tiling(num_samples), None, one_device()
    )
    shape = jax.ShapeDtypeStruct
    params = jax.eval_shape(functools.partial(kernels_as_read, config), unbox(abstract_params(config)))
    halves = (shape((queue,), jnp.uint32),) * 2
    span = (shape((), jnp.uint32),) * 2
    key = jax.eval_shape(lambda: keys.stream_key(0, keys.Stream.GROW))
    places = pool_places(batching.tiling(num_samples), queue, num_samples, max_length)
    pool = jax.eval_shape(lambda: empty_pool(config, places))
    with use_mesh(one_device()):
        lowered = program.lower(
            params, shape((queue, bucket), jnp.int32), shape((queue,), bool), halves, key, span, pool
        )
        found = lowered.compile().memory_analysis()
    # The pool goes in and comes out in the same place.
    assert found.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool))
    own_output = found.output_size_in_bytes - found.alias_size_in_bytes
    allotted = found.argument_size_in_bytes + own_output + found.temp_size_in_bytes
    assert allotted <= predicted <= 2 * allotted


_SAMPLE = """
import json, sys
from tests.generation.test_memory import really_sample
print(json.dumps(really_sample(sys.argv[1])))
"""


def really_sample(case: str) -> dict[str, int]:
    """Samples a few sources twice; what was predicted, and by how much the second time took the process up.

    The first time is for the compiler, whose own memory is not the sampler's.
    """
    config, batching, num_samples, max_length, source_length = CASES[case]
    sampling = SamplingConfig(max_length=max_length)
    params = init_params(config, jax.random.key(0))
    sources = RaggedTokens.from_lists([[*range(3, 2 + n), EOS_ID] for n in (source_length, 9, source_length)])

    def draw() -> int:
        # A translator that is gone afterwards, with its pool.
        translator = Translator(config, params, one_device(), batching)
        return len(translator.sample(sources, np.arange(3), num_samples, jax.random.key(0), sampling).tokens)

    draw()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, from what is held now
    before = peak_bytes()
    samples = draw()
    predicted = sampler_memory(config, batching, sampling, num_samples, source_length).total
    return {"samples": samples, "grown": peak_bytes() - before, "predicted": predicted}


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak anew"
)
@pytest.mark.parametrize("case", ["1000 samples", pytest.param("500 tokens", marks=pytest.mark.slow)])
def test_a_process_takes_no_more_than_was_predicted(case):
    """The parameters are there before, so they are no part of the growth."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _SAMPLE, case]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == 3 * CASES[case][2]
    print(found)
    assert found["predicted"] / 4 <= found["grown"] <= found["predicted"]


def test_parts_add_up_and_are_told():
    memory = sampler_memory(CONFIG, DecodeBatching(), SamplingConfig(max_length=32), 100, 16)
    assert memory.total == (
        memory.parameters + memory.prefixes + memory.sources + memory.step + memory.samples
    )
    assert "prefixes" in str(memory) and "MiB a device" in str(memory)
    halved = sampler_memory(CONFIG, DecodeBatching(), SamplingConfig(max_length=32), 100, 16, model_ways=2)
    assert halved.parameters == memory.parameters // 2 and halved.prefixes < memory.prefixes
