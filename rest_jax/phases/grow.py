"""The Grow step: N samples of each source from the latest policy, written shard by shard.

Floor 6. `sampling.py` does the sampling; here is which sources are sampled, from which policy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rest_jax import keys
from rest_jax.data import candidates
from rest_jax.phases.grow_set import SUMMARY_NAME
from rest_jax.phases.lineage import behaviour_policy, check_grow_step
from rest_jax.phases.sampling import SampleSet, policy_digest, sample_all, sample_share
from rest_jax.phases.workspace import Workspace
from rest_jax.types import Examples


def grow(workspace: Workspace, number: int) -> None:
    """Makes `grow/gN`; as one of several jobs (`Experiment.shard`) its share of the shards, without a seal.

    Args:
      workspace: the run.
      number: g, from 1.

    Raises:
      ConfigError: the run has no such Grow step.
    """
    folder, identity = workspace.grow_folder(number), grow_identity(workspace, number)
    job = workspace.experiment.job
    if job is not None:
        workspace.run_part(
            folder, "grow", identity, lambda: sample_share(workspace, grow_store(workspace, number), job)
        )
        return
    workspace.run_step(
        folder,
        "grow",
        identity,
        lambda: sample_all(workspace, grow_store(workspace, number)),
        scratch=(candidates.REWARDS_FOLDER, SUMMARY_NAME),
        repairs_itself=True,
    )


def grow_identity(workspace: Workspace, number: int) -> dict[str, Any]:
    """What the samples of a Grow step depend on.

    Raises:
      ConfigError: the run has no such Grow step.
      MissingInputError: the policy or the data is not there.
    """
    experiment = workspace.experiment
    check_grow_step(number, experiment.grow_steps)
    return {
        "grow": number,
        "settings": experiment.grow,
        "decoding": experiment.decoding,
        "policy": policy_digest(workspace, behaviour_policy(number, experiment.improve.steps_of)),
        "data": workspace.digest(workspace.text_folder, "vocab"),
    }


def grow_sources(workspace: Workspace, number: int) -> Examples:
    """The training examples whose sources are sampled in a Grow step, sorted by id: x ~ D.

    Where fewer than all are asked for, each Grow step draws its own, without replacement.
    """
    examples, wanted = workspace.split("train"), workspace.experiment.grow.sources
    rows = np.arange(len(examples))
    if wanted is not None and wanted < len(rows):
        address = [workspace.experiment.seed & 0xFFFFFFFFFFFFFFFF, number]
        generator = np.random.Generator(np.random.Philox(key=np.array(address, np.uint64)))
        rows = generator.choice(rows, size=wanted, replace=False)
    return examples.take(rows[np.argsort(examples.ids[rows], kind="stable")])


def grow_store(workspace: Workspace, number: int) -> SampleSet:
    """What the store of a Grow step is to hold."""
    experiment = workspace.experiment
    return SampleSet(
        name=f"Grow {number}",
        verb="grow",
        folder=workspace.grow_folder(number),
        policy=behaviour_policy(number, experiment.improve.steps_of),
        examples=grow_sources(workspace, number),
        samples_per_source=experiment.grow.samples_per_source,
        sampling=experiment.grow.sampling,
        num_shards=experiment.grow.shards,
        stream=keys.Stream.GROW,
        round_index=number,
    )
