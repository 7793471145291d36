"""An Improve step: what passes the threshold, and the fine-tuning on it (Algorithm 1, eq. 2).

Floor 6. The union of the Grow set and the original data D is filtered strictly above τ; the previous
policy is fine-tuned on the survivors with a lower learning rate than the step before; the checkpoint
whose samples on the validation set have the highest mean reward is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from rest_jax import errors, files, keys, processes
from rest_jax.data import batches
from rest_jax.objectives import filters, statistics
from rest_jax.phases import grow_set as grow_sets
from rest_jax.phases import reward_model
from rest_jax.phases.evaluate import mean_reward
from rest_jax.phases.grow_set import GrowSet
from rest_jax.phases.lineage import PolicyName, improve_index, starting_policy
from rest_jax.phases.losses import policy_loss
from rest_jax.phases.pretrain import describe_rows, policy_trainer
from rest_jax.phases.workspace import Workspace
from rest_jax.training import checkpoints, trainer
from rest_jax.types import Params, TokenPairs

STORY_NAME = "improve.json"


def improve(workspace: Workspace, name: PolicyName) -> None:
    """Makes `policy/gG_iI`.

    Raises:
      ConfigError: the run has no such Improve step, or τ1 is not above the mean reward of the Grow set.
      DataError: nothing passes the threshold.
    """
    experiment = workspace.experiment
    steps = experiment.improve.steps
    if not (1 <= name.grow <= experiment.grow_steps and 1 <= name.improve <= steps):
        raise errors.ConfigError(
            f"this run has no Improve step {name.folder}: G = {experiment.grow_steps}, I = {steps}",
            remedy="Choose --grow_step from 1 to G and --improve_step from 1 to I",
        )
    start = starting_policy(name, steps)
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
            "dataset_rewards": workspace.digest(workspace.dataset_rewards_folder, "annotate"),
        },
        lambda: _improve(workspace, name, start),
        scratch=("checkpoints",),
    )


def trainer_config(workspace: Workspace, name: PolicyName) -> trainer.TrainerConfig:
    """The trainer's settings, with the learning rate that this Improve step has come down to."""
    settings = workspace.experiment.improve
    factor = settings.learning_rate_decay ** improve_index(name, settings.steps)
    return dataclasses.replace(settings.trainer, optimizer=settings.trainer.optimizer.scaled(factor))


def _improve(workspace: Workspace, name: PolicyName, start: PolicyName) -> Mapping[str, Any]:
    experiment, settings = workspace.experiment, workspace.experiment.improve
    grow_set = grow_sets.open_grow_set(workspace, name.grow)
    tau = _threshold(workspace, grow_set, name)
    pairs, story = _survivors(workspace, grow_set, tau)
    quantiles = settings.thresholds.quantiles
    story |= {
        "threshold_quantile": quantiles[name.improve - 1] if quantiles else None,
        "started_from": start.folder,
        "learning_rate": trainer_config(workspace, name).optimizer.learning_rate,
    }
    if processes.is_lead():
        files.write_json(workspace.policy_folder(name) / STORY_NAME, story)
    workspace.logbook.say(
        f"{name.folder}: threshold {tau:.4f} keeps {story['kept_samples']} of {story['samples']} samples and "
        f"{story['kept_dataset']} of {story['dataset']} pairs of D; {story['sources_with_none']} of "
        f"{story['sources']} sources have no sample left"
    )
    config = trainer_config(workspace, name)
    seed = keys.derived_seed(experiment.seed, "improve", name.grow, name.improve)
    training_batches = batches.PackedBatches(
        pairs,
        batch_size=config.batch_size,
        source_length=experiment.source_length,
        target_length=experiment.target_length,
        seed=seed,
    )
    workspace.logbook.say(describe_rows(training_batches))
    result = policy_trainer(workspace, config, policy_loss(experiment.policy, settings.loss)).fit(
        workspace.policy_params(start),
        training_batches.at,
        [ValidationReward(workspace)],
        workspace.policy_folder(name),
        workspace.logbook,
        seed,
    )
    checkpoints.discard_checkpoints(workspace.policy_folder(name))
    return {**story, "best_step": result.best_step, **result.best_metrics}


def _threshold(workspace: Workspace, grow_set: GrowSet, name: PolicyName) -> float:
    """τ of this step; τ of the first must exceed the mean reward of the Grow set (Algorithm 1)."""
    settings = workspace.experiment.improve
    thresholds = settings.thresholds.absolute(grow_set.all_rewards)
    seen = statistics.Summary()
    for rewards in grow_set.all_rewards:
        seen.add(rewards)
    try:
        filters.check_above_mean(thresholds[0], seen.mean)
    except errors.ConfigError as error:
        if settings.require_above_mean:
            raise
        workspace.logbook.say(f"warning: {error}")
    return thresholds[name.improve - 1]


def _survivors(workspace: Workspace, grow_set: GrowSet, tau: float) -> tuple[TokenPairs, dict[str, Any]]:
    """The pairs of the union D_g ∪ D that pass, and the numbers to tell of it."""
    settings = workspace.experiment.improve
    examples = workspace.split("train")
    of_samples = grow_set.survivors(tau, settings.drop_truncated)
    counts = of_samples.counts
    of_dataset = filters.keep(grow_set.dataset_rewards, examples.ids, tau, allow_empty=True)
    kept_dataset = of_dataset.mask if settings.filter_dataset else np.ones(len(examples), bool)
    if not counts.kept and not kept_dataset.any():
        usable = grow_set.usable_rewards(settings.drop_truncated)
        both = statistics.Chunks(lambda: itertools.chain(usable, [grow_set.dataset_rewards]))
        raise filters.nothing_kept(both, tau)
    row_of_id = {example_id: row for row, example_id in enumerate(examples.ids.tolist())}
    rows = np.array([row_of_id[example_id] for example_id in of_samples.example_ids.tolist()], np.int64)
    samples = TokenPairs(of_samples.example_ids, examples.tokens.sources.take(rows), of_samples.tokens)
    dataset = examples.tokens.take(np.flatnonzero(kept_dataset))
    story = {
        "threshold": float(tau),
        "kept": int(counts.kept + kept_dataset.sum()),
        "samples": counts.total,
        "dataset": len(examples),
        "kept_samples": counts.kept,
        "kept_dataset": int(kept_dataset.sum()),
        "truncated_left_out": of_samples.truncated_left_out,
        "sources": counts.sources,
        "sources_with_none": counts.sources_with_none,
        "mean_kept_reward": None if not counts.kept else counts.mean_kept,
    }
    return _joined(samples, dataset), story


def _joined(first: TokenPairs, second: TokenPairs) -> TokenPairs:
    return TokenPairs(
        np.concatenate([first.ids, second.ids]),
        grow_sets.concatenated([first.sources, second.sources]),
        grow_sets.concatenated([first.targets, second.targets]),
    )


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
