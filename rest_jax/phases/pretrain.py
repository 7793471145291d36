"""The pretrain phase: behaviour cloning on the parallel text gives the first policy, G=0 I=0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rest_jax import files, keys
from rest_jax.data import batches
from rest_jax.network import init, mesh
from rest_jax.phases.lineage import BC
from rest_jax.phases.losses import policy_loss
from rest_jax.phases.workspace import Workspace
from rest_jax.training import checkpoints, trainer
from rest_jax.training.evaluators import LossEvaluator
from rest_jax.types import LossFn, Params

# The phase that a policy taken from elsewhere is sealed with.
IMPORTED = "import"


def pretrain(workspace: Workspace) -> None:
    """Trains the BC policy into `policy/bc`, unless one was imported."""
    experiment = workspace.experiment
    found = files.read_seal(workspace.policy_folder(BC))
    if found is not None and found.phase == IMPORTED:
        files.verify_seal(workspace.policy_folder(BC))
        workspace.logbook.say("policy/bc was imported: there is nothing to train")
        return
    workspace.run_step(
        workspace.policy_folder(BC),
        "pretrain",
        {
            "policy": experiment.policy,
            "trainer": experiment.pretrain,
            "loss": experiment.pretrain_loss,
            "lengths": experiment.task_feature_lengths,
            "data": workspace.digest(workspace.text_folder, "vocab"),
        },
        lambda: _train(workspace),
        scratch=("checkpoints",),
    )


def _train(workspace: Workspace) -> Mapping[str, Any]:
    experiment = workspace.experiment
    loss_fn = policy_loss(experiment.policy, experiment.pretrain_loss)
    training_batches = batches.PackedBatches(
        workspace.split("train").tokens,
        batch_size=experiment.pretrain.batch_size,
        source_length=experiment.source_length,
        target_length=experiment.target_length,
        seed=experiment.seed,
    )
    workspace.logbook.say(describe_rows(training_batches))
    validation = batches.eval_batches(
        workspace.split("valid").tokens,
        experiment.pretrain.batch_size,
        experiment.source_length,
        experiment.target_length,
    )
    result = policy_trainer(workspace, experiment.pretrain, loss_fn).fit(
        initial_policy(workspace),
        training_batches.at,
        [LossEvaluator(loss_fn, validation, workspace.mesh)],
        workspace.policy_folder(BC),
        workspace.logbook,
        experiment.seed,
    )
    checkpoints.discard_checkpoints(workspace.policy_folder(BC))
    return {"best_step": result.best_step, **result.best_metrics}


def describe_rows(training_batches: batches.PackedBatches) -> str:
    """One line on how the pairs fill the rows of an epoch."""
    fill = training_batches.fill_rates()
    return (
        f"an epoch has {training_batches.rows_per_epoch()} rows of {fill.pairs_per_row:.1f} pairs; "
        f"sources fill {fill.source:.0%} of them, targets {fill.target:.0%}"
    )


def initial_policy(workspace: Workspace) -> Params:
    """Random parameters, a function of the seed alone."""
    key = keys.stream_key(workspace.experiment.seed, keys.Stream.INIT)
    return init.init_params(workspace.experiment.policy, key)


def policy_trainer(workspace: Workspace, config: trainer.TrainerConfig, loss_fn: LossFn) -> trainer.Trainer:
    """The shared trainer, with the policy's parameters laid out over the mesh."""
    shardings = mesh.param_shardings(workspace.mesh, init.abstract_params(workspace.experiment.policy))
    return trainer.Trainer(config, loss_fn, workspace.mesh, shardings)
