"""The sampler's program compiled for TPU chips that are not here. Skips without libtpu (the extra `tpu`)."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.generation.batching import DecodeBatching
from rest_jax.generation.prefixes import pool_places
from rest_jax.generation.sampler import SamplingConfig
from rest_jax.generation.translator import _sample_program
from rest_jax.network import init, mesh
from rest_jax.network.config import T5Config
from rest_jax.network.decoding import empty_pool
from rest_jax.network.transformer import kernels_as_read

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

# The widths of the paper's IWSLT policy, with two layers of its six.
CONFIG = T5Config(
    vocab_size=32_000, emb_dim=512, num_heads=4, head_dim=128, mlp_dim=1024,
    num_encoder_layers=2, num_decoder_layers=2, logits_via_embedding=True, dtype="bfloat16",
)  # fmt: skip
NUM_SAMPLES, MAX_LENGTH, SOURCE_LENGTH = 100, 128, 64
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.fixture(params=[1, 2], ids=["data=4", "data=2, model=2"])
def chips(request, monkeypatch):
    """Four chips of a v5e, split `request.param` ways along "model"."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return mesh.make_mesh(mesh.MeshConfig(model=request.param), list(topology.devices))


def test_the_pool_is_donated_and_chips_along_data_do_not_wait_for_each_other(chips):
    batching = DecodeBatching()
    tiling, devices = batching.tiling(NUM_SAMPLES), chips.shape[mesh.DATA_AXIS]
    queue = batching.queue_sources(NUM_SAMPLES)
    sampling = SamplingConfig(temperature=0.8, max_length=MAX_LENGTH)
    program = _sample_program(CONFIG, sampling, NUM_SAMPLES, tiling, None, chips)

    def of(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(chips, PartitionSpec(*axes)))

    def of_sources(dtype, *rest):
        return of((queue * devices, *rest), dtype, mesh.DATA_AXIS)

    boxed = init.abstract_params(CONFIG)
    shardings = mesh.param_shardings(chips, boxed)
    shapes = jax.eval_shape(functools.partial(kernels_as_read, CONFIG), mesh.unbox(boxed))
    params = jax.tree.map(lambda x, s: of(x.shape, x.dtype, *s.spec), shapes, shardings)
    places = devices * pool_places(tiling, queue, NUM_SAMPLES, MAX_LENGTH)
    pool = jax.tree.map(
        lambda x: of(x.shape, x.dtype, *mesh.pool_sharding(chips).spec),
        jax.eval_shape(lambda: empty_pool(CONFIG, places)),
    )
    key = of((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    ids, span = (of_sources(jnp.uint32),) * 2, (of((), jnp.uint32),) * 2
    with mesh.use_mesh(chips):
        lowered = program.lower(
            params, of_sources(jnp.int32, SOURCE_LENGTH), of_sources(bool), ids, key, span, pool
        )
        compiled = lowered.compile()

    memory = compiled.memory_analysis()
    pool_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool)) // chips.size
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes  # it is not copied within the program either
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", compiled.as_text())) for name in COLLECTIVES}
    if chips.shape[mesh.MODEL_AXIS] == 1:
        assert not any(found.values()), found
    else:
        assert found["all-reduce"] and not found["all-gather"], found  # weights stay where they lie
