"""An Improve step: the fine-tuning on what passes the filter (Algorithm 1, eq. 2).

Floor 6. What passes is found in `selection`; the previous policy is fine-tuned on it with a lower learning
rate than the step before; the checkpoint whose samples on the validation set have the highest mean reward
is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rest_jax import errors, files, keys, processes
from rest_jax.data import batches
from rest_jax.phases import reward_model, selection
from rest_jax.phases.evaluate import mean_reward
from rest_jax.phases.learners import make_learner
from rest_jax.phases.lineage import PolicyName, improve_index, starting_policy
from rest_jax.phases.pretrain import describe_rows
from rest_jax.phases.workspace import Workspace
from rest_jax.training import checkpoints, trainer
from rest_jax.types import Params

STORY_NAME = "improve.json"


def improve(workspace: Workspace, name: PolicyName) -> None:
    """Makes `policy/gG_iI`.

    Raises:
      ConfigError: the run has no such Improve step, or τ1 is not above the mean reward of the Grow set.
      DataError: nothing passes the filter, or a side that `model_share` wants is empty.
    """
    experiment = workspace.experiment
    steps_of = experiment.improve.steps_of
    steps = steps_of(name.grow)
    first = 0 if experiment.improve.unfiltered else 1
    if not (1 <= name.grow <= experiment.grow_steps and first <= name.improve <= steps):
        raise errors.ConfigError(
            f"this run has no Improve step {name.folder}: G = {experiment.grow_steps}, I = {steps}",
            remedy="Choose --grow_step from 1 to G and --improve_step from 1 to I; 0 is there if "
            "ImproveConfig.unfiltered says so",
        )
    start = starting_policy(name, steps_of, experiment.improve.start_from == "base")
    workspace.run_step(
        workspace.policy_folder(name),
        "improve",
        {
            "grow": name.grow,
            "improve": name.improve,
            "settings": experiment.improve,
            "decoding": experiment.decoding,
            "start": workspace.digest(
                workspace.policy_folder(start), "improve" if start.grow else "pretrain"
            ),
            "rewards": workspace.digest(workspace.grow_rewards_folder(name.grow), "annotate"),
            **selection.earlier_rewards(workspace, name.grow),
            **_value_identity(workspace, name),
            "dataset_rewards": workspace.digest(workspace.dataset_rewards_folder, "annotate"),
        },
        lambda: _improve(workspace, name, start),
        scratch=("checkpoints",),
    )


def _value_identity(workspace: Workspace, name: PolicyName) -> dict[str, Any]:
    """The value function, where the loss reads one."""
    if not workspace.experiment.needs_value:
        return {}
    return {
        "value": workspace.digest(workspace.value_folder(name.grow), "value"),
        "value_settings": workspace.experiment.value,
    }


def trainer_config(workspace: Workspace, name: PolicyName) -> trainer.TrainerConfig:
    """The trainer's settings, with the learning rate that this Improve step has come down to."""
    settings = workspace.experiment.improve
    factor = settings.learning_rate_decay ** improve_index(name, settings.steps_of)
    return dataclasses.replace(settings.trainer, optimizer=settings.trainer.optimizer.scaled(factor))


def _improve(workspace: Workspace, name: PolicyName, start: PolicyName) -> Mapping[str, Any]:
    experiment = workspace.experiment
    selected = selection.select(workspace, name)
    story = {
        **selected.story,
        "started_from": start.folder,
        "learning_rate": trainer_config(workspace, name).optimizer.learning_rate,
    }
    if processes.is_lead():
        files.write_json(workspace.policy_folder(name) / STORY_NAME, story)
    workspace.logbook.say(f"{name.folder}: {selection.told(story)}")
    config = trainer_config(workspace, name)
    seed = keys.derived_seed(experiment.seed, "improve", name.grow, name.improve)
    learner = make_learner(workspace, name, workspace.policy_params(start), selected, config.batch_size)
    training_batches = batches.PackedBatches(
        learner.pairs,
        batch_size=config.batch_size,
        source_length=experiment.source_length,
        target_length=experiment.target_length,
        seed=seed,
    )
    workspace.logbook.say(describe_rows(training_batches))
    fine_tuning = trainer.Trainer(
        config, learner.loss_fn, workspace.mesh, learner.shardings, learner.companions
    )
    result = fine_tuning.fit(
        learner.params,
        training_batches.at,
        [ValidationReward(workspace)],
        workspace.policy_folder(name),
        workspace.logbook,
        seed,
    )
    checkpoints.discard_checkpoints(workspace.policy_folder(name))
    return {**story, "best_step": result.best_step, **result.best_metrics}


class ValidationReward:
    """Evaluator: the mean reward of samples on the validation set, as {"valid/reward": …}.

    The random numbers are the same at every evaluation, so that two checkpoints differ by their
    parameters alone.
    """

    def __init__(self, workspace: Workspace):
        settings = workspace.experiment.improve
        examples = workspace.split("valid")
        self._examples = examples.take(np.arange(len(examples))[: settings.validation_sources])
        self._workspace, self._settings = workspace, settings
        self._reward = reward_model.load_reward(workspace)
        self._key = keys.stream_key(workspace.experiment.seed, keys.Stream.VALIDATE)

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """Samples and scores."""
        del step
        translations = self._workspace.translator(params).sample(
            self._examples.tokens.sources,
            self._examples.ids,
            self._settings.validation_samples,
            self._key,
            self._workspace.experiment.evaluation.sampling,
        )
        reward = mean_reward(self._workspace, self._reward, self._examples, translations)
        return {"valid/reward": reward}
