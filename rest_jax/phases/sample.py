"""The sample phase: many samples of any policy for the sources of an evaluation split, with rewards.

Floor 6. `samples/POLICY_SPLIT` is a store like that of a Grow step: the same shards, columns and flags,
made anew where a shard is missing. Rewards stand beside the samples, as many as are asked for: the run's own
and metrics against the references.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rest_jax import files, keys
from rest_jax.data import candidates
from rest_jax.phases import annotate, reward_model
from rest_jax.phases.lineage import PolicyName
from rest_jax.phases.sampling import SampleSet, policy_digest, sample_all, sample_share
from rest_jax.phases.workspace import Workspace
from rest_jax.types import Examples


def sample(workspace: Workspace, name: PolicyName) -> None:
    """Makes `samples/POLICY_SPLIT` with its rewards; as one of several jobs its share of the samples alone.

    Args:
      workspace: the run; `BestOfNConfig` says what is sampled.
      name: the policy.
    """
    folder, identity = workspace.sample_folder(name), _identity(workspace, name)
    job = workspace.experiment.job
    if job is not None:
        workspace.run_part(
            folder, "sample", identity, lambda: sample_share(workspace, sample_store(workspace, name), job)
        )
        return
    seal = workspace.run_step(
        folder,
        "sample",
        identity,
        lambda: sample_all(workspace, sample_store(workspace, name)),
        scratch=(candidates.REWARDS_FOLDER,),
        repairs_itself=True,
    )
    for kind in reward_kinds(workspace):
        _score(workspace, name, kind, seal)


def reward_kinds(workspace: Workspace) -> list[str]:
    """The rewards that stand beside the samples, the run's own first."""
    settings = workspace.experiment.best_of_n
    own = workspace.experiment.reward.kind
    others = (kind for kind in (*settings.select_by, *settings.report_on) if kind != "reward")
    return list(dict.fromkeys([own, *others]))


def sampled_examples(workspace: Workspace) -> Examples:
    """The examples whose sources are sampled: the first of the split, sorted by id."""
    settings = workspace.experiment.best_of_n
    examples = workspace.split(settings.split)
    examples = examples.take(np.arange(len(examples))[: settings.sources])
    return examples.take(np.argsort(examples.ids, kind="stable"))


def sample_store(workspace: Workspace, name: PolicyName) -> SampleSet:
    """What the store of a policy's samples is to hold.

    All policies draw with the same random numbers, as in `evaluate`: what differs between them is theirs.
    """
    settings = workspace.experiment.best_of_n
    return SampleSet(
        name=f"samples of {name.folder}",
        verb="sample",
        folder=workspace.sample_folder(name),
        policy=name,
        examples=sampled_examples(workspace),
        samples_per_source=settings.samples_per_source,
        sampling=settings.sampling,
        num_shards=settings.shards,
        stream=keys.Stream.SAMPLE,
    )


def _identity(workspace: Workspace, name: PolicyName) -> dict[str, Any]:
    """What the samples depend on; how one of them is chosen is no part of it."""
    settings = workspace.experiment.best_of_n
    return {
        "split": settings.split,
        "sources": settings.sources,
        "samples_per_source": settings.samples_per_source,
        "sampling": settings.sampling,
        "shards": settings.shards,
        "decoding": workspace.experiment.decoding,
        "policy": policy_digest(workspace, name),
        "data": workspace.digest(workspace.text_folder, "vocab"),
    }


def _score(workspace: Workspace, name: PolicyName, kind: str, samples: files.Seal) -> None:
    folder = workspace.sample_folder(name)

    def work() -> Any:
        writer = candidates.RewardWriter(folder, kind)
        reward = reward_model.load_reward(workspace, kind)
        named = f"{kind} of the samples of {name.folder}"
        missing = writer.missing_shards()
        return annotate.score_shards(workspace, named, reward, sampled_examples(workspace), writer, missing)

    workspace.run_step(
        candidates.rewards_folder(folder, kind),
        "sample",
        {"reward": reward_model.reward_digest(workspace, kind), "samples": samples.digest},
        work,
        repairs_itself=True,
    )
