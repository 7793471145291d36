"""What the trainer is given to fine-tune a policy with each of the paper's losses.

Floor 6. A loss needs more than the pairs that survived: the reward of each, log-probabilities under the BC
or the behaviour policy, values, copies that lag. Whatever does not change while the policy is trained is
computed once and travels with the tokens (`token_numbers`); what does change are parts of the parameters or
companions.

    loss            columns of the tokens                 parts           lagging      frozen
    BC              -                                     the policy      -            -
    GOLD            log p_MLE                             policy          policy (u)   -
    V-MPO, BVMPO    reward, log mu                        policy, value,  policy       BC policy (BVMPO)
                                                          duals
    OAC             reward, V of the behaviour policy     the policy      -            -
    BVE             reward                                policy (as Q)   policy       -
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.network import init, mesh
from rest_jax.network.config import T5Config
from rest_jax.objectives import actor_critic, gold, v_mpo, values
from rest_jax.phases import token_numbers, value
from rest_jax.phases.lineage import BC, PolicyName, behaviour_policy
from rest_jax.phases.losses import (
    BEHAVIOUR,
    CRITIC,
    DUALS,
    LAGGING,
    MLE,
    POLICY,
    PRIOR,
    VALUE,
    bve_loss,
    gold_loss,
    oac_loss,
    policy_loss,
    v_mpo_loss,
)
from rest_jax.phases.selection import Selected
from rest_jax.phases.workspace import Workspace
from rest_jax.training.companions import Companions
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.types import ContextLossFn, LossFn, Params, TokenPairs


@dataclasses.dataclass(frozen=True)
class Learner:
    """One fine-tuning, ready for the trainer.

    Attributes:
      pairs: what it is trained on, with the columns that the loss reads.
      loss_fn: the loss.
      params: where it starts.
      shardings: a `NamedSharding` for each parameter.
      companions: None for a loss of the policy alone.
    """

    pairs: TokenPairs
    loss_fn: LossFn | ContextLossFn
    params: Params
    shardings: Any
    companions: Companions | None = None


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every learner is made from."""

    workspace: Workspace
    name: PolicyName
    start: Params
    selected: Selected
    batch_size: int

    @property
    def network(self) -> T5Config:
        return self.workspace.experiment.policy

    @property
    def policy_shardings(self) -> Any:
        return mesh.param_shardings(self.workspace.mesh, init.abstract_params(self.network))

    def log_probs(self, name: PolicyName, pairs: TokenPairs, tempered: bool = False) -> np.ndarray:
        """Of the pairs' tokens under a policy of the run; `tempered` as Grow samples from it."""
        sampling = self.workspace.experiment.grow.sampling if tempered else None
        params = self.workspace.policy_params(name)
        return token_numbers.log_probs(self.workspace, params, pairs, self.batch_size, sampling)


def make_learner(
    workspace: Workspace, name: PolicyName, start: Params, selected: Selected, batch_size: int
) -> Learner:
    """Prepares an Improve step with the loss of the run.

    Args:
      workspace: the run.
      name: the policy to be made.
      start: the parameters that it starts from.
      selected: what passed the filter.
      batch_size: rows at a time for the networks that are applied here.

    Raises:
      ConfigError: the loss reads a value function that was trained with another discount.
      MissingInputError: it reads a value function that is not there.
    """
    job = _Job(workspace, name, start, selected, batch_size)
    settings = workspace.experiment.improve.loss
    match settings:
        case gold.GoldConfig():
            return _gold(job, settings)
        case v_mpo.VMPOConfig():
            return _v_mpo(job, settings)
        case actor_critic.OACConfig():
            return _oac(job, settings)
        case values.BVEConfig():
            return _bve(job, settings)
        case _:
            loss_fn = policy_loss(job.network, settings)
            return Learner(selected.pairs, loss_fn, start, job.policy_shardings)


def _gold(job: _Job, settings: gold.GoldConfig) -> Learner:
    """q is from the BC policy, the importance weights are from a copy that lags by `sync_period`."""
    pairs = job.selected.pairs
    pairs = pairs.with_columns({MLE: job.log_probs(BC, pairs)})
    follows = {} if settings.sync_period == 1 else {LAGGING: POLICY}
    companions = Companions(lagging=follows, sync_period=settings.sync_period, result=POLICY)
    loss_fn = gold_loss(job.network, settings)
    return Learner(pairs, loss_fn, {POLICY: job.start}, {POLICY: job.policy_shardings}, companions)


def _v_mpo(job: _Job, settings: v_mpo.VMPOConfig) -> Learner:
    """The value starts from the behaviour policy's, and is trained along."""
    workspace = job.workspace
    value_settings, value_network = value.settings_of(workspace), value.network_of(workspace)
    pairs, _ = value.scored_pairs(job.selected)
    behaviour = behaviour_policy(job.name.grow, workspace.experiment.improve.steps_of)
    pairs = pairs.with_columns({BEHAVIOUR: job.log_probs(behaviour, pairs, tempered=True)})
    with_prior = settings.behaviour_weight is not None
    loss_fn = v_mpo_loss(job.network, value_network, settings, value_settings.loss)
    start = {
        POLICY: job.start,
        CRITIC: value.load_value(workspace, job.name.grow),
        DUALS: settings.initial_duals(),
    }
    whole = NamedSharding(workspace.mesh, PartitionSpec())
    shardings = {
        POLICY: job.policy_shardings,
        CRITIC: mesh.param_shardings(workspace.mesh, init.abstract_value_params(value_network)),
        DUALS: jax.tree.map(lambda _: whole, start[DUALS]),
    }
    dual_optimizer = OptimizerConfig("adam", settings.dual_learning_rate, b2=0.999, clip_norm=0.0)
    companions = Companions(
        frozen={PRIOR: workspace.policy_params(BC)} if with_prior else {},
        lagging={LAGGING: POLICY},
        sync_period=settings.sync_period,
        optimizers={CRITIC: value_settings.trainer.optimizer, DUALS: dual_optimizer},
        project=lambda params: {**params, DUALS: v_mpo.project_duals(params[DUALS])},
        result=POLICY,
    )
    return Learner(pairs, loss_fn, start, shardings, companions)


def _oac(job: _Job, settings: actor_critic.OACConfig) -> Learner:
    """The behaviour value stands still, so it is a column of the tokens."""
    workspace = job.workspace
    pairs, _ = value.scored_pairs(job.selected)
    network, params = value.network_of(workspace), value.load_value(workspace, job.name.grow)
    columns = {VALUE: token_numbers.values(workspace, network, params, pairs, job.batch_size)}
    if settings.importance_clip is not None:
        behaviour = behaviour_policy(job.name.grow, workspace.experiment.improve.steps_of)
        columns[BEHAVIOUR] = job.log_probs(behaviour, pairs, tempered=True)
    loss_fn = oac_loss(job.network, settings)
    return Learner(pairs.with_columns(columns), loss_fn, job.start, job.policy_shardings)


def _bve(job: _Job, settings: values.BVEConfig) -> Learner:
    """The target network is a copy that lags."""
    pairs, _ = value.scored_pairs(job.selected)
    companions = Companions(lagging={LAGGING: POLICY}, sync_period=settings.sync_period, result=POLICY)
    loss_fn = bve_loss(job.network, settings)
    return Learner(pairs, loss_fn, {POLICY: job.start}, {POLICY: job.policy_shardings}, companions)
