"""Evaluators: what a training is judged by while it runs.

Floor 5. An evaluator is any callable (params, step) -> {metric name: float}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from rest_jax.network.mesh import batch_sharding, replicated, use_mesh
from rest_jax.training.averages import mean
from rest_jax.training.step import place_batch
from rest_jax.types import LossFn, LossSums, Params

Evaluator = Callable[[Params, int], dict[str, float]]


class LossEvaluator:
    """The loss without dropout over fixed batches: {"valid/loss": …, "valid/<metric>": …}.

    Args:
      loss_fn: the loss; it is called without a dropout key.
      batches: host batches of one shape; rows that only fill a batch have weight 0.
      mesh: the devices.
      name: the split, in front of the names of the metrics.
    """

    def __init__(self, loss_fn: LossFn, batches: Sequence[Any], mesh: Mesh, name: str = "valid"):
        self._batches, self._mesh, self._name = batches, mesh, name

        def sums(params: Params, batch: Any) -> LossSums:
            return loss_fn(params, batch, None)

        self._sums = jax.jit(sums, in_shardings=(None, batch_sharding(mesh)), out_shardings=replicated(mesh))

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """Averages over all batches, summed on the host as float64."""
        del step
        totals: dict[str, tuple[float, float]] = {}
        with use_mesh(self._mesh):
            pending = [self._sums(params, place_batch(batch, self._mesh)) for batch in self._batches]
            for sums in map(jax.device_get, pending):
                for key, (value, weight) in {"loss": (sums.loss, sums.weight), **sums.metrics}.items():
                    before = totals.get(key, (0.0, 0.0))
                    totals[key] = (before[0] + float(value), before[1] + float(weight))
        return {f"{self._name}/{key}": mean(*pair) for key, pair in totals.items()}
