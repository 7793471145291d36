"""Optimisers and learning-rate schedules, by name.

Floor 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rest_jax import errors

Schedule = Callable[[jax.Array | int], jax.Array]

OPTIMIZERS = ("adafactor", "adamw", "adam", "lion", "sgd")
SCHEDULES = ("constant", "rsqrt", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser, its learning rate over time, and the clipping before it.

    Attributes:
      name: "adafactor" (Shazeer & Stern 2018, T5's), "adamw" (decoupled weight decay), "adam", "lion", "sgd".
      learning_rate: the peak rate, reached at the end of the warm-up. With Adafactor and
        `multiply_by_parameter_scale` it is relative to the size of each parameter, and 1e-3 fine-tunes a T5.
      schedule: what follows the warm-up.
        "constant": the peak rate for ever.
        "rsqrt": peak · sqrt(w / max(step, w)) with w = max(warmup_steps, 1). T5X writes the same curve as
          factor / sqrt(max(step, w)); its factor is our peak · sqrt(w).
        "linear", "cosine": from the peak to `final_fraction` of it at `decay_steps`, then level.
      warmup_steps: updates over which the rate rises in a straight line; update 0 already moves (1 / warmup).
      decay_steps: the update at which "linear" and "cosine" end, counted from the start of training.
      final_fraction: where "linear" and "cosine" end, as a fraction of the peak.
      b1: decay of the first moment (Adam, AdamW, Lion), or the momentum of SGD (0 is none). Adafactor has
        none.
      b2: decay of the second moment (Adam, AdamW) or of the momentum (Lion).
      eps: added to the root of the second moment (Adam, AdamW).
      weight_decay: decoupled weight decay: each update takes away the share rate · weight_decay (AdamW,
        Lion) or weight_decay (Adafactor) of a parameter. Adam and SGD have none.
      clip_norm: the gradient is scaled down to this global norm before the optimiser sees it; 0 turns it off.
      multiply_by_parameter_scale: Adafactor's relative step: the rate is multiplied by each parameter's
        root mean square.
    """

    name: str = "adafactor"
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-9
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    multiply_by_parameter_scale: bool = True

    def __post_init__(self) -> None:
        _known(self.name, OPTIMIZERS, "name")
        _known(self.schedule, SCHEDULES, "schedule")
        for field in ("learning_rate", "eps"):
            _require(_finite(self, field) > 0, self, field, "must be above 0")
        for field in ("weight_decay", "clip_norm", "warmup_steps"):
            _require(_finite(self, field) >= 0, self, field, "must be 0 or more")
        for field in ("b1", "b2"):
            _require(0 <= _finite(self, field) < 1, self, field, "must be in [0, 1)")
        _require(0 <= _finite(self, "final_fraction") <= 1, self, "final_fraction", "must be in [0, 1]")
        if self.schedule in ("linear", "cosine"):
            ends_after_warmup = self.decay_steps is not None and self.decay_steps > self.warmup_steps
            _require(ends_after_warmup, self, "decay_steps", "must be above warmup_steps with this schedule")
        if self.weight_decay and self.name in ("adam", "sgd"):
            _require(False, self, "weight_decay", f'is not for "{self.name}"; choose "adamw"')

    def scaled(self, factor: float) -> OptimizerConfig:
        """The same optimiser with its learning rate multiplied by `factor`."""
        return dataclasses.replace(self, learning_rate=self.learning_rate * factor)


def _finite(config: OptimizerConfig, field: str) -> float:
    value = getattr(config, field)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    _require(number, config, field, "must be a finite number")
    return float(value)


def _known(value: str, known: tuple[str, ...], field: str) -> None:
    if value not in known:
        raise errors.ConfigError(
            f'unknown {field} "{value}"',
            where=f"OptimizerConfig.{field}",
            remedy=f"Choose one of: {', '.join(known)}",
        )


def _require(condition: bool, config: OptimizerConfig, field: str, rule: str) -> None:
    if not condition:
        raise errors.ConfigError(
            f"{field} = {getattr(config, field)!r} {rule}",
            where=f"OptimizerConfig.{field}",
            remedy="Mend the binding",
        )


def make_schedule(config: OptimizerConfig) -> Schedule:
    """The learning rate as a function of the number of updates made before: float32 []."""
    after_warmup = _decay(config)

    def schedule(count: jax.Array | int) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rate = config.learning_rate * after_warmup(count)
        if config.warmup_steps:
            rising = config.learning_rate * (count + 1) / config.warmup_steps
            rate = jnp.where(count < config.warmup_steps, rising, rate)
        return jnp.asarray(rate, jnp.float32)

    return schedule


def _decay(config: OptimizerConfig) -> Callable[[jax.Array], jax.Array]:
    """The curve after the warm-up, as a fraction of the peak."""
    if config.schedule == "constant":
        return jnp.ones_like
    if config.schedule == "rsqrt":
        plateau = max(config.warmup_steps, 1)
        return lambda count: jnp.sqrt(plateau / jnp.maximum(count, plateau))
    assert config.decay_steps is not None  # checked by OptimizerConfig
    start, length = config.warmup_steps, config.decay_steps - config.warmup_steps
    floor = config.final_fraction

    def falling(count: jax.Array) -> jax.Array:
        done = jnp.clip((count - start) / length, 0.0, 1.0)
        left = 1 - done if config.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * done))
        return floor + (1 - floor) * left

    return falling


def make_optimizer(config: OptimizerConfig) -> tuple[optax.GradientTransformation, Schedule]:
    """Builds the optimiser with clipping in front, and its schedule.

    The schedule counts the updates that were made: one that was skipped for a non-finite gradient does not
    count.
    """
    schedule = make_schedule(config)
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adafactor": lambda: optax.adafactor(
            schedule,
            multiply_by_parameter_scale=config.multiply_by_parameter_scale,
            weight_decay_rate=config.weight_decay or None,
        ),
        "adamw": lambda: optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
        ),
        "adam": lambda: optax.adam(schedule, b1=config.b1, b2=config.b2, eps=config.eps),
        "lion": lambda: optax.lion(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
        "sgd": lambda: optax.sgd(schedule, momentum=config.b1 or None),
    }
    optimizer = makers[config.name]()
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer, schedule
