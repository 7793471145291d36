"""What a training has beside one network, one loss and one optimiser.

Floor 5. Behaviour cloning and the reward model need none of it. The offline-RL losses train a policy together
with a value function and dual variables, and read networks that stand still or lag behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rest_jax import errors
from rest_jax.training.optimizers import OptimizerConfig, Schedule, make_optimizer
from rest_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Companions:
    """Networks and optimisers of a training whose parameters are several named parts.

    Attributes:
      frozen: parameters of networks that the loss reads and nothing changes, by name, on their shardings.
        They are arguments of the training step, so that on a mesh each device holds its own piece.
      lagging: names of copies that follow parts of the parameters, and the part that each follows.
      sync_period: steps from one refreshing of the lagging copies to the next.
      optimizers: optimisers of parts of the parameters; parts not named have the trainer's own.
      project: brings the parameters back to where they are allowed, after every update.
      result: the part that is judged and kept in the end; None is all of it.

    Raises:
      ConfigError: the period is not positive.
    """

    frozen: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    lagging: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sync_period: int = 1
    optimizers: Mapping[str, OptimizerConfig] = dataclasses.field(default_factory=dict)
    project: Callable[[Params], Params] | None = None
    result: str | None = None

    def __post_init__(self) -> None:
        if self.sync_period < 1:
            raise errors.ConfigError(
                f"sync_period is {self.sync_period}",
                where="Companions.sync_period",
                remedy="Give the number of steps between two copies, at least 1",
            )

    def result_of(self, params: Params) -> Params:
        """The part that is judged and kept."""
        return params if self.result is None else params[self.result]

    def follow(self, lagging: Mapping[str, Params], params: Params, step: jax.Array) -> Mapping[str, Params]:
        """The lagging copies after `step` steps, the last of which led to `params`."""
        if not self.lagging:
            return lagging
        fresh = {name: params[part] for name, part in self.lagging.items()}
        due = step % self.sync_period == 0
        return jax.lax.cond(due, lambda: jax.tree.map(jnp.copy, fresh), lambda: dict(lagging))


def make_optimizers(
    config: OptimizerConfig, companions: Companions | None, params: Params
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimiser of all parts, each with its own clipping, and the learning rate of the trainer's own.

    Args:
      config: the trainer's own.
      companions: may name others for parts of the parameters.
      params: the parameters, or their shapes.

    Raises:
      ConfigError: an optimiser is given for a part that there is not.
    """
    own, schedule = make_optimizer(config)
    others = {} if companions is None else companions.optimizers
    if not others:
        return own, schedule
    for part in others:
        if part not in params:
            raise errors.ConfigError(
                f"an optimiser is given for {part!r}, and the parameters are {', '.join(sorted(params))}",
                where="Companions.optimizers",
                remedy="Name a part of the parameters",
            )
    transforms: dict[Any, optax.GradientTransformation] = {"": own}
    transforms |= {part: make_optimizer(other)[0] for part, other in others.items()}
    labels = {part: part if part in others else "" for part in params}
    return optax.partition(transforms, labels), schedule
