"""The state of training, and where its arrays live.

Floor 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training needs to go on exactly where it stopped.

    Attributes:
      step: batches taken so far, int32 []; the next batch is `batch_at(step)`.
      params: the parameters.
      opt_state: the optimiser's statistics.
      skipped: updates left out because a loss or gradient was not finite, int32 [].
      skipped_in_a_row: how many of them were the latest steps, int32 [].
      lagging: earlier values of parts of the parameters, by name; empty for a loss that reads none.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    lagging: Mapping[str, Params] = dataclasses.field(default_factory=dict)


def new_state(
    params: Params, optimizer: optax.GradientTransformation, lagging: Mapping[str, str] | None = None
) -> TrainState:
    """The state before the first step.

    Args:
      params: the parameters.
      optimizer: the optimiser.
      lagging: names of lagging copies, and the part of the parameters that each is a copy of.
    """
    zero = jnp.zeros((), jnp.int32)
    copies = {name: jax.tree.map(jnp.copy, params[part]) for name, part in (lagging or {}).items()}
    return TrainState(zero, params, optimizer.init(params), zero, zero, copies)


def abstract_of(tree: Any) -> Any:
    """Shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def replicated_shardings(mesh: Mesh, tree: Any) -> Any:
    """A whole copy on every device, for each leaf of a tree."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def abstract_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    param_shardings: Any = None,
    lagging: Mapping[str, str] | None = None,
) -> TrainState:
    """The state as shapes, dtypes and shardings.

    A statistic of the optimiser that has its parameter's shape is cut as its parameter is. All others are
    whole on every device: counters, and Adafactor's row and column sums, which are small.

    Args:
      params: arrays or shapes of the parameters.
      optimizer: the optimiser.
      mesh: the devices.
      param_shardings: a `NamedSharding` for each parameter; None keeps them whole on every device.
      lagging: as for `new_state`; a copy is cut as its part is.
    """
    abstract_params = abstract_of(params)
    shardings = replicated_shardings(mesh, abstract_params) if param_shardings is None else param_shardings
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    located_params = jax.tree.map(placed, abstract_params, shardings)
    state = jax.eval_shape(lambda p: new_state(p, optimizer), abstract_params)

    def placed_as(leaf: Any, param: jax.ShapeDtypeStruct) -> Any:
        if isinstance(leaf, optax.MaskedNode):  # a part that another optimiser has
            return leaf
        return placed(leaf, param.sharding if leaf.shape == param.shape else whole)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        placed_as,
        state.opt_state,
        located_params,
        transform_non_params=lambda leaf: placed(leaf, whole),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    scalar = placed(state.step, whole)
    counters = {"step": scalar, "skipped": scalar, "skipped_in_a_row": scalar}
    copies = {name: located_params[part] for name, part in (lagging or {}).items()}
    return dataclasses.replace(state, params=located_params, opt_state=opt_state, lagging=copies, **counters)


def place(tree: Any, shardings: Any) -> Any:
    """Fresh device arrays with these shardings; the arrays given may be donated or changed afterwards.

    In several processes each must hold the same values, or the tree's arrays must be global already.
    """

    def spread(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    # The copy is made inside jit: a CPU array may share its memory with the NumPy array it came from.
    copy = jax.jit(lambda leaves: jax.tree.map(jnp.copy, leaves), out_shardings=shardings)
    return copy(jax.tree.map(spread, tree, shardings))


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    lagging: Mapping[str, str] | None = None,
) -> TrainState:
    """The state before the first step, on the devices that `abstract` says; `lagging` as for `new_state`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    placed = place(params, shardings.params)
    start = jax.jit(lambda p: new_state(p, optimizer, lagging), out_shardings=shardings, donate_argnums=0)
    return start(placed)


def bytes_per_device(abstract: Any) -> int:
    """Bytes that a tree with shardings takes on one device."""

    def shard_bytes(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(abstract))
