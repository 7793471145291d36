"""A scored Grow step as Improve and the report see it.

Floor 6.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rest_jax.data import candidates
from rest_jax.phases.workspace import Workspace
from rest_jax.types import RaggedTokens

SUMMARY_NAME = "summary.json"
DATASET_REWARDS_NAME = "rewards.npy"
_BINS = 50
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_EXAMPLES, _EXTREMES = 8, 3


@dataclasses.dataclass(frozen=True)
class GrowSet:
    """What Improve needs of D_g: the samples' tokens and rewards, and the rewards of D.

    Attributes:
      example_ids: int64 [n], the source of each sample.
      tokens: n token sequences.
      truncated: bool [n].
      rewards: float64 [n].
      dataset_rewards: float64 [m], in the order of the train split.
    """

    example_ids: np.ndarray
    tokens: RaggedTokens
    truncated: np.ndarray
    rewards: np.ndarray
    dataset_rewards: np.ndarray


def dataset_rewards(workspace: Workspace) -> np.ndarray:
    """The rewards of D, float64 [m], in the order of the train split."""
    workspace.require(workspace.dataset_rewards_folder, "annotate")
    return np.load(workspace.dataset_rewards_folder / DATASET_REWARDS_NAME, allow_pickle=False)


def load_grow_set(workspace: Workspace, number: int) -> GrowSet:
    """Reads the samples of a Grow step with their rewards."""
    workspace.require(workspace.grow_rewards_folder(number), "annotate")
    folder, kind = workspace.grow_folder(number), workspace.experiment.reward.kind
    parts = list(candidates.read_scored(folder, kind, columns=("tokens", "truncated")))
    shards = [shard for shard, _ in parts]
    return GrowSet(
        example_ids=np.concatenate([shard.example_id for shard in shards]),
        tokens=concatenated([shard.tokens for shard in shards]),
        truncated=np.concatenate([shard.truncated for shard in shards]),
        rewards=np.concatenate([rewards for _, rewards in parts]),
        dataset_rewards=dataset_rewards(workspace),
    )


def concatenated(parts: list[RaggedTokens]) -> RaggedTokens:
    """The sequences of all parts, in order."""
    lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
    return RaggedTokens(np.concatenate([part.values for part in parts]), np.cumsum(lengths))


def summarise(workspace: Workspace, number: int) -> dict[str, Any]:
    """The reward of a Grow step in numbers and examples, for the report; JSON-able."""
    folder, kind = workspace.grow_folder(number), workspace.experiment.reward.kind
    parts = list(candidates.read_scored(folder, kind, columns=("text", *candidates.FLAGS)))
    rewards = np.concatenate([rewards for _, rewards in parts])
    of_dataset = dataset_rewards(workspace)
    texts = [(i, t) for shard, _ in parts for i, t in zip(shard.example_id.tolist(), shard.text, strict=True)]
    present = rewards[np.isfinite(rewards)]
    edges = np.linspace(0.0, 1.0, _BINS + 1)
    return {
        "grow": number,
        "samples": len(rewards),
        "sources": len(np.unique(np.concatenate([shard.example_id for shard, _ in parts]))),
        "duplicates": len(texts) - len(set(texts)),
        "truncated": int(sum(shard.truncated.sum() for shard, _ in parts)),
        "empty": int(sum(shard.empty.sum() for shard, _ in parts)),
        "copies_of_source": int(sum(shard.copy_of_source.sum() for shard, _ in parts)),
        "repeated_ngram": int(sum(shard.repeated_ngram.sum() for shard, _ in parts)),
        "missing_rewards": len(rewards) - len(present),
        "reward": {
            "mean": float(present.mean()),
            "quantiles": {str(q): float(np.quantile(present, q)) for q in _QUANTILES},
        },
        "dataset_reward": {"mean": float(np.nanmean(of_dataset)), "pairs": len(of_dataset)},
        "histogram": {
            "edges": edges.tolist(),
            "samples": np.histogram(present, edges)[0].tolist(),
            "dataset": np.histogram(of_dataset[np.isfinite(of_dataset)], edges)[0].tolist(),
        },
        "examples": _examples(workspace, *parts[0]),
    }


def _examples(
    workspace: Workspace, shard: candidates.CandidateShard, rewards: np.ndarray
) -> list[dict[str, Any]]:
    """A few sources of a shard with their best and worst samples."""
    examples = workspace.split("train")
    row_of_id = {example_id: row for row, example_id in enumerate(examples.ids.tolist())}
    ids = np.unique(shard.example_id)
    shown = []
    for example_id in ids[np.linspace(0, len(ids) - 1, min(_EXAMPLES, len(ids))).astype(int)].tolist():
        rows = np.flatnonzero((shard.example_id == example_id) & np.isfinite(rewards))
        ranked = rows[np.argsort(-rewards[rows], kind="stable")]
        distinct = list({shard.text[row]: (shard.text[row], float(rewards[row])) for row in ranked}.values())
        described = [{"text": text, "reward": reward} for text, reward in distinct]
        shown.append(
            {
                "id": example_id,
                "source": examples.sources[row_of_id[example_id]],
                "reference": examples.targets[row_of_id[example_id]],
                "best": described[:_EXTREMES],
                "worst": described[_EXTREMES:][-_EXTREMES:],
            }
        )
    return shown
