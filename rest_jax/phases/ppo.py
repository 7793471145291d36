"""The ppo phase: online RL from the BC policy, the baseline that ReST is compared with (Table 1).

Floor 6. The same sampler, reward and trainer as ReST's; what differs is that the samples of a rollout come
from the policy as it is at that moment, and that both good and bad ones teach it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_jax import errors, files, keys, processes
from rest_jax.network import init, mesh
from rest_jax.phases import losses, reward_model
from rest_jax.phases.improve import ValidationReward
from rest_jax.phases.lineage import BC, PPO
from rest_jax.phases.ppo_settings import PPOSettings
from rest_jax.phases.rollouts import ROLLOUTS_NAME, Rollouts
from rest_jax.phases.workspace import Workspace
from rest_jax.training import checkpoints, trainer
from rest_jax.training.companions import Companions
from rest_jax.types import Params

STORY_NAME = "ppo.json"


def train(workspace: Workspace) -> None:
    """Makes `policy/ppo`.

    Raises:
      ConfigError: the run has no settings of PPO, or D has fewer sources than a rollout takes.
      MissingInputError: the data, the BC policy or the reward is not there.
    """
    experiment, settings = workspace.experiment, _settings(workspace)
    workspace.run_step(
        workspace.policy_folder(PPO),
        "ppo",
        {
            "settings": settings,
            "decoding": experiment.decoding,
            "lengths": experiment.task_feature_lengths,
            "validation": {
                "sources": experiment.improve.validation_sources,
                "samples": experiment.improve.validation_samples,
                "sampling": experiment.evaluation.sampling,
            },
            "start": workspace.digest(workspace.policy_folder(BC), BC.phase),
            "reward": reward_model.reward_digest(workspace),
            "data": workspace.digest(workspace.text_folder, "vocab"),
        },
        lambda: _train(workspace, settings),
        scratch=("checkpoints", ROLLOUTS_NAME),
    )


def _settings(workspace: Workspace) -> PPOSettings:
    settings = workspace.experiment.ppo
    if settings is None:
        raise errors.ConfigError(
            "this run has no settings of PPO",
            where="Experiment.ppo",
            remedy="Include gin_configs/objectives/ppo.gin in the run file, and give PPOSettings.samples",
        )
    return settings


def _train(workspace: Workspace, settings: PPOSettings) -> Mapping[str, Any]:
    folder = workspace.policy_folder(PPO)
    rollouts = Rollouts(workspace, folder)
    workspace.logbook.say(
        f"PPO: {settings.rollouts} rollouts of {settings.sources_per_rollout} sources with "
        f"{settings.samples_per_source} translations each, {settings.samples:,} samples in all; "
        f"{settings.steps_per_rollout} steps on each rollout"
    )
    result = ppo_trainer(workspace, settings).fit(
        initial_params(workspace),
        rollouts.batch_at,
        [ValidationReward(workspace)],
        folder,
        workspace.logbook,
        keys.derived_seed(workspace.experiment.seed, "ppo"),
        before_batch=rollouts.before_batch,
    )
    story = {
        "samples": settings.samples_until(result.steps),
        "samples_at_best": settings.samples_until(result.best_step),
        "rollouts": -(-result.steps // settings.steps_per_rollout),
        "started_from": BC.folder,
        "steps": result.steps,
    }
    if processes.is_lead():
        files.write_json(folder / STORY_NAME, story)
        files.clear_folder(folder / ROLLOUTS_NAME)
    checkpoints.discard_checkpoints(folder)
    # What the table of several runs goes by; "samples" of an Improve step are those of its Grow step.
    return {**story, "sampled": story["samples"], "best_step": result.best_step, **result.best_metrics}


def initial_params(workspace: Workspace) -> dict[str, Params]:
    """The BC policy, and a value function on its trunk with a new head: {"policy": …, "value": …}."""
    start = workspace.policy_params(BC)
    key = keys.stream_key(workspace.experiment.seed, keys.Stream.INIT, round_index=2)
    value = init.init_value_params(workspace.experiment.policy, key, start)
    return {losses.POLICY: start, losses.CRITIC: value}


def ppo_trainer(workspace: Workspace, settings: PPOSettings) -> trainer.Trainer:
    """The shared trainer for a policy and its value function, of which the policy is the result."""
    config = workspace.experiment.policy
    shardings = {
        losses.POLICY: mesh.param_shardings(workspace.mesh, init.abstract_params(config)),
        losses.CRITIC: mesh.param_shardings(workspace.mesh, init.abstract_value_params(config)),
    }
    return trainer.Trainer(
        settings.trainer,
        losses.ppo_loss(config, settings.objective),
        workspace.mesh,
        shardings,
        Companions(optimizers={losses.CRITIC: settings.value_optimizer}, result=losses.POLICY),
    )
