"""One step of training: gradients summed over micro-batches, one update, and its numbers.

Floor 5. Losses are sums with a weight (`types.LossSums`), so micro-batches and devices add up to the one big
batch and are divided once, at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.network.mesh import DATA_AXIS, batch_sharding, replicated
from rest_jax.training.companions import Companions
from rest_jax.training.optimizers import Schedule
from rest_jax.training.state import TrainState
from rest_jax.types import ContextLossFn, LossContext, LossFn, LossSums, Params

StepMetrics = dict[str, Any]
# (state, batch, key data of the dropout stream, frozen networks) -> (state, metrics)
TrainStep = Callable[[TrainState, Any, Any, Mapping[str, Params]], tuple[TrainState, StepMetrics]]


def sum_gradients(
    loss_fn: LossFn, params: Params, batch: Any, dropout_key: jax.Array, microbatches: int, mesh: Mesh
) -> tuple[Params, LossSums]:
    """The gradient of the summed loss of a batch, and its sums, by going over `microbatches` parts in turn.

    Args:
      loss_fn: the loss.
      params: float32 parameters.
      batch: a pytree of arrays whose leading axis B is a multiple of `microbatches`.
      dropout_key: typed key []; each micro-batch folds its number into it.
      microbatches: how many parts; memory for activations is that of one part.
      mesh: the devices.

    Returns:
      Gradients as float32, undivided; loss, weight and metrics summed over the batch.
    """

    def summed(p: Params, part: Any, key: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = loss_fn(p, part, key)
        return sums.loss, sums

    def one(part: Any, index: jax.Array | int) -> tuple[Params, LossSums]:
        key = jax.random.fold_in(dropout_key, index)
        gradients, sums = jax.grad(summed, has_aux=True)(params, part, key)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    if microbatches == 1:
        return one(batch, 0)

    def add(total: Any, numbered_part: Any) -> tuple[Any, None]:
        index, part = numbered_part
        return jax.tree.map(jnp.add, total, one(part, index)), None

    parts = jax.tree.map(lambda x: _split_rows(x, microbatches, mesh), batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts), 0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(microbatches), parts))
    return total


def _split_rows(rows: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """[B, …] to [parts, B / parts, …], so that no row leaves its device: part i takes rows i, i + parts, …"""
    split = rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(split, NamedSharding(mesh, PartitionSpec(None, DATA_AXIS)))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step makes smaller.

    Attributes:
      loss_fn: the loss; with companions it takes a `LossContext` as its fourth argument.
      companions: further networks and optimisers; None is a loss of one network.
      train_steps: steps of the whole training, for losses with a schedule of their own.
    """

    loss_fn: LossFn | ContextLossFn
    companions: Companions | None = None
    train_steps: int = 1

    def bound(self, state: TrainState, frozen: Mapping[str, Params]) -> LossFn:
        """The loss as a function of parameters, batch and key, in this state."""
        if self.companions is None:
            return cast("LossFn", self.loss_fn)
        progress = state.step.astype(jnp.float32) / self.train_steps
        context = LossContext(frozen, state.lagging, progress)
        with_context = cast("ContextLossFn", self.loss_fn)
        return lambda params, batch, key: with_context(params, batch, key, context)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    microbatches: int,
    mesh: Mesh,
    abstract: TrainState,
) -> TrainStep:
    """Compiles one step, donating the state given.

    Where the loss, the gradient or a new parameter is not finite, parameters and optimiser stay as they are
    and the step is counted as skipped.
    """
    companions = objective.companions

    def step(
        state: TrainState, batch: Any, key_data: jax.Array, frozen: Mapping[str, Params]
    ) -> tuple[TrainState, StepMetrics]:
        stream = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        key = jax.random.fold_in(stream, state.step)
        loss_fn = objective.bound(state, frozen)
        gradients, sums = sum_gradients(loss_fn, state.params, batch, key, microbatches, mesh)
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        norm = optax.global_norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if companions is not None and companions.project is not None:
            params = companions.project(params)

        finite = _once(jnp.isfinite(sums.loss) & jnp.isfinite(norm) & _all_finite(params))
        skipped = 1 - finite.astype(jnp.int32)
        params = _where(finite, params, state.params)
        lagging = (
            state.lagging if companions is None else companions.follow(state.lagging, params, state.step + 1)
        )
        following = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=_where(finite, opt_state, state.opt_state),
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
            lagging=lagging,
        )
        metrics = {
            "sums": {"loss": (sums.loss, sums.weight), **sums.metrics},
            "weight": sums.weight,
            "grad_norm": norm,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped": skipped,
            "skipped_in_a_row": following.skipped_in_a_row,
        }
        return following, metrics

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh), replicated(mesh), None),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _all_finite(tree: Any) -> jax.Array:
    # 0 * x is NaN where x is not finite. A sum is one pass; of `isfinite` XLA would write an array first.
    return jnp.equal(sum(jnp.sum(leaf * 0) for leaf in jax.tree.leaves(tree)), 0)


def _once(condition: jax.Array) -> jax.Array:
    """The same condition, as a number that is computed once.

    XLA would put the whole of it, with a part for each parameter, into every place that asks for it, one for
    each array of the state. That is most of the program, and most of the time that it takes to compile.
    """
    return jax.lax.cond(condition, lambda: jnp.ones((1,), bool), lambda: jnp.zeros((1,), bool))[0]


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Spreads a host batch over the devices by rows; in several processes each holds the whole of it."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda rows: jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index]), batch
    )
