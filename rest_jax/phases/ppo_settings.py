"""The settings of the online-RL baseline.

Floor 6.
"""

from __future__ import annotations

import dataclasses

from rest_jax import errors
from rest_jax.generation import sampler
from rest_jax.objectives import ppo
from rest_jax.training import optimizers, trainer


@dataclasses.dataclass(frozen=True)
class PPOSettings:
    """PPO in place of ReST's Grow and Improve steps: as many samples, drawn from the policy as it is trained.

    Training is a number of rollouts. In each the policy of that moment translates some sources, its
    translations are scored, and the trainer takes its share of steps on them. Their number follows from
    `samples`.

    Attributes:
      samples: translations sampled in all; for a fair comparison as many as in the Grow steps of the ReST run
        (G · N · sources).
      trainer: how; `train_steps` is of the whole training and is spread evenly over the rollouts.
        The batches are packed rows, as everywhere.
      value_optimizer: of the value function, which is a network of its own.
      objective: clipping, penalty and advantages.
      sources_per_rollout: sources translated in a rollout, taken from a new permutation of D in each pass.
      samples_per_source: N, translations of each of them.
      sampling: how they are drawn. The ratios of PPO are of the policy at temperature 1: at another
        temperature, or with top-k or top-p, the samples are not quite the policy's own.

    Raises:
      ConfigError: the budget is not a whole number of rollouts, the steps cannot be spread evenly, or a batch
        has more rows than a rollout has translations.
    """

    samples: int
    trainer: trainer.TrainerConfig
    value_optimizer: optimizers.OptimizerConfig
    objective: ppo.PPOConfig = ppo.PPOConfig()
    sources_per_rollout: int = 128
    samples_per_source: int = 8
    sampling: sampler.SamplingConfig = sampler.SamplingConfig(temperature=1.0)

    def __post_init__(self) -> None:
        for name in ("samples", "sources_per_rollout", "samples_per_source"):
            value = getattr(self, name)
            errors.require(value >= 1, f"{name} is {value}", f"PPOSettings.{name}", "Give at least 1")
        size = self.samples_per_rollout
        errors.require(
            self.samples % size == 0,
            f"{self.samples} samples are no whole number of rollouts of {self.sources_per_rollout} sources "
            f"with {self.samples_per_source} translations each",
            "PPOSettings.samples",
            f"Give a multiple of {size}, such as {max(round(self.samples / size), 1) * size}",
        )
        steps, rollouts = self.trainer.train_steps, self.rollouts
        errors.require(
            steps % rollouts == 0,
            f"{steps} steps cannot be spread evenly over {rollouts} rollouts",
            "PPOSettings.trainer",
            f"Give TrainerConfig.train_steps a multiple of {rollouts}",
        )
        errors.require(
            self.trainer.batch_size <= size,
            f"a batch of {self.trainer.batch_size} rows is larger than a rollout of {size} translations",
            "PPOSettings.trainer",
            "Lower TrainerConfig.batch_size, or raise PPOSettings.sources_per_rollout",
        )
        errors.require(
            self.samples_per_source >= 2 or not self.objective.normalise_rewards,
            "one sample a source is always 0 after normalising",
            "PPOSettings.samples_per_source",
            "Give at least 2, or PPOConfig.normalise_rewards = False",
        )

    @property
    def samples_per_rollout(self) -> int:
        """Translations in one rollout."""
        return self.sources_per_rollout * self.samples_per_source

    @property
    def rollouts(self) -> int:
        """Rollouts in the whole training."""
        return self.samples // self.samples_per_rollout

    @property
    def steps_per_rollout(self) -> int:
        """Steps of the trainer on each rollout."""
        return self.trainer.train_steps // self.rollouts

    def samples_until(self, step: int) -> int:
        """Translations sampled before the trainer's step `step` was done."""
        return -(-step // self.steps_per_rollout) * self.samples_per_rollout
