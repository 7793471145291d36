"""The annotate phase: the reward of every sample of a Grow step, and of the original data D.

Floor 6. Rewards are computed once and stored (paper, A.4), in files beside the samples, which are never
rewritten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax import files, processes
from rest_jax.data import candidates
from rest_jax.phases import grow_set, grow_summary, reward_model
from rest_jax.phases.jobs import Job, what_is_left
from rest_jax.phases.lineage import check_grow_step
from rest_jax.phases.workspace import Workspace
from rest_jax.rewards.protocol import Reward, checked_scores
from rest_jax.types import Examples


def annotate(workspace: Workspace, number: int) -> None:
    """Scores D once, and the samples of a Grow step; writes the Grow step's summary.

    As one of several jobs (`Experiment.shard`) it scores its share of the samples' shards only.

    Raises:
      ConfigError: the run has no such Grow step.
    """
    check_grow_step(number, workspace.experiment.grow_steps)
    reward = reward_model.reward_digest(workspace)
    job = workspace.experiment.job
    if job is not None:
        folder, identity = workspace.grow_rewards_folder(number), _identity(workspace, number, reward)
        workspace.run_part(folder, "annotate", identity, lambda: _score_share(workspace, number, job))
        return
    workspace.run_step(
        workspace.dataset_rewards_folder,
        "annotate",
        {"reward": reward, "data": workspace.digest(workspace.text_folder, "vocab")},
        lambda: _score_dataset(workspace),
    )
    seal = workspace.run_step(
        workspace.grow_rewards_folder(number),
        "annotate",
        _identity(workspace, number, reward),
        lambda: _score_samples(workspace, number),
        repairs_itself=True,
    )
    if processes.is_lead():
        _summarise(workspace, number, seal)


def _identity(workspace: Workspace, number: int, reward: str) -> dict[str, Any]:
    samples = workspace.digest(workspace.grow_folder(number), "grow")
    return {"grow": number, "reward": reward, "samples": samples}


def _score_dataset(workspace: Workspace) -> Mapping[str, Any]:
    examples = workspace.split("train")
    workspace.logbook.say(f"scoring the {len(examples)} pairs of D")
    reward = reward_model.load_reward(workspace)
    rewards = checked_scores(reward, examples.sources, examples.targets, examples.targets)
    if processes.is_lead():
        path = workspace.dataset_rewards_folder / grow_set.DATASET_REWARDS_NAME
        with files.atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.save(handle, rewards, allow_pickle=False)
    return {"pairs": len(examples), "mean": float(np.nanmean(rewards)), "signature": reward.signature()}


def _score_samples(workspace: Workspace, number: int) -> Mapping[str, Any]:
    writer = _writer(workspace, number)
    return _score_missing(workspace, number, writer, writer.missing_shards())


def _score_share(workspace: Workspace, number: int, job: Job) -> None:
    writer = _writer(workspace, number)
    share = job.share(writer.num_shards)
    _score_missing(workspace, number, writer, writer.missing_shards(share))
    left = len(writer.uncommitted())
    said = what_is_left(job, len(share), left, writer.num_shards, "annotate")
    workspace.logbook.say(f"rewards of Grow {number}: {said}")


def _writer(workspace: Workspace, number: int) -> candidates.RewardWriter:
    return candidates.RewardWriter(workspace.grow_folder(number), workspace.experiment.reward.kind)


def _score_missing(
    workspace: Workspace, number: int, writer: candidates.RewardWriter, missing: list[int]
) -> Mapping[str, Any]:
    reward = reward_model.load_reward(workspace)
    return score_shards(
        workspace, f"rewards of Grow {number}", reward, workspace.split("train"), writer, missing
    )


def score_shards(
    workspace: Workspace,
    name: str,
    reward: Reward,
    examples: Examples,
    writer: candidates.RewardWriter,
    missing: Sequence[int],
) -> Mapping[str, Any]:
    """Scores and commits shards of a store of samples.

    Args:
      workspace: the run.
      name: in messages ("rewards of Grow 1").
      reward: scores.
      examples: the split whose sources were sampled, with references.
      writer: of these rewards.
      missing: the shards to score.

    Returns:
      The reward's signature; and `totals`, where no shard is missing any more.
    """
    references = dict(zip(examples.ids.tolist(), examples.targets, strict=True))
    processes.barrier(f"annotate:{writer.folder}")
    with workspace.logbook.progress(name, len(missing), unit="shards") as bar:
        for index in missing:
            scores = [np.zeros(0)]
            for part in writer.batches(index, columns=("source", "text")):
                targets = [references[example_id] for example_id in part.example_id.tolist()]
                scores.append(checked_scores(reward, part.source, part.text, targets))
            if processes.is_lead():
                writer.write_shard(index, writer.samples(index, columns=()), np.concatenate(scores))
            bar.advance()
    processes.barrier(f"annotated:{writer.folder}")
    totals = {} if writer.uncommitted() else writer.totals()
    return {"signature": reward.signature(), **totals}


def _summarise(workspace: Workspace, number: int, seal: files.Seal) -> None:
    """Writes `grow/gN/summary.json`, which can be drawn from the sealed files at any time."""
    path = workspace.grow_folder(number) / grow_set.SUMMARY_NAME
    if path.exists() and files.read_json(path).get("rewards") == seal.digest:
        return
    summary = {**grow_summary.summarise(workspace, number), "rewards": seal.digest}
    files.write_json(path, summary)
    workspace.logbook.say(
        f"Grow {number}: mean reward {summary['reward']['mean']:.4f} over {summary['samples']} samples, "
        f"{summary['dataset_reward']['mean']:.4f} over D"
    )
