"""The value function of a Grow step: what the behaviour policy's translations are worth, token by token.

Floor 6. Behaviour value estimation (arXiv:2308.08998, A.8.4): an encoder-decoder with a scalar at every
target position is trained on the Grow set by the shared trainer, towards the return of the whole translation.
OAC reads it as it is; V-MPO starts its own value from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rest_jax import errors, files, keys, processes
from rest_jax.data import batches
from rest_jax.metrics import rank
from rest_jax.network import init, mesh
from rest_jax.network.config import T5Config
from rest_jax.phases import selection, token_numbers
from rest_jax.phases.improve_settings import ValueFunctionConfig
from rest_jax.phases.lineage import PolicyName, behaviour_policy, check_grow_step
from rest_jax.phases.losses import REWARD, value_regression
from rest_jax.phases.pretrain import describe_rows
from rest_jax.phases.workspace import Workspace, layout_of
from rest_jax.training import checkpoints, trainer
from rest_jax.training.evaluators import LossEvaluator
from rest_jax.types import Params, TokenPairs

REPORT_NAME = "report.json"


def make_value(workspace: Workspace, grow: int) -> None:
    """Makes `value/gG` from all of D_g, without a filter.

    Raises:
      ConfigError: the run has no such Grow step, or no settings of a value function.
    """
    experiment, settings = workspace.experiment, settings_of(workspace)
    check_grow_step(grow, experiment.grow_steps)
    behaviour = behaviour_policy(grow, experiment.improve.steps_of)
    policy_phase = "improve" if behaviour.grow else "pretrain"
    workspace.run_step(
        workspace.value_folder(grow),
        "value",
        {
            "grow": grow,
            "settings": settings,
            "network": network_of(workspace),
            "lengths": experiment.task_feature_lengths,
            "guards": experiment.improve.guards,
            "dataset": experiment.improve.dataset != "none",
            "policy": workspace.digest(workspace.policy_folder(behaviour), policy_phase),
            "rewards": workspace.digest(workspace.grow_rewards_folder(grow), "annotate"),
            **selection.earlier_rewards(workspace, grow),
            "dataset_rewards": workspace.digest(workspace.dataset_rewards_folder, "annotate"),
        },
        lambda: _train(workspace, grow, behaviour),
        scratch=("checkpoints",),
    )


def settings_of(workspace: Workspace) -> ValueFunctionConfig:
    """The settings of the value function.

    Raises:
      ConfigError: there are none.
    """
    settings = workspace.experiment.value
    if settings is None:
        raise errors.ConfigError(
            "this run has no value function",
            where="Experiment.value",
            remedy="Include gin_configs/objectives/value.gin",
        )
    return settings


def network_of(workspace: Workspace) -> T5Config:
    """The value function's network: its own, or the policy's sizes."""
    return settings_of(workspace).network or workspace.experiment.policy


def load_value(workspace: Workspace, grow: int) -> Params:
    """The parameters of a sealed value function."""
    folder = workspace.value_folder(grow)
    workspace.require(folder, "value")
    layout = layout_of(workspace.mesh, init.abstract_value_params(network_of(workspace)))
    return checkpoints.load_params(folder / "params", layout)


def scored_pairs(selected: selection.Selected) -> tuple[TokenPairs, np.ndarray]:
    """The pairs that have a reward, with the column "reward", and their rewards, float64 [n]."""
    rows = np.flatnonzero(np.isfinite(selected.rewards))
    pairs, rewards_n = selected.pairs.take(rows), selected.rewards[rows]
    return pairs.with_columns({REWARD: token_numbers.of_each_token(pairs, rewards_n)}), rewards_n


def _train(workspace: Workspace, grow: int, behaviour: PolicyName) -> Mapping[str, Any]:
    experiment, settings, network = workspace.experiment, settings_of(workspace), network_of(workspace)
    pairs, rewards_n = scored_pairs(selection.select(workspace, PolicyName(grow, 0)))
    config, seed = settings.trainer, keys.derived_seed(experiment.seed, "value", grow)
    lengths = experiment.source_length, experiment.target_length
    training_batches = batches.PackedBatches(pairs, config.batch_size, *lengths, seed=seed)
    workspace.logbook.say(f"value/g{grow}: {len(pairs)} pairs; {describe_rows(training_batches)}")
    seen = np.unique(np.linspace(0, len(pairs) - 1, settings.report_pairs).astype(np.int64))
    seen_batches = batches.eval_batches(pairs.take(seen), config.batch_size, *lengths, pack=True)
    loss_fn = value_regression(network, settings.loss)
    start = workspace.policy_params(behaviour) if settings.start_from_policy else None
    shardings = mesh.param_shardings(workspace.mesh, init.abstract_value_params(network))
    result = trainer.Trainer(config, loss_fn, workspace.mesh, shardings).fit(
        init.init_value_params(network, keys.stream_key(seed, keys.Stream.INIT), start),
        training_batches.at,
        [LossEvaluator(loss_fn, seen_batches, workspace.mesh, "seen")],
        workspace.value_folder(grow),
        workspace.logbook,
        seed,
    )
    report = _report(workspace, result.params, pairs.take(seen), rewards_n[seen])
    if processes.is_lead():
        files.write_json(workspace.value_folder(grow) / REPORT_NAME, report)
    said = ", ".join(f"{name} {value:.3f}" for name, value in report.items() if isinstance(value, float))
    workspace.logbook.say(f"value/g{grow}: on what it was trained on, {said}")
    checkpoints.discard_checkpoints(workspace.value_folder(grow))
    return {**report, "best_step": result.best_step, **result.best_metrics}


def _report(
    workspace: Workspace, params: Params, pairs: TokenPairs, rewards_n: np.ndarray
) -> dict[str, float | int | None]:
    """How the values of training pairs rank with their rewards (A.8.4), and how they grow with the prefix.

    The value before a pair's last token has seen all of it; the one before its first token has seen the
    source alone and can do no more than tell easy sources from hard ones.
    """
    settings = settings_of(workspace)
    found = token_numbers.values(
        workspace, network_of(workspace), params, pairs, settings.trainer.batch_size
    ).astype(np.float64)
    last, first = pairs.targets.offsets[1:] - 1, pairs.targets.offsets[:-1]
    middle = (first + last) // 2
    report: dict[str, float | int | None] = {"pairs": len(pairs)}
    for place, rows in (("last", last), ("middle", middle), ("first", first)):
        report[f"kendall_{place}"] = rank.kendall(found[rows], rewards_n)
        report[f"spearman_{place}"] = rank.spearman(found[rows], rewards_n)
    return report
