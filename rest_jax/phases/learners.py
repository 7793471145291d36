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
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax.network import heads, init, mesh, transformer
from rest_jax.network.config import T5Config
from rest_jax.objectives import actor_critic, gold, policy, returns, v_mpo, values
from rest_jax.phases import token_numbers, value
from rest_jax.phases.lineage import BC, PolicyName, behaviour_policy
from rest_jax.phases.losses import dropout_arguments, policy_loss
from rest_jax.phases.selection import Selected
from rest_jax.phases.value import REWARD
from rest_jax.phases.workspace import Workspace
from rest_jax.training.companions import Companions
from rest_jax.training.optimizers import OptimizerConfig
from rest_jax.types import ContextLossFn, LossContext, LossFn, LossSums, Params, Seq2SeqBatch, TokenPairs

MLE, BEHAVIOUR, VALUE = "mle_log_prob", "behaviour_log_prob", "value"
POLICY, CRITIC, DUALS, LAGGING, PRIOR = "policy", "value", "duals", "lagging", "prior"


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


class _Arrays:
    """A batch as the objectives take it."""

    def __init__(self, batch: Seq2SeqBatch):
        self.targets_BxT = jnp.asarray(batch.decoder_target_tokens)
        self.weights_BxT = jnp.asarray(batch.decoder_loss_weights)
        segments = batch.decoder_segment_ids
        self.segments_BxT = None if segments is None else jnp.asarray(segments)
        self.columns = {name: jnp.asarray(column) for name, column in batch.token_columns.items()}


def _gold(job: _Job, settings: gold.GoldConfig) -> Learner:
    """GOLD (A.8.2): q from the BC policy, importance weights from a copy that lags by `sync_period`."""
    model = transformer.Transformer(job.network)
    pairs = job.selected.pairs
    pairs = pairs.with_columns({MLE: job.log_probs(BC, pairs)})

    def lagged(context: LossContext, batch: Seq2SeqBatch, targets_BxT: jax.Array) -> jax.Array | None:
        if settings.sync_period == 1:  # the copy is the policy itself: no second pass
            return None
        logits_BxTxV = token_numbers.apply_to_batch(
            model, context.lagging[LAGGING], batch, deterministic=True
        )
        return policy.token_log_probs(logits_BxTxV, targets_BxT)

    def loss(
        params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None, context: LossContext
    ) -> LossSums:
        found = _Arrays(batch)
        logits_BxTxV = token_numbers.apply_to_batch(
            model, params[POLICY], batch, **dropout_arguments(dropout_key)
        )
        return gold.gold(
            logits_BxTxV,
            found.targets_BxT,
            found.weights_BxT,
            found.columns[MLE],
            lagged(context, batch, found.targets_BxT),
            settings,
            found.segments_BxT,
        )

    follows = {} if settings.sync_period == 1 else {LAGGING: POLICY}
    companions = Companions(lagging=follows, sync_period=settings.sync_period, result=POLICY)
    return Learner(pairs, loss, {POLICY: job.start}, {POLICY: job.policy_shardings}, companions)


