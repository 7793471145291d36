"""The device mesh and the rules that lay logical axes on it.

Floor 2. Everything runs under `use_mesh`, on one device as on many: flax 0.12 sees a mesh only when it was
set with `jax.set_mesh`; under a plain `with mesh:` every constraint is dropped without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rest_jax.errors import ConfigError

DATA_AXIS = "data"
MODEL_AXIS = "model"

# T5X's standard rules with one-dimensional partitioning: rows over `data`, wide dimensions over `model`.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ("batch", DATA_AXIS),
    ("vocab", MODEL_AXIS),
    ("mlp", MODEL_AXIS),
    ("heads", MODEL_AXIS),
    ("joined_kv", MODEL_AXIS),
    ("embed", None),
    ("kv", None),
    ("length", None),
    ("samples", None),
    ("relpos_buckets", None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many ways to split the work.

    Attributes:
      data: ways to split the rows of a batch; -1 takes what `model` leaves.
      model: ways to split each wide matrix.

    Raises:
      ConfigError: a number is 0 or below (other than data = -1).
    """

    data: int = -1
    model: int = 1

    def __post_init__(self) -> None:
        if self.data < 1 and self.data != -1:
            raise ConfigError(
                f"data is {self.data}", where="MeshConfig.data", remedy="Give a number of at least 1, or -1"
            )
        if self.model < 1:
            raise ConfigError(
                f"model is {self.model}", where="MeshConfig.model", remedy="Give a number of at least 1"
            )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh with axes ("data", "model").

    Args:
      config: the shape asked for.
      devices: what to lay out; None is every device of every process.

    Raises:
      ConfigError: the shape does not use the devices up exactly.
    """
    devices = jax.devices() if devices is None else list(devices)
    data = len(devices) // config.model if config.data == -1 else config.data
    if data * config.model != len(devices):
        asked = "what is left" if config.data == -1 else str(config.data)
        raise ConfigError(
            f"a mesh of data={asked} x model={config.model} does not fit {len(devices)} devices",
            where="MeshConfig",
            remedy="Choose data x model equal to the number of devices, or data = -1",
        )
    shape, names, types = (data, config.model), (DATA_AXIS, MODEL_AXIS), (AxisType.Auto,) * 2
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Makes `mesh` and the logical axis rules current: trace, compile and run jitted functions in here."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield mesh


@contextlib.contextmanager
def within_data_axis() -> Iterator[None]:
    """For code that `jax.shard_map` has divided over "data": all rows of a batch are this device's."""
    rules = tuple((name, None if axis == DATA_AXIS else axis) for name, axis in LOGICAL_AXIS_RULES)
    with nn.logical_axis_rules(rules):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis (rows) over `data`; the rest is whole on every device."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def pool_sharding(mesh: Mesh) -> NamedSharding:
    """Splits a sampler's pool [P, H * D]: each device along `data` has places of its own."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS, MODEL_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def unbox(boxed_variables: Any) -> Any:
    """The tree without the boxes that hold logical axis names; a tree without boxes comes back as it is.

    `nn.meta.unbox` would also put a sharding constraint on every leaf under `use_mesh`, and fails there on
    shapes and on arrays outside `jit`.
    """

    def open_box(leaf: Any) -> Any:
        return leaf.unbox(apply_constraint=False) if isinstance(leaf, nn.LogicallyPartitioned) else leaf

    return jax.tree.map(open_box, boxed_variables, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def param_shardings(mesh: Mesh, abstract_boxed_variables: Any) -> Any:
    """The sharding of every parameter, from the logical axis names it was declared with.

    Args:
      mesh: a mesh of `make_mesh`.
      abstract_boxed_variables: `abstract_params(config)`, or a tree around such trees (an optimiser's state
        made by `jax.eval_shape` keeps the boxes of its parameters).

    Returns:
      The same tree, unboxed, with a NamedSharding at every leaf.

    Raises:
      ConfigError: a split dimension is not a multiple of the devices it is split over.
    """
    specs = nn.get_partition_spec(abstract_boxed_variables)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, LOGICAL_AXIS_RULES)
    shapes = unbox(abstract_boxed_variables)
    jax.tree_util.tree_map_with_path(_check_divides, shapes, shardings)
    return shardings


def _check_divides(path: Any, leaf: Any, sharding: NamedSharding) -> None:
    for size, axis in zip(np.shape(leaf), sharding.spec, strict=False):
        if axis is None:
            continue
        ways = math.prod(sharding.mesh.shape[a] for a in ([axis] if isinstance(axis, str) else axis))
        if size % ways:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ConfigError(
                f"parameter {name} of shape {np.shape(leaf)} cannot be split {ways} ways",
                where=f"MeshConfig.{axis}",
                remedy=f"Choose a size that is a multiple of {ways}, or fewer ways",
            )
