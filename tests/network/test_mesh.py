from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from rest_jax.errors import ConfigError
from rest_jax.network.config import T5Config
from rest_jax.network.init import abstract_params
from rest_jax.network.mesh import MeshConfig, batch_sharding, make_mesh, param_shardings, replicated, use_mesh
from tests import tiny
from tests.network.tiny import SHALLOW, TINY


@pytest.fixture(scope="module")
def findings():
    """What mesh_probe.py found on four virtual devices."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.network.mesh_probe"],
        cwd=tiny.ROOT,
        env=tiny.environment(**tiny.on_devices(4, compiled="")),  # weights are compared bit by bit
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", ["4x1", "2x2"])
def test_four_devices_compute_what_one_does(findings, shape):
    assert findings["devices"] == 4
    found = findings[shape]
    assert found["value"] < 1e-6
    assert found["logits"] < 1e-4
    assert found["decoded"] < 1e-4
    assert found["gradients"] < 1e-5


@pytest.mark.parametrize("shape", ["4x1", "2x2"])
def test_weights_are_the_same_on_every_mesh(findings, shape):
    assert findings[shape]["fresh"] == 0
    assert findings["eager init"] == 0


def test_constraints_reach_the_program_under_use_mesh(findings):
    assert findings["constraints without a mesh"] == 0
    layers = SHALLOW.num_encoder_layers + SHALLOW.num_decoder_layers
    # At least queries, keys, values, the MLP and the output of every layer.
    assert findings["2x2"]["constraints"] >= 5 * layers


def test_arrays_are_split_as_the_rules_say(findings):
    e, f, v = TINY.emb_dim, TINY.mlp_dim, TINY.vocab_size
    assert findings["2x2"]["shards"] == {
        "embedding": [[v // 2, e]],
        "wo": [[f // 2, e]],
        "scale": [[e]],
        "source": [[2, 9]],
    }
    assert findings["4x1"]["shards"] == {
        "embedding": [[v, e]],
        "wo": [[f, e]],
        "scale": [[e]],
        "source": [[1, 9]],
    }


def _mesh_of(model):
    """A mesh of any shape: for specifications the device may stand in it many times over."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return mesh.abstract_mesh.update(axis_sizes=(1, model)) if model > 1 else mesh


def test_the_mesh_has_our_axes_and_leaves_the_partitioner_free():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == ("data", "model")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert batch_sharding(mesh).spec == PartitionSpec("data")
    assert replicated(mesh).spec == PartitionSpec()
    with use_mesh(mesh) as current:
        assert jax.sharding.get_abstract_mesh() == current.abstract_mesh


def test_every_parameter_has_a_sharding():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shardings = param_shardings(mesh, abstract_params(TINY))
    assert shardings["token_embedder"]["embedding"].spec == PartitionSpec("model", None)
    assert shardings["encoder"]["layers_0"]["attention"]["out"]["kernel"].spec == PartitionSpec("model", None)
    assert shardings["decoder"]["layers_0"]["mlp"]["wi_0"]["kernel"].spec == PartitionSpec(None, "model")
    assert shardings["decoder"]["relpos_bias"]["rel_embedding"].spec == PartitionSpec("model", None)
    assert shardings["decoder"]["logits_dense"]["kernel"].spec == PartitionSpec(None, "model")


def test_a_split_that_does_not_come_out_even_names_the_parameter():
    config = dataclasses.replace(T5Config(), vocab_size=1001, num_encoder_layers=1, num_decoder_layers=1)
    with pytest.raises(ConfigError, match="decoder/logits_dense/kernel .*1001.* 2 ways"):
        param_shardings(_mesh_of(2), abstract_params(config))


@pytest.mark.parametrize(("data", "model"), [(0, 1), (-2, 1), (1, 0), (-1, -1)])
def test_a_mesh_needs_whole_numbers(data, model):
    with pytest.raises(ConfigError, match="MeshConfig"):
        MeshConfig(data=data, model=model)


@pytest.mark.parametrize(
    "config", [MeshConfig(data=2, model=1), MeshConfig(model=2), MeshConfig(data=1, model=3)]
)
def test_a_mesh_uses_the_devices_up_exactly(config):
    with pytest.raises(ConfigError, match="does not fit 1 devices"):
        make_mesh(config, jax.devices()[:1])