def _v_mpo(job: _Job, settings: v_mpo.VMPOConfig) -> Learner:
    """V-MPO and BVMPO (A.8.1): policy, value and duals are trained together, the value by V-trace."""
    workspace = job.workspace
    value_settings, value_network = value.settings_of(workspace), value.network_of(workspace)
    model, critic = transformer.Transformer(job.network), heads.ValueModel(value_network)
    pairs, _ = value.scored_pairs(job.selected)
    behaviour = behaviour_policy(job.name.grow, workspace.experiment.improve.steps_of)
    pairs = pairs.with_columns({BEHAVIOUR: job.log_probs(behaviour, pairs, tempered=True)})
    with_prior = settings.behaviour_weight is not None

    def loss(
        params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None, context: LossContext
    ) -> LossSums:
        found, dropout = _Arrays(batch), dropout_arguments(dropout_key)
        logits_BxTxV = token_numbers.apply_to_batch(model, params[POLICY], batch, **dropout)
        values_BxT = token_numbers.apply_to_batch(critic, params[CRITIC], batch, **dropout)
        old_BxTxV = token_numbers.apply_to_batch(model, context.lagging[LAGGING], batch, deterministic=True)
        prior_BxTxV = None
        if with_prior:
            prior_BxTxV = token_numbers.apply_to_batch(
                model, context.frozen[PRIOR], batch, deterministic=True
            )
        log_probs_BxT = policy.token_log_probs(logits_BxTxV, found.targets_BxT)
        trace = returns.v_trace(
            log_probs_BxT - found.columns[BEHAVIOUR],
            values_BxT,
            returns.terminal_rewards(found.columns[REWARD], found.weights_BxT, found.segments_BxT),
            found.weights_BxT,
            found.segments_BxT,
            settings.discount,
            settings.rho_bar,
            settings.c_bar,
        )
        of_policy = v_mpo.v_mpo(
            logits_BxTxV,
            found.targets_BxT,
            found.weights_BxT,
            trace.advantages_BxT,
            v_mpo.Anchors(old_BxTxV, prior_BxTxV, settings.weight_of_behaviour(context.progress)),
            params[DUALS],
            settings,
        )
        of_value = values.value_loss(
            values_BxT,
            trace.targets_BxT,
            found.weights_BxT,
            value_settings.loss.kind,
            value_settings.loss.delta,
        )
        return _joined(of_policy, of_value)

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
    return Learner(pairs, loss, start, shardings, companions)


def _joined(of_policy: LossSums, of_value: LossSums) -> LossSums:
    """Both losses, each averaged over tokens: they share no parameter, so their sum trains both."""
    metrics = {f"value_{name}": pair for name, pair in of_value.metrics.items()}
    return LossSums(of_policy.loss + of_value.loss, of_policy.weight, {**of_policy.metrics, **metrics})


def _oac(job: _Job, settings: actor_critic.OACConfig) -> Learner:
    """OAC (A.8.3): the advantage of the return over the behaviour value, which stands still."""
    workspace = job.workspace
    model = transformer.Transformer(job.network)
    pairs, _ = value.scored_pairs(job.selected)
    network, params = value.network_of(workspace), value.load_value(workspace, job.name.grow)
    pairs = pairs.with_columns(
        {VALUE: token_numbers.values(workspace, network, params, pairs, job.batch_size)}
    )
    weighted = settings.importance_clip is not None
    if weighted:
        behaviour = behaviour_policy(job.name.grow, workspace.experiment.improve.steps_of)
        pairs = pairs.with_columns({BEHAVIOUR: job.log_probs(behaviour, pairs, tempered=True)})

    def loss(params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None) -> LossSums:
        found = _Arrays(batch)
        logits_BxTxV = token_numbers.apply_to_batch(model, params, batch, **dropout_arguments(dropout_key))
        returns_BxT = returns.discounted_returns(
            found.columns[REWARD], found.weights_BxT, found.segments_BxT, settings.discount
        )
        return actor_critic.advantage_weighted(
            logits_BxTxV,
            found.targets_BxT,
            found.weights_BxT,
            returns_BxT - found.columns[VALUE],
            settings,
            found.columns[BEHAVIOUR] if weighted else None,
            found.segments_BxT,
        )

    return Learner(pairs, loss, job.start, job.policy_shardings)


def _bve(job: _Job, settings: values.BVEConfig) -> Learner:
    """One-step Q-learning (A.2): scale · logits is Q, so the policy acts by softmax(Q / scale)."""
    model = transformer.Transformer(job.network)
    pairs, _ = value.scored_pairs(job.selected)

    def loss(
        params: Params, batch: Seq2SeqBatch, dropout_key: jax.Array | None, context: LossContext
    ) -> LossSums:
        found = _Arrays(batch)
        logits_BxTxV = token_numbers.apply_to_batch(
            model, params[POLICY], batch, **dropout_arguments(dropout_key)
        )
        old_BxTxV = token_numbers.apply_to_batch(model, context.lagging[LAGGING], batch, deterministic=True)
        return values.bve_q_loss(
            settings.scale * logits_BxTxV,
            found.targets_BxT,
            found.weights_BxT,
            settings.scale * old_BxTxV,
            found.columns[REWARD],
            settings,
            found.segments_BxT,
        )

    companions = Companions(lagging={LAGGING: POLICY}, sync_period=settings.sync_period, result=POLICY)
    return Learner(pairs, loss, {POLICY: job.start}, {POLICY: job.policy_shardings}, companions)
